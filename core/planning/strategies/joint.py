"""Steps and levels together: how many steps, where on the noise axis, and the level of each, under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ... import progress
from ...errors import AllocationError
from ...schedule import StageSchedule
from ..allocation import Allocation, Candidate, Request, register_strategy
from ..joint import BALANCED, PAIRED, STEPS, JumpTable, Objective, Plan, Runs, grid_points, measure_jumps, plans
from ..joint.choose import nearest_path, plan_of
from ..joint.program import Path
from ..joint.refine import ROUNDS, TRIES, refine
from ..sampling import Sampling
from ..table import TableOrigin

LEAST_PROBES = 4

NEARLY = 1.25
"""Times the least error that a plan which diverges less may have."""


@register_strategy("joint", stages=None)
def joint(request: Request) -> Allocation:
    """Near the dense model's samples, and distributed like them: of the plans that end nearly as near dense samples as
    the nearest, the one that diverges least.
    """
    return _planned(_Problem(request, BALANCED), "joint", least_divergence=True)


@register_strategy("joint-paired", stages=None)
def joint_paired(request: Request) -> Allocation:
    """As near the dense model's own samples as can be."""
    return _planned(_Problem(request, PAIRED), "joint-paired")


@register_strategy("steps", stages=None)
def steps(request: Request) -> Allocation:
    """The dense model with fewer steps, where they serve best."""
    return _planned(_Problem(request, STEPS), "steps")


@dataclass(frozen=True)
class _Tried:
    """A plan and what a run showed.

    Args:
        plan: what was run.
        schedule: that runs it.
        error: squared error of the final latents, on held-out probes.
    """

    plan: Plan
    schedule: StageSchedule
    error: float


@dataclass(frozen=True)
class _Problem:
    """What is to be planned.

    Args:
        request: the arguments of an allocation.
        objectives: what plans make small.
    """

    request: Request
    objectives: Sequence[Objective]

    @property
    def dense(self) -> bool:
        """Whether only steps are chosen."""
        return all(objective.dense for objective in self.objectives)

    @property
    def points(self) -> int:
        """Of the grid."""
        return grid_points(self.request.sampling.steps)

    @cached_property
    def costs(self) -> list[float]:
        """Of a call at each level, in dense calls."""
        costs = self.request.budget.costs
        return [costs[level] / costs[0.0] for level in self.request.bank.sparsities]

    @property
    def budget(self) -> float:
        """In dense calls. Without the tolerance of levels alone: there are many ways to fill it."""
        return self.request.budget.target.share * len(self.request.sampling.taus)

    def probes(self, held_out: bool) -> Sampling:
        """The first half of the probes is for planning, the second for the choice."""
        sampling = self.request.sampling
        half = len(sampling.prompts) // 2
        return sampling.part(half, len(sampling.prompts)) if held_out else sampling.part(0, half)

    def schedule(self, plan: Plan) -> StageSchedule:
        """That runs a plan."""
        return plan.schedule(self.request.bank.edges)

    def jumps(self) -> JumpTable:
        """The request's, if they were measured with what new ones would be, or new ones."""
        sampling, known = self.request.sampling, self.request.jumps
        if known is None:
            return measure_jumps(self.probes(held_out=False), self.request.pruner, self.points)
        origin = TableOrigin.of(sampling.host, self.request.bank, sampling.steps, sampling.guidance)
        if (len(known.taus), known.origin) != (self.points, origin):
            raise AllocationError(
                "`jumps` were measured with another bank, sampler, image size, guidance or number of steps. Leave "
                "them out to measure new ones."
            )
        return known


def _planned(problem: _Problem, strategy: str, least_divergence: bool = False) -> Allocation:
    prompts = problem.request.sampling.prompts
    if len(prompts) < LEAST_PROBES:
        raise AllocationError(f"strategy {strategy!r} needs at least {LEAST_PROBES} probe prompts, got {len(prompts)}.")
    table = problem.jumps()
    tried = _try(problem, table)
    if not tried:
        raise AllocationError(
            f"`target` {problem.request.budget.target} allows {problem.budget:.2f} dense calls, and the bank's highest "
            f"level still takes {min(problem.costs):.3f} of one: not a single step fits. Ask for less."
        )
    chosen = _chosen(tried, least_divergence)
    candidates = tuple(
        Candidate(each.plan.name, each.plan.levels, each.plan.predicted, each.error, each.plan.divergence)
        for each in sorted(tried, key=lambda each: (each is not chosen, each.error))
    )
    return problem.request.planned(strategy, chosen.schedule, candidates, table)


def _try(problem: _Problem, table: JumpTable) -> list[_Tried]:
    """The best plans by each objective, small changes of one of them, and the corners, run on held-out probes."""
    found = plans(table, problem.costs, problem.budget, problem.objectives)
    corners = _corners(problem, table)
    pruner, points = problem.request.pruner, problem.points
    with progress.bar(2 * len(found) + ROUNDS * TRIES + len(corners), "running plans", "plan") as bar:
        if found:
            probes = Runs(problem.probes(held_out=False), pruner, points, lambda: bar.update(1))
            found += _refined(problem, table, found, probes)
        held_out = Runs(problem.probes(held_out=True), pruner, points, lambda: bar.update(1))
        every = [(plan, problem.schedule(plan)) for plan in (*found, *corners)]
        return [_Tried(plan, schedule, held_out.error(schedule)) for plan, schedule in every]


def _corners(problem: _Problem, table: JumpTable) -> list[Plan]:
    """What else could be done with the budget: fewer dense steps, or all steps at one level."""
    sampling, budget = problem.request.sampling, problem.budget
    own = [("fewer steps", math.floor(budget + 1e-9), 0)]
    affordable = [level for level, cost in enumerate(problem.costs) if cost * len(sampling.taus) <= budget]
    if affordable and not problem.dense:
        own.append(("one level", sampling.steps, min(affordable)))
    found = []
    for name, count, level in own:
        taus = sampling.host.taus(count) if count else []
        if taus and len(taus) == count:
            path = plan_of(table, name, nearest_path(table, taus, level))
            levels = (table.sparsities[level],) * count
            found.append(replace(path, taus=tuple(taus), levels=levels))
    return found


def _refined(problem: _Problem, table: JumpTable, found: Sequence[Plan], probes: Runs) -> list[Plan]:
    """The plan that really ends nearest, with small changes, if any is better."""

    def error_of(plan: Plan) -> float:
        error = probes.error(problem.schedule(plan))
        return error if math.isfinite(error) else math.inf

    def error_along(path: Path) -> float:
        return error_of(plan_of(table, "refined", path))

    best, levels = min(found, key=error_of), [0] if problem.dense else None
    path, _ = refine(best.path, table.final, problem.costs, problem.budget, error_along, levels)
    return [] if path == best.path else [plan_of(table, "refined", path)]


def _chosen(tried: Sequence[_Tried], least_divergence: bool) -> _Tried:
    finite = [each for each in tried if math.isfinite(each.error)]
    if not finite:
        raise AllocationError("no plan's samples are finite: the levels of this bank break the model.")
    least = min(finite, key=lambda each: each.error)
    if not least_divergence:
        return least
    near = [each for each in finite if each.error <= NEARLY * least.error]
    return min(near, key=lambda each: (each.plan.divergence, each.error))
