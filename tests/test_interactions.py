"""Levels of stages whose errors add up as vectors: no worse than what it begins at, nearly always the best there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune.core.planning import best_levels
from stageprune.core.planning.interactions import best_together, error_of

COSTS = (100, 85, 70, 60, 50, 40)


def problem(seed, stages=5, levels=6, numbers=12, common=1.0):
    """Changes of the final latents, each longer with the level, that share a part between stages."""
    draw = torch.Generator().manual_seed(seed)
    length = torch.linspace(0, 1.5, levels).double()[None, :, None] ** 1.5
    own = torch.randn(stages, levels, numbers, generator=draw).double()
    shared = torch.randn(stages, 1, numbers, generator=draw).double()
    changes = (own + common * shared) * length * torch.rand(stages, 1, 1, generator=draw).double()
    flat = changes.flatten(0, 1)
    return changes, (flat @ flat.T / numbers).reshape(stages, levels, stages, levels)


def began(products, costs, budget, count=16):
    stages, levels = products.shape[:2]
    own = products.reshape(stages * levels, -1).diagonal().reshape(stages, levels)
    return [choice for errors in (own, own.sqrt()) for choice in best_levels(costs, errors.tolist(), budget, count)]


def every_error(changes, costs, budget):
    """By brute force, from the vectors themselves."""
    stages, levels = changes.shape[:2]
    found = {}
    for choice in itertools.product(range(levels), repeat=stages):
        if sum(row[level] for row, level in zip(costs, choice, strict=True)) <= budget:
            found[choice] = float(changes[range(stages), choice].sum(0).square().mean())
    return found


def test_error_of_is_that_of_the_sum():
    changes, products = problem(0)
    for choice in [(0, 0, 0, 0, 0), (5, 4, 3, 2, 1), (0, 0, 3, 0, 0)]:
        assert error_of(choice, products) == pytest.approx(float(changes[range(5), choice].sum(0).square().mean()))


@pytest.mark.parametrize("share", [0.8, 0.67, 0.5])
def test_it_is_brute_force_but_for_a_few(share):
    """Five stages and six levels, all that fit: the best one, of at least 19 problems in 20."""
    best = 0
    for seed in range(20):
        changes, products = problem(seed)
        costs, budget = [COSTS] * 5, int(500 * share)
        every = every_error(changes, costs, budget)
        found = best_together(costs, products, budget, began(products, costs, budget))[0]
        best += every[found] <= min(every.values()) * (1 + 1e-9)
    assert best >= 19


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.floats(0.4, 1.0), st.floats(0, 2))
def test_within_the_budget_and_never_worse(seed, stages, levels, share, common):
    _, products = problem(seed, stages, levels, common=common)
    costs = [[calls * cost for cost in COSTS[:levels]] for calls in range(1, stages + 1)]
    budget = int(share * sum(row[0] for row in costs))
    starts = began(products, costs, budget, 4)
    found = best_together(costs, products, budget, starts, count=3)
    assert len(found) == len(set(found)) <= 3 and bool(found) == bool(starts)
    assert all(sum(row[level] for row, level in zip(costs, each, strict=True)) <= budget for each in found)
    errors = [error_of(each, products) for each in found]
    assert errors == sorted(errors)
    if starts:
        assert errors[0] <= min(error_of(each, products) for each in starts) + 1e-12


def test_a_level_that_breaks_the_model_is_never_chosen():
    _, products = problem(3)
    for level in (2, 5):
        products[1, level] = math.nan
        products[:, :, 1, level] = math.inf
    costs = [COSTS] * 5
    starts = list(itertools.product((0, 3, 5), repeat=5))
    for found in best_together(costs, products, 300, starts, count=50):
        assert found[1] not in (2, 5) and math.isfinite(error_of(found, products))


def test_nothing_to_begin_at():
    _, products = problem(0)
    assert best_together([COSTS] * 5, products, 300, []) == []
    assert best_together([COSTS] * 5, products, 300, [(0, 0, 0, 0, 0)]) == [], "over the budget"
