"""Steps and levels together: how many steps, where on the noise axis, and the level of each, under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ... import progress
from ...errors import AllocationError
from ...schedule import StageSchedule
from ..allocation import Allocation, Candidate, Request, register_strategy
from ..final import FINALISTS, race, rounds_for
from ..joint import JumpTable, Plan, Runs, grid_points, measure_jumps, moves, objectives, plans
from ..joint.choose import nearest_path, plan_of
from ..joint.moves import Ground, sparser
from ..joint.program import Path
from ..joint.refine import refine, runs_within
from ..rivals import Calls, calls_of
from ..sampling import Sampling
from ..table import TableOrigin, first_difference

LEAST_PROBES = 4

USUAL_STEPS = (4, 8)
"""That people run a model with, beside those that were asked for: corners have them, not only what fills a budget."""


@register_strategy("joint", stages=None)
def joint(request: Request) -> Allocation:
    """Steps and levels."""
    return _planned(_Problem(request), "joint")


@register_strategy("steps", stages=None)
def steps(request: Request) -> Allocation:
    """The dense model with fewer steps, where they serve best."""
    return _planned(_Problem(request, dense=True), "steps")


@dataclass(frozen=True)
class _Tried:
    """A schedule and what a run showed.

    Args:
        name: what made it.
        levels: of its steps.
        predicted: see `Candidate`.
        schedule: what was run.
        value: the fitness, on held-out probes.
        rival: whether it was given, as what the choice must not be worse than.
    """

    name: str
    levels: tuple[float, ...]
    predicted: float | None
    schedule: StageSchedule
    value: float = math.nan
    rival: bool = False

    @property
    def pruned(self) -> bool:
        """At some step."""
        return any(self.levels)


@dataclass(frozen=True)
class _Refinement:
    """Which plan is changed in small ways, and how.

    Args:
        name: of what comes of it.
        kinds: of plans to choose one of: pruned ones (True), dense ones (False).
        place: of that plan among them, the best first.
        levels: that the changes may use, by their numbers; all by default.
    """

    name: str
    kinds: tuple[bool, ...] = (True, False)
    place: int = 0
    levels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Problem:
    """What is to be planned.

    Args:
        request: the arguments of an allocation.
        dense: only steps are chosen.
    """

    request: Request
    dense: bool = False

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

    @property
    def trials(self) -> int:
        """Small changes of a plan that are run."""
        return runs_within(len(self.probes(held_out=False).prompts), self.budget)

    @property
    def refinements(self) -> tuple[_Refinement, ...]:
        """Prices may judge dense plans and pruned ones by different mistakes, so the best of each kind is refined,
        whichever comes first: `joint` then knows all that `steps` does. Small changes end where none is better, so the
        second-best pruned plan is refined too.
        """
        dense = _Refinement("dense, refined", kinds=(False,), levels=(0,))
        if self.dense:
            return (dense,)
        pruned = (_Refinement("pruned, refined", kinds=(True,)), _Refinement("second, refined", kinds=(True,), place=1))
        return (_Refinement("refined"), *pruned, dense)

    def probes(self, held_out: bool) -> Sampling:
        """The first half of the probes is for planning, the second for the choice."""
        sampling = self.request.sampling
        half = len(sampling.prompts) // 2
        return sampling.part(half, len(sampling.prompts)) if held_out else sampling.part(0, half)

    def runs(self, probes: Sampling, on_run: Callable[[], object]) -> Runs:
        """Judge of plans, on some probes."""
        request = self.request
        return Runs(probes, request.pruner, self.points, request.fitness, on_run)

    def schedule(self, plan: Plan) -> StageSchedule:
        """That runs a plan."""
        return plan.schedule(self.request.bank.edges)

    def of_plan(self, plan: Plan) -> _Tried:
        """Before it is tried."""
        return _Tried(plan.name, plan.levels, plan.predicted, self.schedule(plan))

    @property
    def rivals(self) -> list[_Tried]:
        """Before they are tried. Where only steps are chosen, a pruned schedule is none."""
        found = []
        for number, schedule in enumerate(self.request.rivals, 1):
            levels = tuple(level for _, level in calls_of(schedule))
            found.append(_Tried(f"rival {number}", levels, None, schedule, rival=True))
        return [each for each in found if not (self.dense and each.pruned)]

    def jumps(self) -> JumpTable:
        """The request's, if they were measured with what new ones would be, or new ones."""
        sampling, known = self.request.sampling, self.request.jumps
        if known is None:
            return measure_jumps(self.probes(held_out=False), self.request.pruner, self.points)
        origin = TableOrigin.of(sampling.host, self.request.bank, sampling.steps, sampling.guidance)
        measured = {**known.origin.__dict__, "grid points": len(known.taus)}
        differs = first_difference(measured, {**origin.__dict__, "grid points": self.points})
        if differs is not None:
            name, found, needed = differs
            raise AllocationError(
                f"`jumps` were measured with another {name}: {found}, this allocation needs {needed}. Leave them out "
                "to measure new ones."
            )
        return known


def _planned(problem: _Problem, strategy: str) -> Allocation:
    count, fitness = len(problem.request.sampling.prompts), problem.request.fitness
    least = max(LEAST_PROBES, 2 * fitness.probes)
    if count < least:
        raise AllocationError(
            f"strategy {strategy!r} by fitness {fitness.name!r} needs at least {least} probe prompts, half of them "
            f"held out; got {count}."
        )
    table = problem.jumps()
    tried = sorted(_try(problem, table), key=lambda each: each.value)
    if not tried:
        raise AllocationError(_too_small(problem, strategy))
    if math.isinf(tried[0].value):
        raise AllocationError("no plan's samples are finite: the levels of this bank break the model.")
    ranked = _last_choice(problem, tried)
    candidates = tuple(Candidate(each.name, each.levels, each.predicted, each.value, final) for each, final in ranked)
    return problem.request.planned(strategy, ranked[0][0].schedule, candidates, table)


def _too_small(problem: _Problem, strategy: str) -> str:
    """Not one step fits: why, and what to do."""
    request = problem.request
    cheapest = (
        f"strategy {strategy!r} makes dense steps only, each of which takes 1"
        if problem.dense
        else f"the bank's highest level still takes {min(problem.costs):.3f} of one"
    )
    return (
        f"`target` {request.budget.target} of {len(request.sampling.taus)} `steps` allows {problem.budget:.2f} dense "
        f"calls, and {cheapest}: not a single step fits. Ask for a larger share (a smaller speedup), or more `steps`."
    )


def _last_choice(problem: _Problem, tried: Sequence[_Tried]) -> list[tuple[_Tried, float | None]]:
    """The best few by the held-out probes, and rivals, are run again on fresh ones, the choice first; others follow."""
    finalists = _finalists(tried)
    if len(finalists) == 1:
        return [(each, None) for each in tried]
    held_out = problem.probes(held_out=True)
    rounds = rounds_for(len(held_out.prompts))
    with progress.bar(len(finalists) * rounds, "running the best again", "plan") as bar:

        def statistics_of(numbers: Sequence[int], index: int) -> list[Tensor]:
            runs = problem.runs(held_out.fresh(index), on_run=lambda: bar.update(1))
            return [runs.statistics(finalists[number].schedule) for number in numbers]

        rivals = [number for number, each in enumerate(finalists) if each.rival]
        ranked = race(len(finalists), statistics_of, problem.request.fitness, rounds, rivals)
    others = [each for each in tried if each not in finalists]
    return [(finalists[number], value) for number, value in ranked] + [(each, None) for each in others]


def _finalists(tried: Sequence[_Tried]) -> list[_Tried]:
    """The best few, a pruned plan and a dense one among them, as those alike are near each other in error too; and
    every rival.
    """
    finite = [each for each in tried if math.isfinite(each.value)]
    best = [next((each for each in finite if each.pruned is kind), None) for kind in (True, False)]
    chosen = [*finite[:FINALISTS], *(each for each in best if each), *(each for each in tried if each.rival)]
    return list(dict.fromkeys(chosen))


def _try(problem: _Problem, table: JumpTable) -> list[_Tried]:
    """Rivals, the best plans by each objective, small changes of some of them, and the corners, run on held-out
    probes; those that run alike once.
    """
    found = plans(table, problem.costs, problem.budget, objectives(table.sparsities, problem.dense))
    corners, rivals = _corners(problem, table), problem.rivals
    others = (*((each.name, each.path) for each in corners), *_on_grid(problem, table, rivals))
    begin = {plan.path: plan for plan in (*found, *(plan_of(table, *each) for each in others))}
    most = 2 * len(begin) + len(problem.refinements) * (1 + problem.trials)
    with progress.bar(most, "running plans", "plan") as bar:
        planning = problem.runs(problem.probes(held_out=False), lambda: bar.update(1)) if begin else None
        refined = _refined(problem, table, [*begin.values()], planning) if planning else []
        held_out = problem.runs(problem.probes(held_out=True), lambda: bar.update(1))
        every = dict[Calls, _Tried]()
        for each in (*rivals, *(problem.of_plan(plan) for plan in (*found, *corners, *refined))):
            every.setdefault(calls_of(each.schedule), each)
        return [replace(each, value=held_out.value(each.schedule)) for each in every.values()]


def _corners(problem: _Problem, table: JumpTable) -> list[Plan]:
    """What else could be done with the budget: one level throughout, dense too, with the steps that it pays for, or the
    usual ones where they are fewer. Of the levels that afford as many, the densest.
    """
    sampling = problem.request.sampling
    lowest: dict[int, int] = {}  # steps -> level
    for level, cost in enumerate(problem.costs[:1] if problem.dense else problem.costs):
        most = min(math.floor(problem.budget / cost + 1e-9), sampling.steps)
        for count in (most, *(usual for usual in USUAL_STEPS if usual < most)):
            lowest.setdefault(count, level)
    found, first = [], next(iter(lowest))
    for count, level in lowest.items():
        taus = sampling.host.taus(count) if count else []
        if taus and len(taus) == count:
            dense = "fewer steps" if count == first else f"fewer steps, {count}"
            name = f"one level, {count} steps" if level else dense
            path = plan_of(table, name, nearest_path(table, taus, [level] * count))
            levels = (table.sparsities[level],) * count
            found.append(replace(path, taus=tuple(taus), levels=levels))
    return found


def _on_grid(problem: _Problem, table: JumpTable, rivals: Sequence[_Tried]) -> list[tuple[str, Path]]:
    """Rivals as plans that may be changed: over the nearest grid points, within the budget of those."""
    ground = Ground(table.final.tolist(), problem.costs, problem.budget, range(len(problem.costs)))
    found = []
    for each in rivals:
        levels = [table.sparsities.index(level) for level in each.levels]
        calls = sparser(moves.calls_of(nearest_path(table, each.schedule.taus or (), levels)), ground)
        if calls is not None:
            found.append((each.name, ground.path(calls)))
    return found


def _refined(problem: _Problem, table: JumpTable, found: Sequence[Plan], probes: Runs) -> list[Plan]:
    """Small changes that runs show to be better: of some of the best plans.

    Args:
        problem: what is planned.
        table: prices of jumps.
        found: plans on the grid, those of corners and rivals too.
        probes: to plan with.
    """

    def value_of(plan: Plan) -> float:
        return probes.value(problem.schedule(plan))

    def value_along(path: Path) -> float:
        return value_of(plan_of(table, "refined", path))

    begun, refined = set[tuple[Path, tuple[int, ...] | None]](), []
    for refinement in problem.refinements:
        kind = [plan for plan in found if _is_pruned(plan) in refinement.kinds]
        begin = sorted(kind, key=value_of)[refinement.place : refinement.place + 1]
        if not begin or (begin[0].path, refinement.levels) in begun:  # not one dense step fits, or done
            continue
        begun.add((begin[0].path, refinement.levels))
        among = (problem.costs, problem.budget, value_along, refinement.levels, problem.trials)
        path, _ = refine(begin[0].path, table.final, *among)
        refined.append(plan_of(table, refinement.name, path))
    return refined


def _is_pruned(plan: Plan) -> bool:
    return any(plan.levels)
