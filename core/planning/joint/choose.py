"""Plans that are worth a real run: the best ways down the noise axis by several prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...schedule import StageSchedule
from .jumps import JumpTable
from .program import Path, best_path


@dataclass(frozen=True)
class Objective:
    """What a plan makes small: an error of the final latents plus a share of divergence, each over its least.

    Args:
        name: for the list of candidates.
        length: errors add up as lengths (all one way), not as squares (independent).
        divergence: how much divergence counts beside the error.
        dense: at the dense level only: optimised steps.
    """

    name: str
    length: bool = False
    divergence: float = 0.0
    dense: bool = False


PAIRED = (
    Objective("squares"),
    Objective("lengths", length=True),
    Objective("dense, squares", dense=True),
    Objective("dense, lengths", length=True, dense=True),
)
"""For samples near the dense model's own."""

STEPS = tuple(objective for objective in PAIRED if objective.dense)
"""For the dense model with fewer steps at better places."""

BALANCED = (
    *PAIRED,
    Objective("squares + divergence / 8", divergence=0.125),
    Objective("squares + divergence", divergence=1.0),
    Objective("lengths + divergence / 2", length=True, divergence=0.5),
    Objective("lengths + divergence", length=True, divergence=1.0),
)
"""For these, and for samples that are distributed as the dense model's are."""


@dataclass(frozen=True)
class Plan:
    """Steps and their levels.

    Args:
        name: of the objective.
        taus: noise level of each call, falling.
        levels: its sparsity.
        predicted: squared error of the final latents if those of the jumps are independent.
        divergence: see `JumpTable`.
        path: over the grid.
    """

    name: str
    taus: tuple[float, ...]
    levels: tuple[float, ...]
    predicted: float
    divergence: float
    path: Path = ()

    def schedule(self, edges: Sequence[float] = ()) -> StageSchedule:
        """Stages in which every noise level runs what the nearest call runs, with the steps.

        Args:
            edges: boundaries that must be there too: those of a bank that distinguishes stages.
        """
        changes = [
            (self.taus[place] + self.taus[place + 1]) / 2
            for place, (level, after) in enumerate(pairwise(self.levels))
            if level != after
        ]
        inner = sorted({*changes, *(edge for edge in edges if 0 < edge < 1)}, reverse=True)
        middles = [(high + low) / 2 for high, low in pairwise([1.0, *inner, 0.0])]
        return StageSchedule.from_levels([self._level_near(tau) for tau in middles], inner).with_taus(self.taus)

    def _level_near(self, tau: float) -> float:
        return min(zip(self.taus, self.levels, strict=True), key=lambda call: abs(call[0] - tau))[1]


def plans(
    table: JumpTable, costs: Sequence[float], budget: float, objectives: Sequence[Objective] = BALANCED
) -> list[Plan]:
    """The best plan by each objective, those alike once; none where not even the cheapest level is affordable.

    Args:
        table: prices of jumps.
        costs: of a call at each level, in dense calls.
        budget: in dense calls.
        objectives: what to make small.
    """
    least: dict[bool, Tensor] = {}
    found: dict[Path, Plan] = {}
    apart = best_path(table.divergence, costs, budget)
    for objective in objectives:
        errors = table.final.sqrt() if objective.length else table.final
        if objective.length not in least:
            least[objective.length] = _total(errors, best_path(errors, costs, budget))
        prices = errors
        if objective.divergence:
            share = objective.divergence / _total(table.divergence, apart)
            prices = errors / least[objective.length] + share * table.divergence
        if objective.dense:
            prices = prices.clone()
            prices[:, :, 1:] = torch.inf
        path = best_path(prices, costs, budget)
        if path is not None and path not in found:
            found[path] = plan_of(table, objective.name, path)
    return list(found.values())


def plan_of(table: JumpTable, name: str, path: Path) -> Plan:
    """What the table says of a path."""
    return Plan(
        name,
        tuple(table.taus[here] for here, _, _ in path),
        tuple(table.sparsities[level] for _, _, level in path),
        float(_total(table.final, path)),
        float(_total(table.divergence, path)),
        path,
    )


def nearest_path(table: JumpTable, taus: Sequence[float], level: int) -> Path:
    """The path over the grid points nearest to these noise levels, at one level."""
    points = torch.tensor(table.taus)
    places = sorted({int((points - tau).abs().argmin()) for tau in taus} | {0})
    return tuple((here, there, level) for here, there in zip(places, [*places[1:], len(points)], strict=True))


def _total(prices: Tensor, path: Path | None) -> Tensor:
    """Price of a path; a tiny number rather than nothing, to divide by."""
    total = sum((prices[jump] for jump in path or ()), torch.zeros((), dtype=torch.float64))
    return total.clamp(min=1e-30)
