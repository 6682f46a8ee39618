"""What a strategy is given, what it returns, and which strategies there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..pruning import Bank
from ..runtime import StagePruner
from ..schedule import ExecutedCost, StageSchedule, Target, executed_calls, executed_cost
from .costs import UNITS, Budget
from .fitness import Fitness, fitness_of
from .joint.jumps import JumpTable
from .partitions import Stages
from .sampling import Sampling
from .table import ErrorTable


@dataclass(frozen=True)
class Candidate:
    """A schedule that was tried.

    Args:
        name: what chose it.
        levels: of its stages; of its steps where these are chosen too.
        predicted: its predicted error; None of a rival, which no table tells of.
        measured: its error on held-out seeds, or its fitness.
        final: the same on fresh seeds (of `measured`: on those and the held-out ones), if it was run once more.
    """

    name: str
    levels: tuple[float, ...]
    predicted: float | None
    measured: float
    final: float | None = None


@dataclass(frozen=True)
class Allocation:
    """What `allocate` found.

    Args:
        schedule: the schedule.
        strategy: the strategy that chose it.
        target: the budget.
        executed: its MACs over the sampler's steps.
        spent: its cost over the dense one, in the target's unit: MACs, measured time or units.
        table: the error table (`measured` only).
        candidates: what was tried on held-out seeds, the choice first (`measured`, and where steps are chosen).
        jumps: the prices of jumps (where steps are chosen).
    """

    schedule: StageSchedule
    strategy: str
    target: Target
    executed: ExecutedCost
    spent: float
    table: ErrorTable | None = None
    candidates: tuple[Candidate, ...] = ()
    jumps: JumpTable | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and reports."""
        return {
            "schedule": self.schedule.to_dict(),
            "strategy": self.strategy,
            "target": self.target.value,
            "target_kind": self.target.kind,
            "spent": self.spent,
            "macs_share": self.executed.share,
            "calls": self.executed.calls,
            "table": self.table.to_dict() if self.table else None,
            "candidates": [candidate.__dict__ for candidate in self.candidates],
        }

    def __str__(self) -> str:
        unit, macs = UNITS[self.target.kind], UNITS["macs"]
        budget = f"  target {self.target.share:.3f} of the dense {unit.name}, {unit.verb} {self.spent:.3f}"
        if unit != macs:
            budget += f" ({self.target}; {macs.verb} {self.executed.share:.3f} of the dense {macs.name})"
        lines = [str(self.schedule), budget]
        for candidate in self.candidates:
            levels = ", ".join(f"{level:g}" for level in candidate.levels)
            predicted = "" if candidate.predicted is None else f"predicted {candidate.predicted:.2e}, "
            final = "" if candidate.final is None else f", in the end {candidate.final:.2e}"
            lines.append(f"  {candidate.name:<12} [{levels}]: {predicted}held-out {candidate.measured:.2e}{final}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Request:
    """The arguments of `allocate`, as a strategy gets them.

    Args:
        sampling: the pipeline with its prompts, steps and guidance.
        bank: the levels to choose from.
        budget: the target, and what a call costs at each level.
        stages: the stage partition, every stage visited by some step; its levels are those given by hand, or dense.
        pruner: the bank on the pipeline's denoiser, dense, every level resident; to be left so.
        table: an error table of the same stages, levels and sampling, if there is one already.
        jumps: prices of jumps of the same levels and sampling, if they are there already.
        fitness: what plans of steps are chosen by.
        rivals: schedules with steps, within the budget, that a plan of steps must not be worse than.
    """

    sampling: Sampling
    bank: Bank
    budget: Budget
    stages: StageSchedule
    pruner: StagePruner
    table: ErrorTable | None = None
    jumps: JumpTable | None = None
    fitness: Fitness = field(default_factory=lambda: fitness_of("latent_mse"))
    rivals: tuple[StageSchedule, ...] = ()

    @property
    def calls(self) -> tuple[int, ...]:
        """Denoiser calls of each stage."""
        return executed_calls(self.stages, self.sampling.taus)

    @property
    def limit(self) -> int:
        """Largest cost of all calls, in the budget's unit."""
        return self.budget.limit(len(self.sampling.taus))

    def allocation(
        self,
        strategy: str,
        levels: Sequence[float],
        table: ErrorTable | None = None,
        candidates: tuple[Candidate, ...] = (),
    ) -> Allocation:
        """The result that runs the stages at `levels`."""
        schedule, taus = self.stages.with_levels(levels).planned_for(self.sampling.steps), self.sampling.taus
        executed = executed_cost(schedule, taus, self.bank.macs(self.pruner.cost))
        spent = self.budget.share(schedule, taus)
        return Allocation(schedule, strategy, self.budget.target, executed, spent, table, candidates)

    def planned(
        self, strategy: str, schedule: StageSchedule, candidates: tuple[Candidate, ...], jumps: JumpTable
    ) -> Allocation:
        """The result that runs the steps which `schedule` lists, its costs over those of the sampler's own."""
        taus, dense = schedule.taus or (), len(self.sampling.taus)
        executed = executed_cost(schedule, taus, self.bank.macs(self.pruner.cost), dense)
        spent = self.budget.share(schedule, taus, dense)
        schedule = schedule.planned_for(self.sampling.steps)
        return Allocation(schedule, strategy, self.budget.target, executed, spent, None, candidates, jumps)


Strategy = Callable[[Request], Allocation]


@dataclass(frozen=True)
class Entry:
    """A registered strategy.

    Args:
        run: the strategy.
        stages: the partition that it works on unless another is asked for; None if it chooses steps, and makes stages
            around them.
    """

    run: Strategy
    stages: Stages | None


STRATEGIES: dict[str, Entry] = {}


def register_strategy(name: str, stages: Stages | None = "equal-tau") -> Callable[[Strategy], Strategy]:
    """Decorator: make a strategy known to `allocate`.

    Args:
        name: as users give it.
        stages: the partition that it works on by default; None if it chooses steps.
    """

    def register(function: Strategy) -> Strategy:
        STRATEGIES[name] = Entry(function, stages)
        return function

    return register
