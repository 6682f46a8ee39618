"""Unstructured and N:M sparsity against a direct float64 implementation, and what makes them worth it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plain import layer_problem, plain_sparsify, zeros_of
from stageprune.core.errors import BankError, CalibrationError
from stageprune.core.pruning.compensate import reconstruction_loss, with_bias
from stageprune.core.pruning.sparse import NM, Share, sparsify
from support import relative

KINDS = ("full", "low rank", "duplicates", "dead")


def lost(weight, hessian, result):
    return reconstruction_loss(weight, hessian, torch.arange(weight.shape[1] - 1), result)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    columns=st.integers(2, 40),
    outputs=st.integers(1, 12),
    zeros=st.floats(0, 0.95),
    block=st.sampled_from([1, 4, 7, 128]),
    kind=st.sampled_from(KINDS),
)
def test_share_is_the_direct_algorithm(seed, columns, outputs, zeros, block, kind):
    weight, hessian = layer_problem(seed, columns, outputs, kind)
    got, bias = sparsify(weight, hessian, Share(zeros), block)
    expected = plain_sparsify(weight, hessian, block, zeros_of(Share(zeros)))
    assert torch.equal(got == 0, expected[:, :-1] == 0)
    assert relative(torch.cat([got, bias[:, None]], 1), expected) < 1e-5
    for part in got.split(block, dim=1):
        assert int((part == 0).sum()) == round(zeros * part.numel())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    parts=st.integers(1, 8),
    outputs=st.integers(1, 12),
    pattern=st.sampled_from([NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(1, 2), NM(2, 5), NM(2, 2)]),
    block=st.sampled_from([1, 8, 13, 128]),
    kind=st.sampled_from(KINDS),
)
def test_n_of_m_is_the_direct_algorithm(seed, parts, outputs, pattern, block, kind):
    weight, hessian = layer_problem(seed, parts * pattern.of, outputs, kind)
    got, bias = sparsify(weight, hessian, pattern, block)
    expected = plain_sparsify(weight, hessian, pattern.of, zeros_of(pattern))
    assert relative(torch.cat([got, bias[:, None]], 1), expected) < 1e-5
    kept = (got != 0).unflatten(1, (-1, pattern.of)).sum(2)
    assert bool((kept == pattern.kept).all()), "every M weights of every row keep N"


@pytest.mark.parametrize("pattern", [Share(0.5), Share(0.8), NM(2, 4), NM(4, 8)], ids=str)
def test_wide_layer_of_many_blocks(pattern):
    """More columns than a block, as many rows of data as half the columns: damping alone carries the rank."""
    weight, hessian = layer_problem(0, 320, 6, rows=160)
    got, bias = sparsify(weight, hessian, pattern)
    span = pattern.of if isinstance(pattern, NM) else 128
    expected = plain_sparsify(weight, hessian, span, zeros_of(pattern))
    assert relative(torch.cat([got, bias[:, None]], 1), expected) < 1e-5


@pytest.mark.parametrize("pattern", [Share(0.5), NM(2, 4)], ids=str)
def test_making_up_beats_cutting(pattern):
    """Against the same mask on the dense weights, and against the smallest weights."""
    for seed in range(4):
        weight, hessian = layer_problem(seed, 64, 16)
        got = sparsify(weight, hessian, pattern)
        dense, bias = weight[:, :-1], weight[:, -1]
        smallest = zeros_of(pattern)(dense.square())
        best = lost(weight, hessian, got)
        assert best < 0.7 * lost(weight, hessian, (dense.masked_fill(got[0] == 0, 0), bias))
        assert best < 0.9 * lost(weight, hessian, (dense.masked_fill(smallest, 0), bias))


def test_the_bias_makes_up_too():
    weight, hessian = layer_problem(0, 32, 8)
    got, bias = sparsify(weight, hessian, Share(0.6))
    assert lost(weight, hessian, (got, bias)) < lost(weight, hessian, (got, weight[:, -1]))


def test_a_convolution_is_a_matrix_over_patches():
    conv = torch.nn.Conv2d(8, 6, 3, bias=False)
    weight = with_bias(conv.weight.flatten(1), conv.bias)
    got, bias = sparsify(weight, layer_problem(0, 72, 6)[1], NM(2, 4))
    assert got.view_as(conv.weight).shape == (6, 8, 3, 3) and bias.shape == (6,)


def test_no_zeros_is_the_dense_layer_and_inputs_stay():
    weight, hessian = layer_problem(0, 24, 5)
    before = weight.clone(), hessian.clone()
    for pattern in (Share(0.0), NM(4, 4)):
        got, bias = sparsify(weight, hessian, pattern)
        assert torch.equal(torch.cat([got, bias[:, None]], 1), weight)
    sparsify(weight, hessian, Share(0.5))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_dead_inputs_lose_their_weights_first():
    weight, hessian = layer_problem(0, 30, 6, "dead", damping=1e-6)
    got, _ = sparsify(weight, hessian, Share(1 / 3))
    assert bool((got[:, ::3] == 0).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Share(1.0), r"share of zeros must be in \[0, 1\), got 1.0"),
        (lambda: Share(-0.1), "share of zeros must be in"),
        (lambda: Share(float("nan")), "share of zeros must be in"),
        (lambda: NM(0, 4), "keeps N of M weights, 1 <= N <= M; got 0:4"),
        (lambda: NM(5, 4), "got 5:4"),
        (lambda: sparsify(*layer_problem(0, 30, 2), NM(2, 4)), "2:4 sparsity needs a multiple of 4 columns, .* has 30"),
        (
            lambda: sparsify(layer_problem(0, 30, 2)[0], layer_problem(0, 29, 2)[1], Share(0.5)),
            "Hessian of 31, got 30 x 30",
        ),
        (lambda: sparsify(*layer_problem(0, 30, 2), Share(0.5), block=0), "`block` must be at least 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(BankError, match=message):
        make()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_hessian_that_was_not_damped(value):
    weight, hessian = layer_problem(0, 8, 2)
    hessian[3, :] = hessian[:, 3] = value
    with pytest.raises(CalibrationError, match="not positive definite: damp it"):
        sparsify(weight, hessian, Share(0.5))
