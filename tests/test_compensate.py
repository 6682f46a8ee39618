"""Compensation against exact float64 least squares, for random and for real Hessians."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plain import spoil
from stageprune.core.calibration import calibrate
from stageprune.core.errors import CalibrationError
from stageprune.core.groups import consumer_sites
from stageprune.core.groups.group import Cols, Group, kept_columns
from stageprune.core.groups.layer import layer_at
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import prune
from stageprune.core.pruning.compensate import compensate, damp, reconstruction_loss, with_bias
from stageprune.core.pruning.solver import nested_columns
from support import LEVELS, hessian_of, least_squares, make_pipe, relative

DAMPING = 0.01


def least_squares_of(weight, hessian, kept):
    """The same from a Hessian alone, by way of its symmetric square root instead of a Cholesky factor."""
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.clamp_min(0).sqrt()
    columns = torch.cat([kept, torch.tensor([len(hessian) - 1])])
    solution = torch.linalg.lstsq(root.T[:, columns], root.T @ weight.T, driver="gelsd").solution.T
    return solution[:, :-1], solution[:, -1]


def random_rows(seed, count, width, kind):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(width, width, generator=generator, dtype=torch.float64) + 0.5
    spoil(rows, kind)
    return rows


KINDS = st.sampled_from(["full", "low rank", "duplicates", "dead", "constant"])


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 24), outputs=st.integers(1, 8), kind=KINDS, data=st.data())
def test_every_prefix_is_the_least_squares_solution(seed, width, outputs, kind, data):
    count = data.draw(st.integers(1, 3 * width))  # fewer rows than columns included: damping alone carries those
    rows = random_rows(seed, count, width, kind)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(outputs, width + 1, generator=generator, dtype=torch.float64)
    columns = torch.randperm(width, generator=generator)
    hessian = hessian_of(rows)
    damping = float(hessian.diagonal()[:-1].mean()) * DAMPING
    counts = list(range(width, 0, -1))
    solutions = compensate(weight, damp(hessian, DAMPING), columns, counts)
    for kept, (got_weight, got_bias) in zip(counts, solutions, strict=True):
        expected_weight, expected_bias = least_squares(weight, rows, columns[:kept], damping)
        scale = torch.cat([expected_weight, expected_bias[:, None]], 1).abs().max()
        assert float((got_weight - expected_weight).abs().max() / scale) < 1e-6
        assert float((got_bias - expected_bias).abs().max() / scale) < 1e-6
    assert torch.allclose(solutions[0][0], weight[:, columns]), "keeping everything is the dense weight"
    losses = [reconstruction_loss(weight, damp(hessian, DAMPING), columns, solution) for solution in solutions]
    assert all(low <= high + 1e-9 for low, high in pairwise(losses)), "more units never lose more"


def test_compensation_beats_plain_slicing():
    rows = random_rows(3, 200, 16, "full")
    weight = torch.randn(5, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian, columns = damp(hessian_of(rows), DAMPING), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    kept = columns[:8]
    plain = reconstruction_loss(weight, hessian, columns, (weight[:, kept], weight[:, -1]))
    best = reconstruction_loss(weight, hessian, columns, compensate(weight, hessian, columns, [8])[0])
    assert best < 0.7 * plain


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damp_refuses_what_is_not_finite(value):
    hessian = torch.eye(4)
    hessian[1, 2] = value
    with pytest.raises(CalibrationError, match="holds NaN or infinity"):
        damp(hessian, DAMPING)


def test_damp_leaves_the_bias_alone_and_raises_itself(caplog):
    hessian = torch.eye(5, dtype=torch.float64) * 2
    assert damp(hessian, 0.1).diagonal().tolist() == pytest.approx([2.2] * 4 + [2])
    hessian[0, 1] = hessian[1, 0] = 2.15
    assert float(damp(hessian, 0.01)[0, 0]) == pytest.approx(2.2)
    assert "damping raised from 0.01 to 0.1" in caplog.text
    with pytest.raises(CalibrationError, match=r"no Cholesky factor even with damping 10"):
        damp(torch.zeros(5, 5), DAMPING)


def check_bank(pipe, calibration, bank, tolerance=1e-4):
    """Every consumer of the bank equals least squares on the calibration's own Hessian; returns the worst error."""
    sites, worst = consumer_sites(bank.groups), 0.0
    for key, consumer in bank.consumers.items():
        linear, entries = layer_at(pipe.transformer, key.path), sites[key.path]
        stage = key.stage if bank.stages > 1 else None
        hessian = calibration.hessian(key.path, stage).double()
        hessian.diagonal()[:-1] += DAMPING * hessian.diagonal()[:-1].mean()
        units = {g.name: bank.order(g.name, key.stage)[: bank.kept[g.name][key.level]] for g, _ in entries}
        weight, bias = least_squares_of(with_bias(linear.weight, linear.bias), hessian, kept_columns(entries, units))
        worst = max(worst, relative(consumer.weight.double(), weight), relative(consumer.bias.double(), bias))
        assert worst < tolerance, key
    return worst


def test_whole_banks_are_least_squares(pipe, calibration, bank):
    assert len(bank.consumers) == 6 * 3 * bank.stages
    check_bank(pipe, calibration, bank)


def test_whole_bank_without_a_bias_in_double_precision():
    """In float64 nothing hides the error: 1e-8 instead of float32's rounding. The consumer gets a bias it had not."""
    pipe = make_pipe(activation_fn="geglu")
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[2].bias = None
    pipe.transformer.double()
    calibration = calibrate(DiffusersHost(pipe), [1, 2, 3] * 6, steps=4)
    bank = prune(DiffusersHost(pipe), calibration, levels=LEVELS, multiple=8)
    assert check_bank(pipe, calibration, bank) < 1e-8
    assert float(bank.consumer("transformer_blocks.0.ff.net.2", 3, 0).bias.abs().max()) > 1e-3


@pytest.mark.demo
@pytest.mark.slow
def test_real_hessians_of_the_trained_demo(demo_pipe):
    calibration = calibrate(DiffusersHost(demo_pipe), list(range(10)) * 2, steps=8)
    bank = prune(DiffusersHost(demo_pipe), calibration, levels=[0.2, 0.5, 0.7])
    check_bank(demo_pipe, calibration, bank)


def _shared_consumer(sizes, widths, gap):
    """Groups that read one consumer, after `gap` columns of nobody's and with as many at the end."""
    entries, offset = [], gap
    for index, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        group = Group(f"g{index}", "head", size, width, consumers=(Cols("out", offset),))
        entries.append((group, offset))
        offset += size * width
    return entries, offset + gap


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    gap=st.integers(0, 3),
    data=st.data(),
)
def test_groups_that_share_a_consumer(seed, sizes, gap, data):
    """FLUX's proj_out reads heads and neurons: the columns arrive segment by segment, whatever the levels' nesting."""
    widths = [data.draw(st.integers(1, 3)) for _ in sizes]
    entries, width = _shared_consumer(sizes, widths, gap)
    generator = torch.Generator().manual_seed(seed)
    units = {group.name: torch.randperm(group.size, generator=generator) for group, _ in entries}
    counts = {
        group.name: (group.size, *sorted((data.draw(st.integers(1, group.size)) for _ in range(2)), reverse=True))
        for group, _ in entries
    }
    columns, places = nested_columns(entries, units, counts, width)
    assert sorted(columns.tolist()) == list(range(width))
    weight = torch.randn(4, width + 1, generator=generator, dtype=torch.float64)
    hessian = damp(hessian_of(random_rows(seed, 3 * width, width, "full")), DAMPING)
    solutions = compensate(weight, hessian, columns, [len(place) for place in places])
    for level, (place, (got, bias)) in enumerate(zip(places, solutions, strict=True)):
        delivered, end = [], 0  # what the sliced producers deliver: segments in order, with nobody's columns between
        for group, offset in entries:
            kept = units[group.name][: counts[group.name][level]]
            delivered += [torch.arange(end, offset), group.columns(kept, offset)]
            end = offset + group.channels
        delivered = torch.cat([*delivered, torch.arange(end, width)])
        expected, expected_bias = least_squares_of(weight, hessian, delivered)
        assert float((got[:, place] - expected).abs().max()) < 1e-6 * float(expected.abs().max())
        assert float((bias - expected_bias).abs().max()) < 1e-6 * float(expected.abs().max().clamp_min(1))
