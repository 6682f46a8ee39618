"""Small changes of a plan: all within the budget, some by price and some by chance, never worse than the plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune.core.planning.joint import best_path
from stageprune.core.planning.joint.moves import Ground, calls_of, denser, inserted, neighbours, sparser
from stageprune.core.planning.joint.refine import ALLOWANCE, LEAST_RUNS, refine, runs_within
from support import path_problems


@settings(deadline=None)
@given(path_problems(), st.integers(0, 10**6))
def test_small_changes_only_make_it_better(problem, seed):
    """Whatever running shows: never dearer than the budget, never worse than what it began with, nothing run twice."""
    prices, costs, budget = problem
    path = best_path(prices, costs, budget, resolution=10)
    if path is None:
        return
    met = []

    def error_of(each):
        met.append(each)
        assert sum(costs[level] for _, _, level in each) <= budget + 1e-9
        assert each[0][0] == 0 and each[-1][1] == prices.shape[0]
        assert all(jump[1] == after[0] for jump, after in itertools.pairwise(each))
        return hash((each, seed)) % 1000

    found, error = refine(path, prices, costs, budget, error_of)
    assert met[0] == path and len(set(met)) == len(met)
    assert error == min(hash((each, seed)) % 1000 for each in met) == hash((found, seed)) % 1000
    only, _ = refine(((0, prices.shape[0], 0),), prices, costs, 100.0, lambda _: 0, levels=[0])
    assert {level for _, _, level in only} == {0}


def test_changes_of_a_plan_are_all_small_ones():
    prices = torch.zeros(10, 11, 3)
    tried = []
    refine(
        ((0, 4, 1), (4, 10, 0)), prices, [1.0, 0.7, 0.5], 1.7, lambda path: tried.append(path) or 0, runs=99, tries=99
    )
    shifts = {((0, place, 1), (place, 10, 0)) for place in (2, 3, 5, 6)}
    levels = {((0, 4, 0), (4, 10, 1)), ((0, 4, 2), (4, 10, 0)), ((0, 4, 1), (4, 10, 1))}
    inserts = {((0, 2, 1), (2, 4, 2), (4, 10, 2)), ((0, 4, 1), (4, 7, 2), (7, 10, 2))}
    assert set(tried[1:]) == shifts | levels | inserts | {((0, 10, 1),)}, "denser only where prices speak for it"


def ground_of(prices, costs, budget, levels=None):
    return Ground(prices.tolist(), costs, budget, levels or range(len(costs)))


@settings(deadline=None)
@given(path_problems(), st.data())
def test_every_change_is_a_plan_within_the_budget(problem, data):
    prices, costs, budget = problem
    path = best_path(prices, costs, budget, resolution=10)
    if path is None:
        return
    levels = sorted({level for _, _, level in path} | data.draw(st.sets(st.sampled_from(range(len(costs))))))
    ground, begin = ground_of(prices, costs, budget, levels), calls_of(path)
    for calls in neighbours(begin, ground):
        assert sum(costs[level] for _, level in calls) <= budget + 1e-6
        places = [place for place, _ in calls]
        assert places[0] == 0 and places == sorted(set(places)) and places[-1] < prices.shape[0]
        assert {level for _, level in calls} <= set(levels) and abs(len(calls) - len(begin)) <= 1
        assert calls_of(ground.path(calls)) == calls


def test_one_step_more_and_the_others_sparser():
    """In the middle of every gap; what pays for it are the calls whose price rises least for what they save."""
    prices = torch.zeros(8, 9, 2, dtype=torch.float64)
    prices[:, :, 1] = torch.arange(1, 9, dtype=torch.float64)[:, None]  # later calls suffer more
    ground = ground_of(prices, [1.0, 0.5], 2.0)
    begin = ((0, 0), (3, 0))
    assert list(inserted(begin, ground)) == [((0, 0), (1, 0), (3, 0)), ((0, 0), (3, 0), (5, 0))]
    assert sparser(((0, 0), (1, 0), (3, 0)), ground) == ((0, 1), (1, 1), (3, 0))
    assert sparser(begin, ground) == begin, "it fits"
    assert sparser(((0, 1),) * 5, ground) is None
    assert sparser(((0, 0),) * 3, ground_of(prices, [1.0, 0.5], 2.0, [0])) is None
    assert list(inserted(((0, 0), (7, 0)), ground))[-1] == ((0, 0), (3, 0), (7, 0)), "no room behind the last"


def test_one_step_less_and_the_others_denser():
    """Those first whose price falls most for what they cost; nothing that no price speaks for."""
    prices = torch.zeros(8, 9, 3, dtype=torch.float64)
    prices[:, :, 1], prices[:, :, 2] = 1.0, 4.0
    prices[4:, :, 2] = 10.0
    ground = ground_of(prices, [1.0, 0.8, 0.5], 1.8)
    assert denser(((0, 2), (4, 2)), ground) == ((0, 1), (4, 0)), "0.3 for 9, then 0.2 for 1 rather than 0.3 for 3"
    assert denser(((0, 2), (4, 2)), ground_of(torch.zeros(8, 9, 3), [1.0, 0.8, 0.5], 1.8)) == ((0, 2), (4, 2))
    calls = {calls_of(path) for path in ran(((0, 2, 2), (2, 4, 2), (4, 8, 2)), prices, [1.0, 0.8, 0.5], 1.8)}
    assert ((0, 1), (4, 0)) in calls and ((0, 2), (4, 2)) in calls


def ran(path, prices, costs, budget, **options):
    met = []
    refine(path, prices, costs, budget, lambda each: met.append(each) or 0.0, **{"runs": 99, "tries": 99, **options})
    return met[1:]


@pytest.mark.parametrize("levels", [None, [0]])
def test_a_plan_that_needs_more_steps_is_found(levels):
    """The best is two insertions away: what moves, leaves out and changes levels never gets there."""
    prices = torch.rand(8, 9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    even = ((0, 2, 0), (2, 4, 0), (4, 6, 0), (6, 8, 0))

    def error_of(path):
        return sum((there - here) ** 2 + level for here, there, level in path)

    found, error = refine(((0, 8, 0),), prices, [1.0, 0.5], 4.0, error_of, levels, runs=270, tries=30)
    assert (found, error) == (even, 16)


def test_a_plan_that_needs_sparser_steps_for_one_more_is_found():
    prices = torch.zeros(8, 9, 2, dtype=torch.float64)
    prices[:, :, 1] = torch.arange(1, 9, dtype=torch.float64)[:, None]
    planted = ((0, 2, 1), (2, 4, 1), (4, 8, 0))
    found, _ = refine(((0, 4, 0), (4, 8, 0)), prices, [1.0, 0.5], 2.0, lambda path: float(path != planted), runs=90)
    assert found == planted


def test_half_by_price_and_half_by_chance():
    prices = torch.rand(20, 21, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path, costs = ((0, 6, 1), (6, 12, 1), (12, 20, 1)), [1.0, 0.7, 0.5]
    every = ran(path, prices, costs, 2.2)
    ranked = sorted(every, key=lambda each: float(sum(prices[jump] for jump in each)))
    some = ran(path, prices, costs, 2.2, runs=8, tries=8)
    assert some[:4] == ranked[:4] and not set(some[4:]) & set(ranked[:4]) and some[4:] != ranked[4:8]
    assert len(set(some)) == 8 and some == ran(path, prices, costs, 2.2, runs=8, tries=8), "the same each time"


def test_it_goes_on_until_nothing_nearby_is_better_or_runs_are_spent():
    """A round without gain ends nothing while there are neighbours that did not run."""
    prices = torch.zeros(30, 31, 1, dtype=torch.float64)
    goal = ((0, 20, 0), (20, 30, 0))
    begin = ((0, 8, 0), (8, 30, 0))

    def error_of(path):
        met.append(path)
        return abs(path[0][1] - goal[0][1]) if len(path) == 2 else 99.0

    for runs, tries in ((1000, 1), (1000, 10), (5, 2)):
        met = []
        found, error = refine(begin, prices, [1.0], 3.0, error_of, runs=runs, tries=tries)
        if runs == 5:
            assert len(met) == 1 + runs and error == min(map(error_of, list(met)))
        else:
            assert (found, error) == (goal, 0) and len(met) < runs


def test_few_calls_are_tried_more_often():
    assert runs_within(10, 2.0) == 2 * runs_within(10, 4.0) == ALLOWANCE // 20
    assert runs_within(1000, 20.0) == LEAST_RUNS
