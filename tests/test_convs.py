"""Convolutions and the group norms between them: patches, compensation, the run time, bundles; on tiny UNets."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from stageprune import Bundle, StageSchedule, find_groups
from stageprune.core.calibration import calibrate
from stageprune.core.calibration.hessian import HessianRecorder, design_rows
from stageprune.core.errors import BankError, BundleError, CalibrationError, GroupError, StagePruneError
from stageprune.core.groups import family_of, measure_cost, width_groups
from stageprune.core.groups.group import Cols, Group, Rows, check_groups
from stageprune.core.groups.layer import inputs_of, layer_at, matrix_columns, matrix_of, norm_at, taps_of
from stageprune.core.host import Conditions, SamplerState
from stageprune.core.hosts.diffusers import reader_for
from stageprune.core.pruning import prune
from stageprune.core.pruning.compensate import compensate, damp, with_bias
from stageprune.core.runtime import StagePruner, pruner_of, resident_bytes, summarise
from support import (
    SHARING_IDS,
    SHARINGS,
    hessian_of,
    inside,
    least_squares,
    reference,
    relative,
    same_state,
    state_of,
)

KINDS = ("head", "neuron", "channel")
LEVELS = (0.0, 0.3, 0.6)
DAMPING = 0.01
EDGES = 2
TAUS = [0.75, 0.25]
TOLERANCE = 1e-5
UNETS = {
    "sd15": ("sd15", {}),
    "scale shift": ("sd15", {"resnet_time_scale_shift": "scale_shift", "sample_size": (6, 10)}),
    "sdxl": ("sdxl", {"sample_size": 12}),
}
CONV = "down_blocks.0.resnets.0"


@dataclass
class UNetHost:
    """The least that makes a denoiser into a trajectory: a few steps down its own output, on fixed text."""

    denoiser: nn.Module
    component: str = "unet"
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def tau_reader(self):
        return reader_for(self.denoiser)

    def taus(self, steps):
        return [1 - (index + 0.5) / steps for index in range(steps)]

    def encode(self, prompts):
        return Conditions({"seed": torch.tensor(prompts)})

    def start(self, seeds, steps):
        inputs = family_of(self.denoiser).example_inputs(self.denoiser, batch=len(seeds), seed=seeds[0])
        return SamplerState(0, inputs["sample"], (steps, inputs))

    def advance(self, state, conditions, guidance, until):
        latents, (steps, inputs) = state.latents, state.sampler
        for index in range(state.index, until):
            times = torch.full((len(latents),), round(1000 * self.taus(steps)[index]))
            output = self.denoiser(**{**inputs, "sample": latents, "timestep": times}, return_dict=False)[0]
            latents = latents - output / steps
        return SamplerState(until, latents, state.sampler)

    def describe(self):
        return {}


def make(name, seed=0, **changes):
    kind, config = UNETS[name]
    return zoo.make_denoiser(kind, seed, **{**config, **changes})


def forward(denoiser, tau):
    inputs = family_of(denoiser).example_inputs(denoiser, batch=2, seed=9)
    inputs["timestep"] = torch.full((2,), round(1000 * tau))
    with torch.no_grad():
        return denoiser(**inputs, return_dict=False)[0]


def attach(denoiser, bank, levels, **ways):
    schedule = StageSchedule.from_levels(levels)
    return StagePruner(denoiser, bank, schedule, reader_for(denoiser), **ways)


@pytest.fixture(scope="module")
def calibrations():
    """By name of the UNet, made once."""
    made = {}

    def get(name):
        if name not in made:
            host = UNetHost(make(name))
            made[name] = calibrate(host, list(range(8)), steps=16, stages=EDGES, kinds=KINDS, batch_size=8)
        return made[name]

    return get


@pytest.fixture(scope="module")
def banks(calibrations):
    """By name of the UNet and way to share, made once."""
    made = {}

    def get(name, sharing):
        if (name, sharing) not in made:
            order, consumers = SHARINGS[SHARING_IDS.index(sharing)]
            made[name, sharing] = prune(
                UNetHost(make(name)),
                calibrations(name),
                levels=LEVELS,
                kinds=KINDS,
                multiple=8,
                order=order,
                consumers=consumers,
            )
        return made[name, sharing]

    return get


@pytest.fixture(params=SHARING_IDS)
def sharing(request):
    return request.param


CONVS = {
    "plain": {},
    "same": {"padding": 1},
    "strided": {"padding": 1, "stride": (2, 3)},
    "dilated": {"dilation": (2, 1), "padding": (0, 2)},
    "named": {"padding": "same", "dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "point": {"kernel_size": 1},
    "oblong": {"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 1), "bias": False},
}


@pytest.mark.parametrize("config", list(CONVS.values()), ids=list(CONVS))
@pytest.mark.parametrize("numbers", [1, 5000, 10**9])
def test_a_convolution_is_a_matrix_over_patches(config, numbers):
    """In parts of any size, whatever the padding: the matrix times the rows is what the convolution gives."""
    conv = nn.Conv2d(5, 7, **{"kernel_size": 3, **config}).double()
    inputs = torch.randn(2, 5, 11, 13, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(inputs)
        parts = list(design_rows(conv, inputs, numbers))
        assert len(parts) == (expected.shape[2] if numbers == 1 else len(parts))
        assert numbers == 1 or all(part.numel() <= numbers for part in parts)
        got = [F.linear(part, matrix_of(conv), conv.bias) for part in parts]
    got = torch.cat([part.view(2, -1, expected.shape[3], 7) for part in got], 1).movedim(-1, 1)
    assert float((got - expected).abs().max()) < 1e-12


def test_columns_of_a_channel():
    conv = nn.Conv2d(4, 2, (2, 3))
    assert taps_of(conv) == 6 and inputs_of(conv) == 4 and taps_of(nn.Linear(4, 2)) == 1
    columns = matrix_columns(torch.tensor([3, 0]), taps_of(conv))
    assert torch.equal(matrix_of(conv)[:, columns], conv.weight[:, [3, 0]].flatten(1))
    assert torch.equal(matrix_columns(torch.tensor([3, 0]), 1), torch.tensor([3, 0]))


def test_recorder_in_parts_equals_whole(monkeypatch):
    denoiser = make("sd15")
    path = f"{CONV}.conv2"
    layer, inputs = layer_at(denoiser, path), torch.randn(3, 32, 8, 8)
    rows = torch.cat(list(design_rows(layer, inputs))).double()
    for numbers in (1, 3 * 8 * 288, 10**9):
        monkeypatch.setattr(design_rows, "__defaults__", (numbers,))
        recorder = HessianRecorder(denoiser, {path: 288}, 2)
        recorder.stage, recorder.alpha = 1, 0.5
        recorder.add_batch(path, inputs)
        assert relative(recorder.hessians[path][1].double(), 0.5 * hessian_of(rows)) < 1e-6
        assert recorder.rows[path].tolist() == [0, 192] and not recorder.hessians[path][0].any()


def dense_patches(denoiser, path, seeds=range(4), steps=8):
    """All rows that the convolution at `path` sees on dense trajectories, float64."""
    rows, host = [], UNetHost(denoiser)
    hook = layer_at(denoiser, path).register_forward_pre_hook(
        lambda module, args: rows.append(torch.cat(list(design_rows(module, args[0].double()))))
    )
    with torch.no_grad():
        host.advance(host.start(list(seeds), steps), host.encode(list(seeds)), 1.0, steps)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("path", [f"{CONV}.conv2", "mid_block.resnets.1.conv2"])
def test_compensation_is_least_squares_on_patches(path):
    """From a Hessian in float64, so that nothing hides the error."""
    denoiser = make("sd15").double()
    rows, layer = dense_patches(denoiser, path), layer_at(denoiser, path)
    assert len(rows) > rows.shape[1]
    group = next(group for group in find_groups(denoiser) if group.name == path.removesuffix(".conv2"))
    units = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
    columns = matrix_columns(group.columns(units), taps_of(layer))
    weight, hessian = with_bias(matrix_of(layer), layer.bias), hessian_of(rows)
    counts = [kept * group.width * 9 for kept in (3, 1)]
    ridge = float(hessian.diagonal()[:-1].mean()) * DAMPING
    solutions = compensate(weight, damp(hessian, DAMPING), columns, counts)
    for count, (got, bias) in zip(counts, solutions, strict=True):
        expected, shift = least_squares(weight, rows, columns[:count], ridge)
        assert relative(got, expected) < 1e-9 and relative(bias, shift) < 1e-9


def test_whole_bank_is_least_squares_on_patches():
    """End to end, through the recorder's float32 sums."""
    host = UNetHost(make("sd15").double())
    calibration = calibrate(host, list(range(4)), steps=16, kinds=["channel"], batch_size=4)
    bank = prune(host, calibration, levels=LEVELS, kinds=["channel"])
    assert len(bank.consumers) == 2 * 8
    for group in bank.groups:
        path = group.consumers[0].path
        rows, layer = dense_patches(host.denoiser, path, range(4), 16), layer_at(host.denoiser, path)
        ridge = float(hessian_of(rows).diagonal()[:-1].mean()) * DAMPING
        for level in (1, 2):
            units = bank.order(group.name, 0)[: bank.kept[group.name][level]]
            columns = matrix_columns(group.columns(units), 9)
            weight, bias = least_squares(with_bias(matrix_of(layer), layer.bias), rows, columns, ridge)
            got = bank.consumer(path, level, 0)
            assert got.weight.shape == (len(layer.weight), len(units) * group.width, 3, 3)
            assert relative(got.weight.flatten(1), weight) < 1e-4 and relative(got.bias, bias) < 1e-4


def test_compensated_convolutions_are_nearer_to_dense(calibrations):
    """On latents that they were not made for, at every level."""
    host = UNetHost(make("sd15"))
    calibration = calibrations("sd15")
    errors = {}
    for method in ("obs", "magnitude"):
        bank = prune(host, calibration, method=method, levels=LEVELS, kinds=["channel"])
        dense = forward(host.denoiser, 0.5)
        for level in (1, 2):
            with reference(host.denoiser, bank, level, 0):
                errors[method, level] = float((forward(host.denoiser, 0.5) - dense).square().mean())
    assert all(errors["obs", level] < 0.75 * errors["magnitude", level] for level in (1, 2)), errors


@pytest.mark.parametrize("name", list(UNETS))
def test_every_level_equals_physical_slicing(banks, name, sharing):
    denoiser, bank = make(name), banks(name, sharing)
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


def test_orders_differ_by_stage(banks):
    """Or else nothing above would have tested orders per stage."""
    bank = banks("sd15", "stage-stage")
    orders = [bank.orders[group.name] for group in bank.groups if group.kind == "channel"]
    assert any(not torch.equal(order[0], order[1]) for order in orders)


@pytest.mark.parametrize("only", [["channel"], ["head", "channel"]], ids="+".join)
def test_some_kinds(calibrations, only):
    host = UNetHost(make("sdxl"))
    bank = prune(host, calibrations("sdxl"), levels=LEVELS, kinds=only)
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
def test_detached_leaves_no_trace(banks, name, sharing, way):
    """The weights shown and saved stay the dense ones throughout, and come back bit for bit, norms included."""
    denoiser, bank = make(name), banks(name, sharing)
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


def test_active_never_holds_more_than_dense(banks):
    denoiser, bank = make("sdxl"), banks("sdxl", "shared-shared")
    dense = resident_bytes(denoiser)
    attach(denoiser, bank, [0.3, 0.6], resident="active")
    for tau in TAUS:
        forward(denoiser, tau)
        # Packed rows (GEGLU) have a buffer beside them.
        gathered = sum(
            buffer.numel() * 4
            for key, buffer in denoiser.named_buffers()
            if "net.0.proj.stage_" in key and buffer is not None
        )
        assert resident_bytes(denoiser) <= dense + gathered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_change(banks, sharing, way, dtype):
    denoiser, bank = make("scale shift"), banks("scale shift", sharing)
    expected = state_of(copy.deepcopy(denoiser).to(dtype))
    attach(denoiser, bank, **way)
    single = [forward(denoiser, tau) for tau in TAUS]
    denoiser.to(dtype)
    for tau, old in zip(TAUS, single, strict=True):
        assert relative(forward(denoiser, tau).float(), old) < (0.1 if dtype == torch.bfloat16 else TOLERANCE)
    assert same_state(expected, state_of(denoiser))
    pruner_of(denoiser).detach()
    assert same_state(expected, state_of(denoiser))


def test_deepcopy_is_independent(banks, sharing, way):
    denoiser, bank = make("scale shift"), banks("scale shift", sharing)
    state = state_of(denoiser)
    attach(denoiser, bank, **way)
    pruned = [forward(denoiser, tau) for tau in TAUS]
    twin = copy.deepcopy(denoiser)
    pruner_of(denoiser).detach()
    assert same_state(state, state_of(denoiser))
    assert all(torch.equal(forward(twin, tau), old) for tau, old in zip(TAUS, pruned, strict=True))
    pruner_of(twin).detach()
    assert same_state(state, state_of(twin))


def test_channels_last(banks, sharing):
    """The memory layout that convolutions run fastest in."""
    denoiser, bank = make("sd15"), banks("sd15", sharing)
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


def test_norm_without_weights(calibrations):
    """Nothing to slice, but its number of groups follows."""
    denoiser = make("sd15")
    for name, module in list(denoiser.named_modules()):
        if name.endswith("norm2") and isinstance(module, nn.GroupNorm):
            plain = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, affine=False)
            denoiser.get_submodule(name.rpartition(".")[0]).norm2 = plain
    host = UNetHost(denoiser)
    bank = prune(host, method="magnitude", levels=LEVELS, kinds=["channel"])
    with reference(denoiser, bank, 2, 0):
        expected = forward(denoiser, 0.5)
    attach(denoiser, bank, [0.6])
    assert relative(forward(denoiser, 0.5), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["scale shift", "sdxl"])
def test_summary_counts_what_a_sliced_model_has(banks, name):
    denoiser, bank = make(name), banks(name, "shared-shared")
    counts = []
    for level in range(3):
        with reference(denoiser, bank, level, 0):
            # A compensated consumer gets a bias even where the dense one has none; none is without here.
            counts.append(sum(parameter.numel() for parameter in denoiser.parameters()))
    attach(denoiser, bank, list(LEVELS))
    summary = summarise(pruner_of(denoiser))
    assert [row.parameters for row in summary.stages] == counts
    sizes = sum(group.size for group in bank.groups if group.kind == "channel")
    assert summary.stages[0].channels == f"{sizes}/{sizes}" and summary.prunes_channels
    assert "channels" in str(summary) and f"{sizes}/{sizes}" in str(summary)


def test_bundle_round_trip(banks, sharing, tmp_path):
    denoiser, bank = make("scale shift"), banks("scale shift", sharing)
    bundle = Bundle(bank, StageSchedule.from_levels([0.3, 0.6]))
    again = Bundle.load(bundle.save(tmp_path / "bundle"))
    assert again.bank.groups == bank.groups and again.bank.consumer_shapes == bank.consumer_shapes
    assert all(torch.equal(again.bank.consumers[key].weight, value.weight) for key, value in bank.consumers.items())
    results = []
    for used in (bank, again.bank):
        attach(denoiser, used, [0.3, 0.6])
        results.append([forward(denoiser, tau) for tau in TAUS])
        pruner_of(denoiser).detach()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    smaller = Bundle.load(Bundle(bank, StageSchedule.from_levels([0.6] * 2)).save(tmp_path / "b", only_used=True))
    attach(denoiser, smaller.bank, [0.6, 0.6])
    assert relative(forward(denoiser, 0.25), results[0][1]) < TOLERANCE


@pytest.mark.parametrize("shape", [[32, 32, 3], [32, 32, 3, 0], [32, 32, 3, True], [32, 32, 1, 3]])
def test_bundle_with_a_wrong_kernel(banks, tmp_path, shape):
    bank = banks("scale shift", "shared-shared")
    wrong = replace(bank, consumer_shapes={**bank.consumer_shapes, f"{CONV}.conv2": tuple(shape)})
    folder = Bundle(wrong).save(tmp_path / "bundle")
    with pytest.raises(BundleError, match=rf"`{CONV}.conv2` must be \[out, in\], or \[out, in, kh, kw\]|of shape"):
        Bundle.load(folder)


def test_bank_of_another_kernel(banks):
    denoiser, bank = make("sd15"), banks("sd15", "shared-shared")
    wrong = replace(bank, consumer_shapes={**bank.consumer_shapes, f"{CONV}.conv2": (32, 32, 5, 5)})
    with pytest.raises(BankError, match=rf"consumer `{CONV}.conv2` is 32 x 32 x 5 x 5, this denoiser's differs"):
        wrong.check_denoiser(denoiser)


def test_calibration_without_channels(calibrations):
    """The default: Hessians of convolutions are large. Pruning them then says what is missing."""
    host = UNetHost(make("sd15"))
    plain = calibrate(host, list(range(4)), steps=8)
    assert not any("conv2" in path for path in plain.hessians)
    assert plain.fingerprint.mismatch(calibrations("sd15").fingerprint) is None
    assert {group.kind for group in prune(host, plain, levels=[0.5]).groups} == {"head", "neuron"}
    with pytest.raises(CalibrationError, match=r"no Hessian for `down_blocks.0.resnets.0.conv2`.*with the `kinds`"):
        prune(host, plain, levels=[0.5], kinds=KINDS)
    with pytest.raises(CalibrationError, match=r"`kinds` must be some of \['channel', 'head', 'neuron'\], got \['x'\]"):
        calibrate(host, [0], kinds=["x"])
    with pytest.raises(CalibrationError, match=r"conv2` has 289 columns but saw only 64 inputs"):
        calibrate(host, [0], steps=1, kinds=["channel"])


def group_of_convs(**changes):
    group = Group("g", "channel", 4, 8, (Rows(f"{CONV}.conv1"),), (Cols(f"{CONV}.conv2"),), (f"{CONV}.norm2",))
    return replace(group, **changes)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (group_of_convs(companions=("conv_norm_out2",)), "`conv_norm_out2` does not exist"),
        (
            group_of_convs(companions=("down_blocks.0.attentions.0.transformer_blocks.0.norm1",)),
            r"norm1` is a norm over the channels of a pruned group, of class LayerNorm; only a torch.nn.GroupNorm",
        ),
        (group_of_convs(size=8, width=4), "companion .* has 4 norm groups over 32 channels, expected .*: 8 over 32"),
        (group_of_convs(size=3), r"producer `.*conv1` has 32 rows, expected 1 x 3 x 8"),
        (group_of_convs(producers=(), companions=(), size=5), r"conv2` has 32 columns, expected at least 0 \+ 5 x 8"),
    ],
)
def test_groups_that_do_not_fit(group, message):
    check_groups(make("sd15"), [group_of_convs()])
    with pytest.raises(GroupError, match=message):
        check_groups(make("sd15"), [group])


def test_depthwise_convolutions_are_refused():
    denoiser = make("sd15")
    denoiser.down_blocks[0].resnets[0].conv1 = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    with pytest.raises(GroupError, match=r"conv1` is a Conv2d with groups=32; only groups=1 can be sliced"):
        find_groups(denoiser)


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
def test_subclasses_are_refused(banks, name, cls, message):
    denoiser, bank = make("sd15"), banks("sd15", "shared-shared")
    state = state_of(denoiser)
    getattr(denoiser.down_blocks[0].resnets[0], name).__class__ = cls
    with pytest.raises(StagePruneError, match=message):
        attach(denoiser, bank, [0.3, 0.6])
    assert same_state(state, state_of(denoiser)) and pruner_of(denoiser) is None


def test_offloaded_norm_is_refused(banks):
    denoiser, bank = make("sd15"), banks("sd15", "shared-shared")
    norm_at(denoiser, f"{CONV}.norm2")._hf_hook = object()
    with pytest.raises(StagePruneError, match=r"norm2` is offloaded by accelerate"):
        attach(denoiser, bank, [0.3, 0.6])


@pytest.mark.parametrize("fail_at", [1, 5, 30])
@pytest.mark.parametrize("function", ["to_prefix", "to_gathered", "to_levels"])
def test_enabling_that_fails_changes_nothing(banks, sharing, monkeypatch, function, fail_at):
    from stageprune.core.runtime import pruner, swap

    denoiser, bank, calls, real = make("sd15"), banks("sd15", sharing), [], getattr(swap, function)
    state, structure = state_of(denoiser), inside(denoiser)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(pruner, function, failing)
    try:
        attach(denoiser, bank, [0.3, 0.6]).detach()
    except MemoryError:
        assert pruner_of(denoiser) is None
    assert same_state(state, state_of(denoiser)) and structure == inside(denoiser)


def test_kept_channels(banks):
    """Coarse like heads, never none; groups of unlike cost all follow the same share."""
    bank = banks("sdxl", "shared-shared")
    cost = measure_cost(make("sdxl"))
    assert all(bank.kept[group.name] == (4, 3, 2) for group in bank.groups if group.kind == "channel")
    assert bank.provenance["realised"] == pytest.approx(LEVELS, abs=0.05)
    assert set(cost.units) == {group.name for group in width_groups(find_groups(make("sdxl")))}
    assert "8 of channels" in str(banks("sd15", "shared-shared"))
