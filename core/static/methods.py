"""How single weights are chosen, and whether the others make up for them. One signature for all; a registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import BankError
from ..pruning.compensate import damp
from ..pruning.sparse import Pattern, mask_of
from ..pruning.sparse import sparsify as obs_sparsify


@dataclass(frozen=True)
class LayerProblem:
    """One layer as a method sees it, everything in float64.

    Args:
        weight: (out, columns + 1), the last column the bias.
        hessian: (columns + 1, columns + 1), not damped, the last row the constant-1 input; of a layer without bias it
            is apart from the others, so that no bias comes of it. None for methods that need no data.
        pattern: what becomes 0.
        damping: for methods that invert the Hessian, relative to its diagonal's mean.
    """

    weight: Tensor
    hessian: Tensor | None
    pattern: Pattern
    damping: float

    @property
    def moments(self) -> Tensor:
        """The Hessian of a method that was registered as needing data."""
        assert self.hessian is not None
        return self.hessian


Sparsifier = Callable[[LayerProblem], tuple[Tensor, Tensor]]
"""From a problem to weight (out, columns) with exact zeros and bias (out,)."""


@dataclass(frozen=True)
class SparseMethod:
    """A registered method: what it does, whether it needs a calibration, and one line on it."""

    solve: Sparsifier
    needs_data: bool
    summary: str


_METHODS: dict[str, SparseMethod] = {}


def register_sparsifier(name: str, *, needs_data: bool = False) -> Callable[[Sparsifier], Sparsifier]:
    """Decorator: make a function known as a method of `sparsify`.

    Args:
        name: what `sparsify` calls it.
        needs_data: show it the Hessian of the layer's inputs.
    """

    def register(function: Sparsifier) -> Sparsifier:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        _METHODS[name] = SparseMethod(function, needs_data, summary)
        return function

    return register


def sparsifiers() -> dict[str, str]:
    """Method name -> one-line description."""
    return {name: method.summary for name, method in _METHODS.items()}


def find_sparsifier(name: str) -> SparseMethod:
    """The method called `name`; BankError lists those that exist."""
    if name not in _METHODS:
        raise BankError(f"`method` must be one of {', '.join(_METHODS)}; got {name!r}.")
    return _METHODS[name]


@register_sparsifier("obs", needs_data=True)
def obs(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon column by column: the weights that stay make up for those that go (SparseGPT, OBS-Diff)."""
    return obs_sparsify(problem.weight, damp(problem.moments, problem.damping), problem.pattern)


@register_sparsifier("wanda", needs_data=True)
def wanda(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Least |weight| x norm of its input goes, as many in every row; nothing makes up for it (Wanda).

    Sun et al., arXiv 2306.11695, section 3: scores are compared within an output's own weights.
    """
    norms = problem.moments.diagonal()[:-1].sqrt()
    scores = problem.weight[:, :-1].abs() * norms
    return _cut(problem, scores.argsort(dim=1, stable=True).argsort(dim=1))  # ranks: every row gives up as many


@register_sparsifier("magnitude")
def magnitude(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Least |weight| of the layer goes; no data, nothing makes up for it."""
    return _cut(problem, problem.weight[:, :-1].abs())


def _cut(problem: LayerProblem, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the weights of least score, shape (out, columns), and leave the others."""
    weight = problem.weight[:, :-1]
    return weight.masked_fill(mask_of(scores, problem.pattern), 0), problem.weight[:, -1].clone()
