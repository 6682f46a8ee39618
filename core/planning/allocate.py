"""From a budget to a schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AllocationError
from ..host import Host, Prompt
from ..pruning import Bank
from ..runtime import StagePruner, applied
from ..schedule import ExecutedCost, StageSchedule, Target, executed_cost
from .best_levels import best_levels
from .probes import Probes
from .table import ErrorTable, measure_error_table

logger = logging.getLogger(__name__)

TOLERANCE = 0.005
"""How far, in shares of the dense MACs, a schedule may exceed its budget: kept counts are rounded."""


DEFAULT_PROBES = 64
"""How many of the calibration's prompts are used if none are given; a user's own are all used."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that was tried, its predicted error and the one measured on held-out seeds."""

    name: str
    levels: tuple[float, ...]
    predicted: float
    measured: float


@dataclass(frozen=True)
class Allocation:
    """What `allocate` found.

    Args:
        schedule: the schedule.
        strategy: the strategy that chose it.
        target: the budget.
        executed: its cost over the sampler's steps.
        table: the error table (`measured` only).
        candidates: what was tried on held-out seeds, best first (`measured` only).
    """

    schedule: StageSchedule
    strategy: str
    target: Target
    executed: ExecutedCost
    table: ErrorTable | None = None
    candidates: tuple[Candidate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and reports."""
        return {
            "schedule": self.schedule.to_dict(),
            "strategy": self.strategy,
            "target": self.target.value,
            "macs_share": self.executed.share,
            "calls": self.executed.calls,
            "table": self.table.to_dict() if self.table else None,
            "candidates": [candidate.__dict__ for candidate in self.candidates],
        }

    def __str__(self) -> str:
        lines = [
            str(self.schedule),
            f"  target {self.target.value:.3f} of the dense MACs, executes {self.executed.share:.3f}",
        ]
        for candidate in self.candidates:
            levels = ", ".join(f"{level:g}" for level in candidate.levels)
            lines.append(
                f"  {candidate.name:<12} [{levels}]: predicted {candidate.predicted:.2e}, "
                f"held-out {candidate.measured:.2e}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Request:
    """The arguments of `allocate`, as a strategy gets them.

    Args:
        host: the pipeline.
        bank: the levels to choose from.
        target: the budget.
        stages: the stage partition; its levels do not matter.
        prompts: probe prompts.
        steps: sampling steps.
        guidance: guidance scale.
        seed: first probe seed; held-out seeds follow the probes'.
        batch_size: probes that run together.
        table: an error table of the same stages, levels and steps, if there is one already.
    """

    host: Host
    bank: Bank
    target: Target
    stages: StageSchedule
    prompts: Sequence[Prompt]
    steps: int
    guidance: float
    seed: int
    batch_size: int
    table: ErrorTable | None = None


Strategy = Callable[[Request, StagePruner], Allocation]
STRATEGIES: dict[str, Strategy] = {}


def register_strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Decorator: make a strategy known to `allocate`."""

    def register(function: Strategy) -> Strategy:
        STRATEGIES[name] = function
        return function

    return register


@torch.no_grad()
def allocate(
    host: Host,
    bank: Bank,
    *,
    target: str | float = "macs:0.67",
    strategy: str = "measured",
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    stages: int | Sequence[float] | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    table: ErrorTable | None = None,
) -> Allocation:
    """Choose a level for each stage under a budget of executed MACs.

    Args:
        host: the pipeline.
        bank: the levels to choose from.
        target: `macs:0.67` is 0.67 of the MACs that the dense model would execute over the same steps.
        strategy: `uniform`, one level everywhere; or `measured`, exact dynamic programming over a measured error table,
            whose best choices are then run on held-out seeds.
        prompts: probe prompts; half fill the error table, half are held out. The calibration's first 64 by default.
        steps: sampling steps; those of the calibration by default.
        guidance: guidance scale; that of the calibration by default.
        stages: number of equal stages (5, or fewer if the sampler has fewer steps), or inner boundaries in tau.
        seed: first probe seed; calibration seeds start at 0, so that the default never meets them.
        batch_size: probes that run together.
        table: `Allocation.table` of an earlier call with the same bank, stages and steps, to save measuring it again
            for another target.

    Raises:
        AllocationError: no level is cheap enough, or a stage is visited by no step.
    """
    made: Mapping[str, Any] = bank.provenance.get("calibration") or {}
    steps = steps if steps is not None else made.get("steps", 25)
    guidance = guidance if guidance is not None else made.get("guidance", host.default_guidance)
    prompts = list(prompts if prompts is not None else made.get("prompts", [])[:DEFAULT_PROBES])
    budget = Target.parse(target)
    if steps < 1:
        raise AllocationError(f"`steps` must be at least 1, got {steps}.")
    if strategy not in STRATEGIES:
        raise AllocationError(f"`strategy` must be one of {', '.join(STRATEGIES)}; got {strategy!r}.")
    partition = _partition(stages, bank, steps)
    with applied(host, bank) as pruner:
        request = Request(host, bank, budget, partition, prompts, steps, guidance, seed, batch_size, table)
        return STRATEGIES[strategy](request, pruner)


@register_strategy("uniform")
def uniform(request: Request, pruner: StagePruner) -> Allocation:
    """The one level, everywhere, that spends most of the budget."""
    taus, macs = request.host.taus(request.steps), request.bank.macs(pruner.cost)
    level = uniform_level(request.bank, macs, request.target)
    schedule = request.stages.with_levels([level] * len(request.stages.stages))
    return Allocation(schedule, "uniform", request.target, executed_cost(schedule, taus, macs))


@register_strategy("measured")
def measured(request: Request, pruner: StagePruner) -> Allocation:
    """Error table, exact choice under the budget, then real runs of the best few on held-out seeds."""
    if len(request.prompts) < 4:
        raise AllocationError(f"strategy 'measured' needs at least 4 probe prompts, got {len(request.prompts)}.")
    half = len(request.prompts) // 2
    taus, macs = request.host.taus(request.steps), request.bank.macs(pruner.cost)
    uniform_choice = uniform_level(request.bank, macs, request.target)
    table = _table(request, pruner, half)
    choices = _choices(request, table, macs, taus)
    choices.setdefault("uniform", tuple([uniform_choice] * len(request.stages.stages)))
    held_out = _probes(request, pruner, half, len(request.prompts))
    candidates = sorted(
        (
            Candidate(name, levels, table.predict(levels), float(held_out.errors(levels).mean()))
            for name, levels in choices.items()
        ),
        key=lambda candidate: math.inf if math.isnan(candidate.measured) else candidate.measured,
    )
    schedule = request.stages.with_levels(candidates[0].levels)
    cost = executed_cost(schedule, taus, macs)
    return Allocation(schedule, "measured", request.target, cost, table, tuple(candidates))


def uniform_level(bank: Bank, macs: Mapping[float, int], target: Target) -> float:
    """Sparsity of the dearest level within the budget."""
    affordable = [level for level in bank.sparsities if macs[level] <= (target.value + TOLERANCE) * macs[0.0]]
    if not affordable:
        least = min(macs.values()) / macs[0.0]
        raise AllocationError(
            f"`target` {target.value:g} cannot be met: the bank's highest level still executes {least:.3f} of the "
            "dense MACs. Prune with higher `levels`, or ask for less."
        )
    return min(affordable)


def _choices(
    request: Request, table: ErrorTable, macs: Mapping[float, int], taus: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    """Level choices worth a real run.

    Stage errors may add up as squares (independent) or as lengths (all pushing one way); the truth lies between, so the
    best of both models are tried.
    """
    calls = executed_cost(table_schedule(table), taus, macs).calls
    costs = [[count * macs[sparsity] for sparsity in table.sparsities] for count in calls]
    budget = int((request.target.value + TOLERANCE) * len(taus) * macs[0.0])
    finite = [[math.inf if math.isnan(error) else error for error in row] for row in table.errors]
    models = {"squares": finite, "lengths": [[error**0.5 for error in row] for row in finite]}
    choices: dict[str, tuple[float, ...]] = {}
    for model, errors in models.items():
        for rank, picked in enumerate(best_levels(costs, errors, budget, count=2)):
            levels = tuple(table.sparsities[level] for level in picked)
            if levels not in choices.values():
                choices[f"{model} {rank + 1}"] = levels
    return choices


def _table(request: Request, pruner: StagePruner, half: int) -> ErrorTable:
    """The request's table if it fits, or a new one."""
    if request.table is None:
        probes = _probes(request, pruner, 0, half)
        return measure_error_table(probes, request.bank.sparsities, request.steps)
    wanted = (tuple(request.stages.edges), request.bank.sparsities, request.steps)
    found = (request.table.edges, request.table.sparsities, request.table.steps)
    if wanted != found:
        raise AllocationError(f"`table` has (edges, levels, steps) {found}, this allocation needs {wanted}.")
    return request.table


def table_schedule(table: ErrorTable) -> StageSchedule:
    """The table's stages, dense."""
    return StageSchedule.from_levels([0.0] * len(table.errors), table.edges[1:-1])


def _probes(request: Request, pruner: StagePruner, begin: int, end: int) -> Probes:
    seeds = list(range(request.seed + begin, request.seed + end))
    return Probes(
        request.host,
        pruner,
        request.stages,
        request.prompts[begin:end],
        seeds,
        steps=request.steps,
        guidance=request.guidance,
        batch_size=request.batch_size,
    )


def _partition(stages: int | Sequence[float] | None, bank: Bank, steps: int) -> StageSchedule:
    """The stages to allocate over; those of a bank that distinguishes stages, by default."""
    if stages is None:
        if bank.stages > 1:
            return StageSchedule.from_levels([0.0] * bank.stages, bank.edges[1:-1])
        stages = min(5, steps)
    if isinstance(stages, int):
        if stages < 1:
            raise AllocationError(f"`stages` must be at least 1, got {stages}.")
        return StageSchedule.from_levels([0.0] * stages)
    return StageSchedule.from_levels([0.0] * (len(stages) + 1), list(stages))
