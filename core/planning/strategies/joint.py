"""Steps and levels together: how many steps, where on the noise axis, and the level of each, under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ... import progress
from ...errors import AllocationError
from ...schedule import StageSchedule
from ..allocation import Allocation, Candidate, Request, register_strategy
from ..costs import TOLERANCE
from ..joint import BALANCED, PAIRED, STEPS, JumpTable, Plan, measure_jumps, plans
from ..joint.choose import nearest_path, plan_of
from ..joint.refine import ROUNDS, TRIES, refine
from ..joint.runs import Runs
from ..table import TableOrigin

LEAST_POINTS = 40
"""Noise levels of the grid, at least; a multiple of the sampler's own steps."""

OBJECTIVES = {"joint": BALANCED, "joint-paired": PAIRED, "steps": STEPS}


@dataclass(frozen=True)
class _Tried:
    """A plan on its way to the choice.

    Args:
        plan: what is run.
        schedule: that runs it.
        corner: it is the sampler's own spacing: dense with fewer steps, or one level everywhere.
        error: squared error of the final latents, on held-out probes.
    """

    plan: Plan
    schedule: StageSchedule
    corner: bool
    error: float = math.nan


@register_strategy("joint", stages=None)
def joint(request: Request) -> Allocation:
    """Near the dense model's samples, and distributed like them: of the plans that end no further from dense samples
    than fewer dense steps and one level everywhere do, the one that diverges least.
    """
    return _planned(request, "joint")


@register_strategy("joint-paired", stages=None)
def joint_paired(request: Request) -> Allocation:
    """As near the dense model's own samples as can be."""
    return _planned(request, "joint-paired")


@register_strategy("steps", stages=None)
def steps(request: Request) -> Allocation:
    """The dense model with fewer steps, where they serve best."""
    return _planned(request, "steps")


def _planned(request: Request, strategy: str) -> Allocation:
    sampling = request.sampling
    if len(sampling.prompts) < 4:
        raise AllocationError(f"strategy {strategy!r} needs at least 4 probe prompts, got {len(sampling.prompts)}.")
    half = len(sampling.prompts) // 2
    points = sampling.steps * math.ceil(LEAST_POINTS / sampling.steps)
    table = request.jumps or measure_jumps(sampling.part(0, half), request.pruner, points)
    _check_jumps(table, request, points)
    costs = [request.budget.costs[level] / request.budget.costs[0.0] for level in table.sparsities]
    budget = (request.budget.target.share + TOLERANCE) * len(sampling.taus)
    objectives = OBJECTIVES[strategy]
    tried = _tried(request, table, points, plans(table, costs, budget, objectives), costs, budget, objectives is STEPS)
    if not tried:
        raise AllocationError(
            f"`target` {request.budget.target} allows {budget:.2f} dense calls, and the bank's highest level still "
            f"takes {min(costs):.3f} of one: not a single step fits. Ask for less."
        )
    chosen = _chosen(tried, paired=strategy != "joint")
    candidates = tuple(
        Candidate(each.plan.name, each.plan.levels, each.plan.predicted, each.error, each.plan.divergence)
        for each in sorted(tried, key=lambda each: (each is not chosen, each.error))
    )
    return request.planned(strategy, chosen.schedule, candidates, table)


def _check_jumps(table: JumpTable, request: Request, points: int) -> None:
    """AllocationError if the table was measured with anything else than a new one would be now."""
    sampling = request.sampling
    wanted = (points, TableOrigin.of(sampling.host, request.bank, sampling.steps, sampling.guidance))
    if (len(table.taus), table.origin) != wanted:
        raise AllocationError(
            "`jumps` were measured with another bank, sampler, image size, guidance or number of steps. Leave them "
            "out to measure new ones."
        )


def _tried(
    request: Request,
    table: JumpTable,
    points: int,
    found: list[Plan],
    costs: Sequence[float],
    budget: float,
    dense: bool,
) -> list[_Tried]:
    """The plans, small changes of the best of them, and the corners, run on held-out probes; none pruned if `dense`."""
    sampling, edges = request.sampling, request.bank.edges
    half, corners = len(sampling.prompts) // 2, _corners(request, table, costs, budget)
    corners = [corner for corner in corners if not (dense and any(corner.plan.levels))]
    with progress.bar(2 * len(found) + ROUNDS * TRIES + len(corners), "running plans", "plan") as bar:
        if found:
            probes = Runs(sampling.part(0, half), request.pruner, points, lambda: bar.update(1))
            found = [*found, *_refined(table, found, probes, edges, costs, budget, [0] if dense else None)]
        held_out = Runs(sampling.part(half, len(sampling.prompts)), request.pruner, points, lambda: bar.update(1))
        every = [*(_Tried(plan, plan.schedule(edges), corner=False) for plan in found), *corners]
        return [replace(each, error=held_out.error(each.schedule)) for each in every]


def _refined(
    table: JumpTable,
    found: Sequence[Plan],
    probes: Runs,
    edges: Sequence[float],
    costs: Sequence[float],
    budget: float,
    levels: Sequence[int] | None,
) -> list[Plan]:
    """The plan that really ends nearest, with small changes, if any is better."""

    def error_of(plan: Plan) -> float:
        error = probes.error(plan.schedule(edges))
        return error if math.isfinite(error) else math.inf

    best = min(found, key=error_of)
    path, _ = refine(
        best.path, table.final, costs, budget, lambda path: error_of(plan_of(table, "refined", path)), levels
    )
    return [] if path == best.path else [plan_of(table, "refined", path)]


def _corners(request: Request, table: JumpTable, costs: Sequence[float], budget: float) -> list[_Tried]:
    """What else could be done with the budget: fewer dense steps, or all steps at one level."""
    host, edges, found = request.sampling.host, request.bank.edges, []
    own = [("fewer steps", math.floor(budget), 0)]
    affordable = [level for level, cost in enumerate(costs) if cost * len(request.sampling.taus) <= budget]
    own += [("one level", request.sampling.steps, min(affordable))] if affordable else []
    for name, steps, level in own:
        taus = host.taus(steps) if steps else []
        if taus and len(taus) == steps:
            path = plan_of(table, name, nearest_path(table, taus, level))
            plan = Plan(name, tuple(taus), (table.sparsities[level],) * steps, path.predicted, path.divergence)
            found.append(_Tried(plan, plan.schedule(edges), corner=True))
    return found


def _chosen(tried: Sequence[_Tried], paired: bool) -> _Tried:
    finite = [each for each in tried if math.isfinite(each.error)]
    if not finite:
        raise AllocationError("no plan's samples are finite: the levels of this bank break the model.")
    bound = min((each.error for each in finite if each.corner), default=math.inf)
    eligible = [] if paired else [each for each in finite if each.error <= bound]
    if eligible:
        return min(eligible, key=lambda each: (each.plan.divergence, each.error))
    return min(finite, key=lambda each: each.error)
