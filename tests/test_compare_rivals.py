"""Strategies that choose steps are told what the others chose, and plan by the same costs."""

from __future__ import annotations

import importlib
import itertools

import pytest

import stageprune
from stageprune import StageSchedule
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import register_strategy
from stageprune.core.planning.allocate import STRATEGIES, TOLERANCE, allocate
from stageprune.core.planning.compare import FEWER_STEPS
from stageprune.core.planning.costs import Budget
from stageprune.core.planning.rivals import calls_of
from stageprune.core.schedule import Target
from support import PlantedErrors, make_pipe

CALL = {"prompts": [1, 2, 3, 4, 5, 6], "steps": 5, "guidance": 1.5}


@pytest.fixture(scope="module")
def dit():
    return make_pipe()


@pytest.fixture(scope="module")
def bank(dit):
    return stageprune.prune(dit, method="magnitude", levels=[0, 0.3, 0.6], multiple=8)


@pytest.fixture
def told(monkeypatch):
    """Strategy, share and rivals of each plan, in order."""
    found = []

    def spy(*given, **options):
        budget, rivals = options["target"], options["rivals"]
        found.append((options["strategy"], budget.target.share, list(rivals)))
        return allocate(*given, **options)

    monkeypatch.setattr(importlib.import_module("stageprune.core.planning.compare"), "allocate", spy)
    return found


def test_whoever_chooses_steps_comes_last_and_knows_the_others(dit, bank, told, monkeypatch):
    PlantedErrors(monkeypatch, {})
    strategies, targets = ["joint", FEWER_STEPS, "steps", "uniform"], [0.8, 0.5, 0.8]
    found = stageprune.compare(dit, bank, targets=targets, strategies=strategies, **CALL)
    assert [(point.target, point.strategy) for point in found.points] == [*itertools.product(targets, strategies)]
    assert [(strategy, share) for strategy, share, _ in told] == [
        (strategy, share) for share in (0.5, 0.8) for strategy in ("uniform", "steps", "joint")
    ]
    points = {(point.target, point.strategy): point for point in found.points}
    rivals = {(share, strategy): given for strategy, share, given in told}
    fewer = {0.5: StageSchedule.uniform(0.0).planned_for(2), 0.8: StageSchedule.uniform(0.0).planned_for(4)}
    chosen = {key: point.schedule for key, point in points.items() if point.schedule}
    assert rivals[0.5, "uniform"] == rivals[0.8, "uniform"] == []
    assert rivals[0.5, "steps"] == [fewer[0.5], chosen[0.5, "uniform"]]
    assert rivals[0.5, "joint"] == [*rivals[0.5, "steps"], chosen[0.5, "steps"]]
    beside = [fewer[0.8], chosen[0.8, "uniform"]]
    assert rivals[0.8, "steps"] == [chosen[0.5, "steps"], *beside]
    assert rivals[0.8, "joint"] == [chosen[0.5, "joint"], *beside, chosen[0.8, "steps"]]
    planned = {(share, strategy): [each.planned_steps for each in given] for strategy, share, given in told}
    assert planned[0.5, "joint"] == [2, 5, 5] and planned[0.8, "joint"] == [5, 4, 5, 5]


def test_where_all_are_alike_the_curves_coincide(dit, bank, monkeypatch):
    PlantedErrors(monkeypatch, {})
    found = stageprune.compare(dit, bank, targets=[0.5, 0.8], strategies=["joint", FEWER_STEPS, "uniform"], **CALL)
    host, known = DiffusersHost(dit), set()
    for target in (0.5, 0.8):
        points = {point.strategy: point for point in found.points if point.target == target}
        for name in (FEWER_STEPS, "uniform"):
            schedule = points[name].schedule or StageSchedule.uniform(0.0)
            known.add(calls_of(schedule.with_taus(host.taus(points[name].steps))))
        assert calls_of(points["joint"].schedule) in known, "no plan is better than what others do"
        known.add(calls_of(points["joint"].schedule))


def test_what_is_too_dear_is_no_rival(dit, bank, told):
    """A strategy that does not keep its budget fails alone."""

    @register_strategy("greedy")
    def greedy(request):
        return request.allocation("greedy", [0.0] * len(request.stages.stages))

    try:
        found = stageprune.compare(dit, bank, targets=[0.5], strategies=["greedy", "uniform", "joint"], **CALL)
    finally:
        del STRATEGIES["greedy"]
    spent = {point.strategy: point.spent for point in found.points}
    assert spent["greedy"] == 1.0 and spent["joint"] <= 0.5 + TOLERANCE
    (rival,) = told[-1][2]
    assert rival == next(point.schedule for point in found.points if point.strategy == "uniform")


def test_times_are_measured_once(dit, bank, told, monkeypatch):
    """A clock that tells another story each time is asked once: all plan by the same."""
    timed = []

    def relative_times(sampling, pruner):
        timed.append(1)
        return {0.0: 1.0, 0.3: 0.8 - 0.1 * len(timed), 0.6: 0.6 - 0.1 * len(timed)}

    monkeypatch.setattr("stageprune.core.planning.costs.relative_times", relative_times)
    PlantedErrors(monkeypatch, {})
    strategies = [FEWER_STEPS, "uniform", "steps", "joint"]
    found = stageprune.compare(dit, bank, targets=["speedup:1.25", "speedup:1.42"], strategies=strategies, **CALL)
    assert len(timed) == 1 and len(found.points) == 8
    spent = {point.spent for point in found.points if point.strategy == "uniform"}
    assert [*spent] == [pytest.approx(0.7)]
    assert all(len(given) >= 2 for strategy, _, given in told if strategy == "joint")


def test_a_budget_is_a_target_whose_costs_are_known(dit, bank):
    host = DiffusersHost(dit)
    costs = {0.0: 10, 0.3: 9, 0.6: 5}
    target = Target.parse("macs:0.9")
    found = allocate(host, bank, target=Budget(target, costs), strategy="uniform", **CALL)
    assert found.schedule.levels[0] == 0.3 and found.spent == pytest.approx(0.9) and found.target == target
