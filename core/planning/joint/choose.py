"""Plans that are worth a real run: the best ways down the noise axis by several prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...schedule import StageSchedule
from .jumps import JumpTable
from .program import Path, best_path


@dataclass(frozen=True)
class Objective:
    """What a plan makes small, and with which levels.

    Args:
        name: for the list of candidates.
        length: errors of jumps add up as lengths (all one way), not as squares (independent).
        first: the first level that may be used, by its number.
        last: the last one.
    """

    name: str
    length: bool = False
    first: int = 0
    last: int | None = None


def objectives(sparsities: Sequence[float], dense: bool = False) -> tuple[Objective, ...]:
    """By which plans are made that are worth a run.

    Where high levels only are allowed, the same budget pays for more steps: such plans end further from the dense
    model's own samples, and may still be nearer to its law.

    Args:
        sparsities: the levels.
        dense: at the dense level only: optimised steps.
    """
    last = 0 if dense else None
    both = (Objective("squares", last=last), Objective("lengths", length=True, last=last))
    if dense:
        return both
    steps = tuple(Objective(f"dense, {each.name}", each.length, last=0) for each in both)
    pruned = (Objective(f"at least {level:g}", first=number) for number, level in enumerate(sparsities) if number)
    return (*both, *steps, *pruned)


@dataclass(frozen=True)
class Plan:
    """Steps and their levels.

    Args:
        name: of the objective.
        taus: noise level of each call, falling.
        levels: its sparsity.
        predicted: squared error of the final latents if those of the jumps are independent.
        path: over the grid.
    """

    name: str
    taus: tuple[float, ...]
    levels: tuple[float, ...]
    predicted: float
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


def plans(table: JumpTable, costs: Sequence[float], budget: float, objectives: Sequence[Objective]) -> list[Plan]:
    """The best plan by each objective, those alike once; none where not even the cheapest level is affordable.

    Args:
        table: prices of jumps.
        costs: of a call at each level, in dense calls.
        budget: in dense calls.
        objectives: what to make small.
    """
    found: dict[Path, Plan] = {}
    for objective in objectives:
        prices = torch.full_like(table.final, torch.inf)
        allowed = slice(objective.first, None if objective.last is None else objective.last + 1)
        prices[:, :, allowed] = (table.final.sqrt() if objective.length else table.final)[:, :, allowed]
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
        float(sum(table.final[jump] for jump in path)),
        path,
    )


def nearest_path(table: JumpTable, taus: Sequence[float], levels: Sequence[int]) -> Path:
    """The path over the grid points nearest to these noise levels, each at its level. It begins where the grid does, as
    that is where the noise is, in place of the list's first: it makes no call more.
    """
    points = torch.tensor(table.taus)
    calls = {0: levels[0]}
    for tau, level in zip(taus[1:], levels[1:], strict=True):
        calls.setdefault(int((points - tau).abs().argmin()), level)
    ends = [*sorted(calls)[1:], len(points)]
    return tuple((here, there, calls[here]) for here, there in zip(sorted(calls), ends, strict=True))
