"""What `ablations.py` changes that the engine has no option for, because it did not help or is another's way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common import ROOT, Subject
from stageprune.core.calibration import Calibration
from stageprune.core.calibration.hessian import HessianRecorder
from stageprune.core.pruning.compensate import with_bias
from stageprune.core.pruning.methods import GroupProblem, register_method
from stageprune.core.pruning.obs import Order, obs_order
from stageprune.core.runtime import StagePruner
from stageprune.core.schedule import StageSchedule

sys.path.insert(0, str(ROOT / "tests"))
from plain import _State

FUSION = 60
"""k of Reciprocal Rank Fusion."""


def unbiased(calibration: Calibration) -> Calibration:
    """Hessians without what the constant-1 input has to do with the others: biases stay what they are."""
    hessians = {path: table.clone() for path, table in calibration.hessians.items()}
    for table in hessians.values():
        table[:, -1, :-1] = 0
        table[:, :-1, -1] = 0
    return replace(calibration, hessians=hessians)


@contextmanager
def guided_rows(demo: str) -> Iterator[None]:
    """Rows count by the square of what guidance multiplies their pass with: g if conditional, g - 1 if not."""
    guidance = Subject(demo).recipe.guidance
    scales = torch.tensor([guidance, guidance - 1])
    scales = (scales if demo == "dit-digits" else scales.flip(0)) / scales.square().mean().sqrt()
    plain = HessianRecorder._add_rows

    def weighted(recorder: HessianRecorder, path: str, rows: Tensor) -> None:
        alpha = recorder.alpha
        for half, scale in zip(rows.chunk(2), scales, strict=True):
            recorder.alpha = alpha * float(scale) ** 2
            plain(recorder, path, half)
        recorder.alpha = alpha

    HessianRecorder._add_rows = weighted  # type: ignore[method-assign]
    try:
        yield
    finally:
        HessianRecorder._add_rows = plain  # type: ignore[method-assign]


@contextmanager
def rounded_rows(digits: int) -> Iterator[None]:
    """Inputs rounded to so many binary digits before they are multiplied: 11 in TF32, 8 in bf16; sums stay float32."""
    plain = HessianRecorder._add_rows

    def rounded(recorder: HessianRecorder, path: str, rows: Tensor) -> None:
        mantissa, exponent = torch.frexp(rows)
        plain(recorder, path, torch.ldexp((mantissa * 2**digits).round(), exponent - digits))

    HessianRecorder._add_rows = rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        HessianRecorder._add_rows = plain  # type: ignore[method-assign]


@contextmanager
def corrected_output(demo: Subject, pruner: StagePruner, level: float, calibration: Calibration) -> Iterator[None]:
    """A scale and a shift of each output channel in each of five stages, fitted on dense trajectories."""
    stages, denoiser, reader = StageSchedule.from_levels([0.0] * 5), demo.host.denoiser, demo.host.tau_reader
    made = calibration.provenance
    sums: dict[int, Tensor] = {}
    again = False

    def fit(_: Any, args: Any, kwargs: Any, result: Any) -> None:
        nonlocal again
        if again:
            return
        again = True
        pruner.schedule = StageSchedule.uniform(level)
        pruned = denoiser(*args, **kwargs)[0]
        pruner.schedule = StageSchedule.uniform(0.0)
        again = False
        x, y = (_by_channel(each).double() for each in (pruned, result[0]))
        one = torch.ones_like(x)
        part = torch.stack([(x * x).sum(1), x.sum(1), one.sum(1), (x * y).sum(1), y.sum(1)])
        stage = stages.stage_of(reader(args, kwargs))
        sums[stage] = sums.get(stage, 0) + part

    prompts = made["prompts"][:16]
    pruner.schedule = StageSchedule.uniform(0.0)
    hook = denoiser.register_forward_hook(fit, with_kwargs=True)
    state = demo.host.start(range(made["seed"], made["seed"] + len(prompts)), made["steps"])
    demo.host.advance(state, demo.host.encode(prompts), made["guidance"], len(demo.host.taus(made["steps"])))
    hook.remove()
    fitted = {stage: _line(part) for stage, part in sums.items()}

    def correct(_: Any, args: Any, kwargs: Any, result: Any) -> Any:
        scale, shift = fitted[stages.stage_of(reader(args, kwargs))]
        output = result[0]
        if output.dim() == 3:  # FLUX's tokens: channels last
            better = output * scale.to(output) + shift.to(output)
        else:
            better = output * scale.to(output)[:, None, None] + shift.to(output)[:, None, None]
        if isinstance(result, tuple):
            return (better, *result[1:])
        return type(result)(better)

    hook = denoiser.register_forward_hook(correct, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _by_channel(output: Tensor) -> Tensor:
    """(channels, everything else)."""
    return output.flatten(0, 1).T if output.dim() == 3 else output.movedim(1, 0).flatten(1)


def _line(part: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares y = scale x + shift, channel by channel."""
    xx, x, n, xy, y = part
    scale = (n * xy - x * y) / (n * xx - x * x)
    return scale, (y - scale * x) / n


@register_method("obs-diagonal", compensates=True)
def obs_diagonal(problem: GroupProblem) -> Order:
    """OBS by the score of OBS-Diff's code: W^2 over the squared Cholesky diagonal of a unit's block of H^-1, summed."""
    return _greedy(problem, _diagonal_losses, sum)


@register_method("obs-normalised", compensates=True)
def obs_normalised(problem: GroupProblem) -> Order:
    """OBS with the losses of several consumers over the energy of each one's output."""
    consumers = []
    for consumer in problem.consumers:
        weight = with_bias(consumer.weight, consumer.bias)
        energy = torch.einsum("oi,ij,oj->", weight, consumer.hessian, weight)
        consumers.append((weight / energy.sqrt(), consumer.hessian))
    return obs_order(consumers, [consumer.columns for consumer in problem.consumers])


@register_method("obs-fused-ranks", compensates=True)
def obs_fused_ranks(problem: GroupProblem) -> Order:
    """OBS with the ranks of several consumers' losses fused (Reciprocal Rank Fusion), as OBS-Diff does."""
    if len(problem.consumers) == 1:
        return _greedy(problem, _State.losses, sum)

    def fused(losses: Sequence[Tensor]) -> Tensor:
        return -sum(1 / (FUSION + 1 + each.argsort().argsort()) for each in losses)  # type: ignore[return-value]

    return _greedy(problem, _State.losses, fused)


def _diagonal_losses(state: _State) -> Tensor:
    blocks = state.inverse[state.columns[:, :, None], state.columns[:, None, :]]
    weights = state.weight[:, state.columns].square().sum(0)  # (units, width)
    return (weights / torch.linalg.cholesky(blocks).diagonal(dim1=1, dim2=2).square()).sum(1)


def _greedy(
    problem: GroupProblem, losses_of: Callable[[_State], Tensor], fuse: Callable[[Sequence[Tensor]], Any]
) -> Order:
    """The plain greedy loop with other scores."""
    states = [_State(with_bias(c.weight, c.bias), c.hessian, c.columns) for c in problem.consumers]
    gone = torch.zeros(problem.group.size, dtype=torch.bool)
    removed = []
    for _ in range(problem.group.size):
        losses = [losses_of(state) for state in states]
        for each in losses:
            each[gone] = torch.inf
        loss = fuse(losses)
        loss[gone] = torch.inf
        unit = int(loss.argmin())
        removed.append(unit)
        gone[unit] = True
        for state in states:
            state.remove(unit)
    return Order(torch.tensor(removed[::-1]), torch.zeros(len(removed), dtype=torch.float64))
