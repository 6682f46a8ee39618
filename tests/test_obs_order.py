"""The blocked greedy solver against brute force and against the plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plain import brute_force_order, plain_order
from stageprune.core.pruning import obs
from stageprune.core.pruning.compensate import damp
from stageprune.core.pruning.obs import obs_order
from support import hessian_of


def problem(seed, columns, outputs, rows=None, rank=None):
    """A consumer with correlated inputs of unequal size and a mean."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or columns
    inputs = torch.randn(rows or 3 * columns, rank, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(rank, columns, generator=generator, dtype=torch.float64) + 0.5
    inputs *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(outputs, columns + 1, generator=generator, dtype=torch.float64)
    return weight, damp(hessian_of(inputs), 0.01)


def same(order, expected, rel=1e-6):
    assert order.units.tolist() == expected.units.tolist()
    assert order.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=rel)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    units=st.integers(1, 64),
    widths=st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=3),
    outputs=st.integers(1, 80),
    panel=st.sampled_from([1, 2, 5, 16, 128]),
    thin=st.booleans(),
)
def test_order_is_that_of_brute_force(seed, units, widths, outputs, panel, thin):
    """One to three consumers, each with its own width; panels that end before, at and after the last unit."""
    sizes = [units * width for width in widths]
    rank = [max(size // 3, 1) if thin else None for size in sizes]
    consumers = [problem(seed + i, sizes[i], outputs + i, rank=rank[i]) for i in range(len(widths))]
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(size, generator=generator).view(units, -1) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs, "PANEL", panel)
        got = obs_order(consumers, columns)
    same(got, brute_force_order(consumers, columns))


@pytest.mark.parametrize(("units", "width"), [(300, 1), (60, 5), (8, 40), (3, 130)])
@pytest.mark.parametrize("rows", [60, 2000])
def test_order_is_that_of_the_plain_loop(units, width, rows):
    """Several panels; also with fewer data than columns, when damping alone carries the inverse."""
    consumer = problem(units, units * width, 50, rows=rows)
    columns = torch.arange(units * width).view(units, width)
    same(obs_order([consumer], [columns]), plain_order([consumer], [columns]), rel=1e-7)


def test_columns_of_no_unit_are_never_given_up():
    """FLUX's proj_out reads heads and neurons: one group's order leaves the other's columns in place."""
    weight, hessian = problem(0, 40, 12)
    columns = torch.arange(10, 30)[:, None]
    same(obs_order([(weight, hessian)], [columns]), plain_order([(weight, hessian)], [columns]))


def test_dead_inputs_go_first_and_cost_next_to_nothing():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    inputs[:, ::3] = 0
    weight = torch.randn(8, 31, generator=generator, dtype=torch.float64)
    order = obs_order([(weight, damp(hessian_of(inputs), 1e-6))], [torch.arange(30)[:, None]])
    assert sorted(order.units[-10:].tolist()) == list(range(0, 30, 3))
    assert float(order.losses[-10:].max()) < 1e-4 * float(order.losses[:-10].min())
