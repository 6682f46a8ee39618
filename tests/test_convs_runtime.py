"""The run time on convolutions and group norms: what an enabled UNet computes, and that disabling leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_unets import CONV, LEVELS, TAUS, UNETS, UNetHost, attach, bank_for, calibration_for, forward, make
from torch import nn

from stageprune.core.errors import StagePruneError
from stageprune.core.groups.layer import norm_at
from stageprune.core.pruning import prune
from stageprune.core.runtime import pruner, pruner_of, resident_bytes, summarise, swap
from support import SHARING_IDS, inside, reference, relative, same_state, state_of

TOLERANCE = 1e-5


@pytest.fixture(params=SHARING_IDS)
def sharing(request):
    return request.param


@pytest.mark.parametrize("name", list(UNETS))
def test_every_level_equals_physical_slicing(name, sharing):
    denoiser, bank = make(name), bank_for(name, sharing)
    dense = forward(denoiser, 0.75)
    for stage, tau in enumerate(TAUS):
        for level, sparsity in enumerate(LEVELS):
            with reference(denoiser, bank, level, stage):
                expected = forward(denoiser, tau)
            attach(denoiser, bank, [sparsity] * 2)
            got = forward(denoiser, tau)
            pruner_of(denoiser).detach()
            assert relative(got, expected) < TOLERANCE, (level, stage)
    assert torch.equal(forward(denoiser, 0.75), dense)


def test_orders_differ_by_stage():
    """Or else nothing above would have tested orders per stage."""
    bank = bank_for("sd15", "stage-stage")
    orders = [bank.orders[group.name] for group in bank.groups if group.kind == "channel"]
    assert any(not torch.equal(order[0], order[1]) for order in orders)


@pytest.mark.parametrize("only", [["channel"], ["head", "channel"]], ids="+".join)
def test_some_kinds(only):
    host = UNetHost(make("sdxl"))
    bank = prune(host, calibration_for("sdxl"), levels=LEVELS, kinds=only, layer_allocation="uniform")
    assert {group.kind for group in bank.groups} == set(only)
    with reference(host.denoiser, bank, 2, 0):
        expected = forward(host.denoiser, 0.5)
    attach(host.denoiser, bank, [0.6])
    assert relative(forward(host.denoiser, 0.5), expected) < TOLERANCE


WAYS = {
    "all": {"levels": [0.6, 0.0]},
    "trimmed": {"levels": [0.6, 0.3], "trim": True},
    "active": {"levels": [0.6, 0.0], "resident": "active"},
    "active and trimmed": {"levels": [0.6, 0.3], "resident": "active"},
}


@pytest.fixture(params=list(WAYS))
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("name", ["scale shift", "sdxl"])
def test_detached_leaves_no_trace(name, sharing, way):
    """The weights shown and saved stay the dense ones throughout, and come back bit for bit, norms included."""
    denoiser, bank = make(name), bank_for(name, sharing)
    state, structure = state_of(denoiser), inside(denoiser)
    parameters = {key: id(parameter) for key, parameter in denoiser.named_parameters()}
    dense = [forward(denoiser, tau) for tau in TAUS]
    pruned = []
    for _ in range(2):
        attach(denoiser, bank, **way)
        pruned.append([forward(denoiser, tau) for tau in (*TAUS, TAUS[0])])
        assert same_state(state, state_of(denoiser))
        pruner_of(denoiser).detach()
        assert same_state(state, state_of(denoiser)) and structure == inside(denoiser)
        assert parameters == {key: id(parameter) for key, parameter in denoiser.named_parameters()}
        assert all(torch.equal(forward(denoiser, tau), old) for tau, old in zip(TAUS, dense, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*pruned, strict=True)) and torch.equal(pruned[0][0], pruned[0][2])
    attach(denoiser, bank, way["levels"])
    assert all(torch.equal(forward(denoiser, tau), old) for tau, old in zip(TAUS, pruned[0], strict=False))


@pytest.mark.parametrize("levels", [[0.3, 0.6], [0.0, 0.6], [0.0, 0.0]], ids=str)
def test_active_never_holds_more_than_dense(sharing, levels):
    """Packed rows (GEGLU) and orders per stage included, which need a buffer where everything is resident."""
    denoiser, bank = make("scale shift"), bank_for("scale shift", sharing)
    dense = resident_bytes(denoiser)
    attach(denoiser, bank, levels, resident="active")
    for tau in (*TAUS, *TAUS):
        forward(denoiser, tau)
        assert resident_bytes(denoiser) <= dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_change(sharing, way, dtype):
    denoiser, bank = make("scale shift"), bank_for("scale shift", sharing)
    expected = state_of(copy.deepcopy(denoiser).to(dtype))
    attach(denoiser, bank, **way)
    single = [forward(denoiser, tau) for tau in TAUS]
    denoiser.to(dtype)
    for tau, old in zip(TAUS, single, strict=True):
        assert relative(forward(denoiser, tau).float(), old) < (0.1 if dtype == torch.bfloat16 else TOLERANCE)
    assert same_state(expected, state_of(denoiser))
    pruner_of(denoiser).detach()
    assert same_state(expected, state_of(denoiser))


def test_deepcopy_is_independent(sharing, way):
    denoiser, bank = make("scale shift"), bank_for("scale shift", sharing)
    state = state_of(denoiser)
    attach(denoiser, bank, **way)
    pruned = [forward(denoiser, tau) for tau in TAUS]
    twin = copy.deepcopy(denoiser)
    pruner_of(denoiser).detach()
    assert same_state(state, state_of(denoiser))
    assert all(torch.equal(forward(twin, tau), old) for tau, old in zip(TAUS, pruned, strict=True))
    pruner_of(twin).detach()
    assert same_state(state, state_of(twin))


def test_channels_last(sharing):
    """The memory layout that convolutions run fastest in."""
    denoiser, bank = make("sd15"), bank_for("sd15", sharing)
    attach(denoiser, bank, [0.3, 0.6])
    expected = [forward(denoiser, tau) for tau in TAUS]
    pruner_of(denoiser).detach()
    denoiser.to(memory_format=torch.channels_last)
    strides = {key: parameter.stride() for key, parameter in denoiser.named_parameters()}
    state = state_of(denoiser)
    attach(denoiser, bank, [0.3, 0.6])
    assert all(relative(forward(denoiser, tau), old) < TOLERANCE for tau, old in zip(TAUS, expected, strict=True))
    pruner_of(denoiser).detach()
    assert same_state(state, state_of(denoiser))
    assert strides == {key: parameter.stride() for key, parameter in denoiser.named_parameters()}


def test_norm_without_weights():
    """Nothing to slice, but its number of groups follows."""
    denoiser = make("sd15")
    for name, module in list(denoiser.named_modules()):
        if name.endswith("norm2") and isinstance(module, nn.GroupNorm):
            plain = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, affine=False)
            denoiser.get_submodule(name.rpartition(".")[0]).norm2 = plain
    host = UNetHost(denoiser)
    bank = prune(host, method="magnitude", levels=LEVELS, kinds=["channel"], layer_allocation="uniform")
    with reference(denoiser, bank, 2, 0):
        expected = forward(denoiser, 0.5)
    attach(denoiser, bank, [0.6])
    assert relative(forward(denoiser, 0.5), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["scale shift", "sdxl"])
def test_summary_counts_what_a_sliced_model_has(name):
    denoiser, bank = make(name), bank_for(name, "shared-shared")
    counts = []
    for level in range(3):
        with reference(denoiser, bank, level, 0):
            # A compensated consumer gets a bias even where the dense one has none; none is without here.
            counts.append(sum(parameter.numel() for parameter in denoiser.parameters()))
    attach(denoiser, bank, list(LEVELS))
    summary = summarise(pruner_of(denoiser))
    assert [row.parameters for row in summary.stages] == counts
    sizes = sum(group.size for group in bank.groups if group.kind == "channel")
    assert summary.stages[0].channels == f"{sizes}/{sizes}" and "channels" in summary.kinds
    assert "channels" in str(summary) and f"{sizes}/{sizes}" in str(summary)


class _Conv(nn.Conv2d):
    """As quantisers do: a subclass whose weight is something else."""


class _Norm(nn.GroupNorm):
    """The same for norms."""


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("conv1", _Conv, "conv1` is a _Conv, not a plain torch.nn.Linear or torch.nn.Conv2d"),
        ("norm2", _Norm, "norm2` is a _Norm, not a plain torch.nn.GroupNorm"),
    ],
)
def test_subclasses_are_refused(name, cls, message):
    denoiser, bank = make("sd15"), bank_for("sd15", "shared-shared")
    state = state_of(denoiser)
    getattr(denoiser.down_blocks[0].resnets[0], name).__class__ = cls
    with pytest.raises(StagePruneError, match=message):
        attach(denoiser, bank, [0.3, 0.6])
    assert same_state(state, state_of(denoiser)) and pruner_of(denoiser) is None


def test_offloaded_norm_is_refused():
    denoiser, bank = make("sd15"), bank_for("sd15", "shared-shared")
    norm_at(denoiser, f"{CONV}.norm2")._hf_hook = object()
    with pytest.raises(StagePruneError, match=r"norm2` is offloaded by accelerate"):
        attach(denoiser, bank, [0.3, 0.6])


@pytest.mark.parametrize("fail_at", [1, 5, 30])
@pytest.mark.parametrize("function", ["to_prefix", "to_gathered", "to_levels", "to_offloaded_rows"])
def test_enabling_that_fails_changes_nothing(sharing, monkeypatch, function, fail_at):
    denoiser, bank, calls, real = make("sd15"), bank_for("sd15", sharing), [], getattr(swap, function)
    state, structure = state_of(denoiser), inside(denoiser)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(pruner, function, failing)
    resident = "active" if function == "to_offloaded_rows" else "all"
    try:
        attach(denoiser, bank, [0.3, 0.6], resident=resident).detach()
    except MemoryError:
        assert pruner_of(denoiser) is None
    assert same_state(state, state_of(denoiser)) and structure == inside(denoiser)
