"""Strategies side by side over several budgets: which way of making images for less serves this model best.

Those that choose steps plan last, and are told what the others chose within the same budget, and what they chose
themselves within smaller ones: they could do the same, so that nothing of it is clearly better than their choice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .. import progress
from ..errors import AllocationError
from ..host import Host, Prompt
from ..pruning import Bank
from ..runtime import applied
from ..schedule import StageSchedule, Target
from .allocate import allocate
from .allocation import STRATEGIES, Allocation
from .comparison import Comparison, Point
from .costs import TOLERANCE, UNITS, Budget
from .defaults import sampling_for
from .fitness import Fitness, Measure, fitness_of
from .joint import JumpTable, Runs, grid_points
from .mosaic import MosaicSettings
from .sampling import Sampling
from .table import ErrorTable

if TYPE_CHECKING:
    from ..evaluation.judge import Judge

logger = logging.getLogger(__name__)

FEWER_STEPS = "fewer steps"
"""Not a strategy: the dense model with as many steps as the budget pays for, spaced by the sampler."""

DEFAULT_STRATEGIES = (FEWER_STEPS, "steps", "uniform", "mosaic", "measured", "joint")
DEFAULT_TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
MOST_JUDGED = 32
"""Probes that choices are judged on, at most."""

JUDGED_APART = 1_000_000
"""Between the seeds of planning and those of judging."""


@torch.no_grad()
def compare(
    host: Host,
    bank: Bank,
    *,
    targets: Sequence[str | float] = DEFAULT_TARGETS,
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    mosaic: MosaicSettings | None = None,
    fitness: str | Fitness | Measure = "latent_mse",
    judge: Judge | None = None,
) -> Comparison:
    """Let each strategy plan under each budget, and run what it chose on seeds that none has seen.

    What levels cost is counted, or their times are measured, once for all.

    Args:
        host: the pipeline.
        bank: the levels to choose from.
        targets: budgets, as of `allocate`, all of one kind.
        strategies: of `allocate`; `fewer steps` is the dense model at the sampler's own spacing.
        prompts: as of `allocate`; up to 32 of them are also what is judged on, with other seeds.
        steps: of the dense run; those of the calibration by default.
        guidance: guidance scale; that of the calibration by default.
        seed: first seed of planning.
        batch_size: samples that run together.
        mosaic: parameters of MosaicDiff's closed form.
        fitness: what all are judged by, and `joint` and `steps` choose by, as for `search`.
        judge: what the fitnesses `frechet` and `accuracy` ask.

    Raises:
        AllocationError: no such strategy, budgets of different kinds, or nothing fits into any of them.
        FitnessError: a fitness that cannot be computed.
    """
    wanted = [Target.parse(target) for target in targets]
    known = [FEWER_STEPS, *(name for name in STRATEGIES if name != "hand")]
    if not wanted or len({target.kind for target in wanted}) > 1:
        raise AllocationError(f"`targets` must be at least one budget, all of one kind; got {list(targets)}.")
    if not strategies or set(strategies) - set(known):
        raise AllocationError(f"`strategies` must be some of {', '.join(known)}; got {list(strategies)}.")
    chosen = fitness_of(fitness, judge)
    sampling = sampling_for(
        host, bank, prompts=prompts, steps=steps, guidance=guidance, seed=seed, batch_size=batch_size, mosaic=mosaic
    )
    planner = _Planner(sampling, bank, chosen)
    choices = planner.choices(wanted, strategies)
    rows = [(target, name, choices[target, name]) for target in wanted for name in dict.fromkeys(strategies)]
    if all(choice is None for _, _, choice in rows):
        raise AllocationError(f"no strategy meets any of the budgets {', '.join(map(str, wanted))}. Ask for less.")
    judged = replace(sampling, prompts=sampling.prompts[:MOST_JUDGED], seed=seed + JUDGED_APART)
    points = grid_points(sampling.steps)
    with applied(host, bank) as pruner:
        runs = Runs(judged, pruner, points, chosen)
        found = [
            _point(runs, name, target, choice)
            for target, name, choice in progress.track(rows, "running choices")
            if choice is not None
        ]
        dense = chosen.reduce(runs.statistics(None))
    unit = UNITS[wanted[0].kind].name
    return Comparison(tuple(found), sampling.steps, points, dense, len(judged.prompts), unit, chosen.name)


@dataclass(frozen=True)
class _Choice:
    """What a strategy chose: a schedule (None is dense), its steps, and its cost over that of the dense run."""

    schedule: StageSchedule | None
    steps: int
    spent: float

    @property
    def rival(self) -> StageSchedule:
        """It as a schedule that knows its steps."""
        schedule = self.schedule or StageSchedule.uniform(0.0)
        return schedule if schedule.taus else schedule.planned_for(self.steps)


def _chooses_steps(strategy: str) -> bool:
    return strategy in STRATEGIES and STRATEGIES[strategy].stages is None


def _turn(strategy: str) -> tuple[bool, bool]:
    """When a strategy plans: after those that it is told of. `joint` does all that `steps` does, so it is the last."""
    return _chooses_steps(strategy), strategy == "joint"


def _point(runs: Runs, strategy: str, target: Target, choice: _Choice) -> Point:
    """Run a choice."""
    statistics, fitness = runs.statistics(choice.schedule, choice.steps), runs.fitness
    value, spread = fitness.reduce(statistics), fitness.standard_error(statistics)
    return Point(strategy, target.share, choice.spent, choice.steps, value, spread, choice.schedule)


def _fewer_steps(sampling: Sampling, share: float) -> _Choice:
    """As many dense steps as fit into a share of the calls, of which a solver may make more than steps (Heun: two).

    Raises:
        AllocationError: not one step fits, or the sampler cannot make as few as would.
    """
    full = len(sampling.taus)
    for steps in range(sampling.steps, 0, -1):
        try:
            calls = len(sampling.host.taus(steps))
        except ValueError as error:  # PNDM's Runge-Kutta start needs four
            raise AllocationError(f"the sampler cannot make {steps} `steps` ({error}). Ask for more.") from error
        if calls <= share * full + 1e-9:
            return _Choice(None, steps, calls / full)
    raise AllocationError(f"{share * full:.2f} dense calls do not pay for a single step. Ask for more.")


class _Planner:
    """What each strategy chooses; tables, and what levels cost, are measured once.

    Args:
        sampling: the pipeline with all prompts.
        bank: the levels to choose from.
        fitness: what steps are chosen by.
    """

    def __init__(self, sampling: Sampling, bank: Bank, fitness: Fitness) -> None:
        self.sampling, self.bank, self.fitness = sampling, bank, fitness
        self.table: ErrorTable | None = None
        self.jumps: JumpTable | None = None
        self.counted: Budget | None = None
        self.chosen: dict[tuple[Target, str], _Choice | None] = {}

    def choices(self, targets: Sequence[Target], strategies: Sequence[str]) -> dict[tuple[Target, str], _Choice | None]:
        """Of each strategy under each budget, all of one kind; None where it cannot meet it."""
        for target in sorted(targets, key=lambda each: each.share):
            for strategy in sorted(strategies, key=_turn):
                if (target, strategy) not in self.chosen:
                    self.chosen[target, strategy] = self._plan(target, strategy)
        return self.chosen

    def _plan(self, target: Target, strategy: str) -> _Choice | None:
        sampling = self.sampling
        try:
            if strategy == FEWER_STEPS:
                return _fewer_steps(sampling, target.share)
            found = self._allocate(target, strategy)
        except AllocationError as error:
            logger.warning("strategy %r at %s: %s", strategy, target, error)
            return None
        self.table, self.jumps = found.table or self.table, found.jumps or self.jumps
        steps = sampling.steps if found.schedule.taus is None else len(found.schedule.taus)
        return _Choice(found.schedule, steps, found.spent)

    def _allocate(self, target: Target, strategy: str) -> Allocation:
        sampling, steps_chosen = self.sampling, _chooses_steps(strategy)
        return allocate(
            sampling.host,
            self.bank,
            target=self._budget(target),
            strategy=strategy,
            prompts=sampling.prompts,
            steps=sampling.steps,
            guidance=sampling.guidance,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
            table=self.table if strategy == "measured" else None,
            jumps=self.jumps,
            mosaic=sampling.mosaic,
            fitness=self.fitness if steps_chosen else "latent_mse",
            rivals=[*self._rivals(target, strategy)] if steps_chosen else (),
        )

    def _budget(self, target: Target) -> Budget:
        """Strategies that plan by different measurements of the same times could not be compared."""
        if self.counted is None:
            with applied(self.sampling.host, self.bank) as pruner:
                self.counted = Budget.of(target, self.sampling, pruner)
        return replace(self.counted, target=target)

    def _rivals(self, target: Target, strategy: str) -> Iterator[StageSchedule]:
        """What others chose within this budget, and the strategy itself within smaller ones: all that is there yet."""
        for (budget, name), choice in self.chosen.items():
            told = budget == target or name == strategy
            if told and choice is not None and choice.spent <= target.share + TOLERANCE:
                yield choice.rival
