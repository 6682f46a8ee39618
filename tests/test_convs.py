"""Convolutions as matrices over patches: Hessians, compensation, groups and bundles; on tiny UNets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_unets import CONV, KINDS, LEVELS, TAUS, UNetHost, attach, bank_for, calibration_for, forward, make
from torch import nn
from torch.nn import functional as F

from stageprune import Bundle, StageSchedule, find_groups
from stageprune.core.calibration import calibrate
from stageprune.core.calibration.hessian import HessianRecorder, design_rows, drawn_rows, sample_rows
from stageprune.core.errors import BankError, BundleError, CalibrationError, GroupError
from stageprune.core.groups import measure_cost, width_groups
from stageprune.core.groups.group import Cols, Group, Rows, check_groups
from stageprune.core.groups.layer import inputs_of, layer_at, matrix_columns, matrix_of, taps_of
from stageprune.core.pruning import prune
from stageprune.core.pruning.compensate import compensate, damp, with_bias
from stageprune.core.runtime import pruner_of
from support import SHARING_IDS, hessian_of, least_squares, reference, relative

DAMPING = 0.01
TOLERANCE = 1e-5


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
        parts = [part.flatten(0, 1) for part in sample_rows(conv, inputs, numbers)]
        assert len(parts) == (expected.shape[2] if numbers == 1 else len(parts))
        assert numbers == 1 or all(part.numel() <= numbers for part in parts)
        got = [F.linear(part, matrix_of(conv), conv.bias) for part in parts]
    got = torch.cat([part.view(2, -1, expected.shape[3], 7) for part in got], 1).movedim(-1, 1)
    assert float((got - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("config", list(CONVS.values()), ids=list(CONVS))
@pytest.mark.parametrize("numbers", [1, 5000, 10**9])
def test_drawn_rows_are_rows(config, numbers):
    """The very rows of the places that are drawn, in their order, whatever the parts."""
    conv, inputs = nn.Conv2d(5, 7, **{"kernel_size": 3, **config}), torch.randn(2, 5, 11, 13)
    rows = torch.cat(list(sample_rows(conv, inputs)), 1)
    parts = list(drawn_rows(conv, inputs, 0.4, torch.Generator().manual_seed(3), numbers))
    chosen = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(3)) < 0.4
    assert torch.equal(torch.cat(parts, 1), rows[:, chosen])
    assert len(parts) == (chosen.sum() if numbers == 1 else len(parts))
    assert numbers == 1 or all(part.numel() <= numbers for part in parts)


@pytest.mark.parametrize("layer", [nn.Linear(5, 2), nn.Conv2d(5, 2, 3)], ids=["linear", "conv"])
def test_a_draw_may_pick_nothing(layer):
    inputs = torch.randn(2, 3, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 5, 4, 4)
    (rows,) = drawn_rows(layer, inputs, 0.0, torch.Generator())
    assert rows.shape == (2, 0, matrix_of(layer).shape[1])


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
        monkeypatch.setattr(sample_rows, "__defaults__", (numbers,))
        recorder = HessianRecorder(denoiser, {path: 288}, 2)
        recorder.stage, recorder.alpha = 1, 0.5
        with recorder.recording([path]):
            recorder.add_batch(path, inputs)
        assert relative(recorder.hessians[path][1].double(), 0.5 * hessian_of(rows)) < 1e-6
        assert recorder.rows[path].tolist() == [0, 192] and not recorder.hessians[path][0].any()


def test_what_is_drawn_does_not_depend_on_the_parts(monkeypatch):
    denoiser = make("sd15")
    path = f"{CONV}.conv2"
    inputs, found = torch.randn(3, 32, 8, 8), []
    for numbers in (1, 3 * 8 * 288, 10**9):
        monkeypatch.setattr(drawn_rows, "__defaults__", (numbers,))
        recorder = HessianRecorder(denoiser, {path: 288}, 1, {path: 0.4})
        recorder.begin(7)
        with recorder.recording([path]):
            recorder.add_batch(path, inputs)
        found.append((int(recorder.rows[path]), recorder.hessians[path]))
    assert all(rows == found[0][0] and relative(table, found[0][1]) < 1e-6 for rows, table in found)
    assert found[0][0] == pytest.approx(0.4 * 192, rel=0.4) and found[0][0] % 3 == 0


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
    bank = prune(host, calibration, levels=LEVELS, kinds=["channel"], layer_allocation="uniform")
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


def test_compensated_convolutions_are_nearer_to_dense():
    """On latents that they were not made for, at every level."""
    host = UNetHost(make("sd15"))
    calibration = calibration_for("sd15")
    errors = {}
    for method in ("obs", "magnitude"):
        bank = prune(host, calibration, method=method, levels=LEVELS, kinds=["channel"], layer_allocation="uniform")
        dense = forward(host.denoiser, 0.5)
        for level in (1, 2):
            with reference(host.denoiser, bank, level, 0):
                errors[method, level] = float((forward(host.denoiser, 0.5) - dense).square().mean())
    assert all(errors["obs", level] < 0.75 * errors["magnitude", level] for level in (1, 2)), errors


def test_bundle_round_trip(sharing, tmp_path):
    denoiser, bank = make("scale shift"), bank_for("scale shift", sharing)
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
def test_bundle_with_a_wrong_kernel(tmp_path, shape):
    bank = bank_for("scale shift", "shared-shared")
    wrong = replace(bank, consumer_shapes={**bank.consumer_shapes, f"{CONV}.conv2": tuple(shape)})
    folder = Bundle(wrong).save(tmp_path / "bundle")
    with pytest.raises(BundleError, match=rf"`{CONV}.conv2` must be \[out, in\], or \[out, in, kh, kw\]|of shape"):
        Bundle.load(folder)


def test_bank_of_another_kernel():
    denoiser, bank = make("sd15"), bank_for("sd15", "shared-shared")
    wrong = replace(bank, consumer_shapes={**bank.consumer_shapes, f"{CONV}.conv2": (32, 32, 5, 5)})
    with pytest.raises(BankError, match=rf"consumer `{CONV}.conv2` is 32 x 32 x 5 x 5, this denoiser's differs"):
        wrong.check_denoiser(denoiser)


def test_calibration_without_channels():
    """The default: Hessians of convolutions are large. Pruning them then says what is missing."""
    host = UNetHost(make("sd15"))
    plain = calibrate(host, list(range(4)), steps=8)
    assert not any("conv2" in path for path in plain.hessians)
    assert plain.fingerprint.mismatch(calibration_for("sd15").fingerprint) is None
    assert {group.kind for group in prune(host, plain, levels=[0.5], layer_allocation="uniform").groups} == {
        "head",
        "neuron",
    }
    with pytest.raises(CalibrationError, match=r"no Hessian for `down_blocks.0.resnets.0.conv2`.*with the `kinds`"):
        prune(host, plain, levels=[0.5], kinds=KINDS)
    with pytest.raises(
        CalibrationError, match=r"`kinds` must be some of \['block', 'channel', 'head', 'neuron'\], got \['x'\]"
    ):
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


def test_kept_channels():
    """Coarse like heads, never none; groups of unlike cost all follow the same share."""
    bank = bank_for("sdxl", "shared-shared")
    cost = measure_cost(make("sdxl"))
    assert all(bank.kept[group.name] == (4, 3, 2) for group in bank.groups if group.kind == "channel")
    assert bank.provenance["realised"] == pytest.approx(LEVELS, abs=0.05)
    assert set(cost.units) == {group.name for group in width_groups(find_groups(make("sdxl")))}
    assert "8 of channels" in str(bank_for("sd15", "shared-shared"))
