"""Pruning methods: how a group's units are ordered. One signature for all; a registry, so that others can be added."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import BankError, CalibrationError
from ..groups import Group
from .compensate import with_bias
from .obs import Order, obs_order


@dataclass(frozen=True)
class ConsumerProblem:
    """A consumer as a method sees it: its dense weight as a matrix (a convolution's input is a patch) and bias, its
    Hessian, float64 (damped for methods that compensate, None for those that need no data), and the columns of the
    group's units, shape (units, columns of one).
    """

    weight: Tensor
    bias: Tensor | None
    hessian: Tensor | None
    columns: Tensor


@dataclass(frozen=True)
class GroupProblem:
    """One group to order.

    Args:
        group: the group.
        consumers: the layers that read it.
        producers: weight rows of each unit in each producer, shape (units, channels, in), `in` as for consumers.
        seed: for methods that draw.
        scores: statistic -> a number a unit that the calibration has summed, shape (units,), float64.
    """

    group: Group
    consumers: Sequence[ConsumerProblem]
    producers: Sequence[Tensor]
    seed: int = 0
    scores: Mapping[str, Tensor] = field(default_factory=dict)


OrderFunction = Callable[[GroupProblem], Order]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        order: how it orders.
        compensates: whether its consumers are compensated; if not, they are slices of the dense ones.
        needs_data: whether it needs a calibration.
        summary: one line.
        kinds: unit kinds that it can order.
    """

    order: OrderFunction
    compensates: bool
    needs_data: bool
    summary: str
    kinds: Collection[str]


_METHODS: dict[str, Method] = {}

WIDTH_KINDS = ("head", "neuron", "channel")


def register_method(
    name: str, *, compensates: bool = False, needs_data: bool = False, kinds: Collection[str] = WIDTH_KINDS
) -> Callable[[OrderFunction], OrderFunction]:
    """Decorator: make an order function known as a method of `prune`.

    Args:
        name: what `prune` calls it.
        compensates: give it consumers that make up for what is gone; needs a calibration, whatever `needs_data` says.
        needs_data: show it the consumers' Hessians, and whatever else the calibration has on the group.
        kinds: unit kinds that it can order: by default those made of channels, which have consumers.

    Example:
        >>> @register_method("mean-input", needs_data=True)
        ... def mean_input(problem): ...
    """

    def register(function: OrderFunction) -> OrderFunction:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        _METHODS[name] = Method(function, compensates, compensates or needs_data, summary, tuple(kinds))
        return function

    return register


def methods() -> dict[str, str]:
    """Method name -> one-line description."""
    return {name: method.summary for name, method in _METHODS.items()}


def find_method(name: str) -> Method:
    """The method called `name`; BankError lists those that exist."""
    if name.endswith(("-unstructured", "-nm")):
        pattern = '"2:4"' if name.endswith("-nm") else "0.5"
        raise BankError(
            f"`method` {name!r} zeroes single weights, which makes one static model and no levels to switch between: "
            f'use stageprune.sparsify(pipe, calibration, pattern={pattern}, method="{name.rpartition("-")[0]}"), or '
            "`stageprune sparsify`."
        )
    if name not in _METHODS:
        raise BankError(f"`method` must be one of {', '.join(_METHODS)}; got {name!r}.")
    return _METHODS[name]


@register_method("obs", compensates=True)
def obs(problem: GroupProblem) -> Order:
    """Greedy structured Optimal Brain Surgeon with compensated consumers (OBS-Diff, MosaicDiff)."""
    consumers = []
    for consumer in problem.consumers:
        consumers.append((with_bias(consumer.weight, consumer.bias), _hessian(consumer)))
    return obs_order(consumers, [consumer.columns for consumer in problem.consumers])


@register_method("wanda", needs_data=True)
def wanda(problem: GroupProblem) -> Order:
    """Largest sum of |weight| x norm of its input over a unit's consumer columns stays; not compensated (Wanda).

    The score of a weight is that of Sun et al. (arXiv 2306.11695, section 3, equation 1), summed over a whole unit.
    """
    score = torch.zeros(problem.group.size, dtype=torch.float64)
    for consumer in problem.consumers:
        norms = _energies(consumer).sqrt()
        score += (consumer.weight.double().abs().sum(0) * norms)[consumer.columns].sum(1).cpu()
    return _by_score(score)


@register_method("activation", needs_data=True)
def activation(problem: GroupProblem) -> Order:
    """Largest input energy of a unit's consumer columns stays, whatever their weights; not compensated."""
    score = torch.zeros(problem.group.size, dtype=torch.float64)
    for consumer in problem.consumers:
        score += _energies(consumer)[consumer.columns].sum(1).cpu()
    return _by_score(score)


@register_method("taylor", needs_data=True)
def taylor(problem: GroupProblem) -> Order:
    """Largest first-order change of the denoising loss stays; not compensated (Diff-Pruning)."""
    return _by_score(_scores(problem, "taylor", "taylor=0.05"))


@register_method("magnitude")
def magnitude(problem: GroupProblem) -> Order:
    """Largest L2 norm of a unit's producer rows and consumer columns stays; no data, no compensation."""
    score = torch.zeros(problem.group.size, dtype=torch.float64)
    for rows in problem.producers:
        score += rows.double().square().sum((1, 2)).cpu()
    for consumer in problem.consumers:
        score += consumer.weight.double().square().sum(0)[consumer.columns].sum(1).cpu()
    return _by_score(score)


@register_method("random", kinds=(*WIDTH_KINDS, "block"))
def random(problem: GroupProblem) -> Order:
    """A random order from the seed; no data, no compensation. The floor that any method must beat."""
    generator = torch.Generator().manual_seed(problem.seed)
    return _by_score(torch.rand(problem.group.size, generator=generator, dtype=torch.float64))


@register_method("depth", needs_data=True, kinds=("block",))
def depth(problem: GroupProblem) -> Order:
    """Whole blocks: those stay that turn what flows through them most, by 1 - cos(out, in) (Diff-ES's layerdrop)."""
    return _by_score(_scores(problem, "drift", 'kinds=("block",)'))


@register_method("depth-output", needs_data=True, kinds=("block",))
def depth_output(problem: GroupProblem) -> Order:
    """Whole blocks: those stay without which, each alone, the denoiser's output errs most."""
    return _by_score(_scores(problem, "output", 'kinds=("block",), skip_blocks=True'))


def _scores(problem: GroupProblem, statistic: str, how: str) -> Tensor:
    if statistic not in problem.scores:
        raise CalibrationError(
            f"the calibration has nothing on `{problem.group.name}` under {statistic!r}: calibrate with {how}."
        )
    return problem.scores[statistic]


def _hessian(consumer: ConsumerProblem) -> Tensor:
    assert consumer.hessian is not None  # prune() requires a calibration for methods that need data
    return consumer.hessian


def _energies(consumer: ConsumerProblem) -> Tensor:
    """Sum of x^2 of each input, shape (columns,), without the constant 1."""
    return _hessian(consumer).diagonal()[:-1]


def _by_score(score: Tensor) -> Order:
    ranked = score.sort(descending=True, stable=True)
    return Order(ranked.indices, ranked.values)
