"""Bundles that are good: saved, loaded, trimmed, replaced, found by name."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import stageprune
import zoo
from stageprune import Bundle, StageSchedule, disable_stage_pruning, enable_stage_pruning, load_bundle
from stageprune.core.bundle import FORMAT_VERSION, MANIFEST
from stageprune.core.bundle import bundle as bundle_module
from stageprune.core.errors import BundleError
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import prune
from stageprune.core.runtime import pruner_of
from support import LEVELS, SCHEDULE, images, state_of


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip_gives_bit_equal_images(pipe, bundle, tmp_path):
    enable_stage_pruning(pipe, bundle)
    expected = images(pipe)
    disable_stage_pruning(pipe)
    folder = bundle.save(tmp_path / "deep" / "bundle")
    for source in (folder, str(folder), Bundle.load(folder)):
        enable_stage_pruning(pipe, source)
        assert torch.equal(images(pipe), expected)
        disable_stage_pruning(pipe)


def test_round_trip_keeps_everything(bundle, tmp_path):
    first, again = bundle.bank, Bundle.load(bundle.save(tmp_path / "b"))
    second = again.bank
    assert again.schedule == bundle.schedule
    for name in ("denoiser", "component", "groups", "sparsities", "kept", "edges", "method", "order_sharing",
                 "consumer_sharing", "stages"):  # fmt: skip
        assert getattr(first, name) == getattr(second, name), name
    assert {k: tuple(v) for k, v in first.consumer_shapes.items()} == dict(second.consumer_shapes)
    assert first.fingerprint.mismatch(second.fingerprint) is None
    assert first.consumers.keys() == second.consumers.keys()
    assert all(torch.equal(first.orders[name], second.orders[name]) for name in first.orders)
    for key, consumer in first.consumers.items():
        assert torch.equal(consumer.weight, second.consumers[key].weight)
        assert torch.equal(consumer.bias, second.consumers[key].bias)
    assert json.dumps(first.provenance, sort_keys=True) == json.dumps(second.provenance, sort_keys=True)
    assert str(first) == str(second)


def test_saving_twice_gives_the_same_bytes(bundle, tmp_path):
    first, second = contents(bundle.save(tmp_path / "a")), contents(Bundle.load(tmp_path / "a").save(tmp_path / "b"))
    assert sorted(first) == ["README.md", "bank.safetensors", "stageprune.json"]
    assert first == second


def test_the_folder_holds_neither_pickle_nor_paths_of_this_machine(bundle, tmp_path):
    text = (bundle.save(tmp_path / "b") / MANIFEST).read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text
    data = json.loads(text)
    assert data["format_version"] == FORMAT_VERSION and data["denoiser"] == "DiTTransformer2DModel"
    assert data["provenance"]["calibration"]["steps"] == 5


def test_a_sampler_with_an_infinite_limit_is_told_as_text(tmp_path):
    """DPM-Solver++ has one among its defaults, and JSON has no infinity."""
    pipe = zoo.make_pipeline("sd15")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    calibration = stageprune.calibrate(pipe, zoo.PROMPTS, steps=3)
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = stageprune.Calibration.load(tmp_path / "calibration.safetensors")
    bank = stageprune.prune(pipe, loaded, levels=[0, 0.3], layer_allocation="uniform", multiple=8)
    again = Bundle.load(Bundle(bank).save(tmp_path / "bundle"))
    assert again.bank.provenance["calibration"]["scheduler_config"]["lambda_min_clipped"] == "-inf"


def test_a_bank_alone_can_be_saved(pipe, bank, tmp_path):
    again = Bundle.load(Bundle(bank).save(tmp_path / "b"))
    assert again.schedule is None
    with pytest.raises(BundleError, match="without a schedule cannot be trimmed"):
        Bundle(bank).save(tmp_path / "c", only_used=True)
    assert not (tmp_path / "c").exists()


def test_a_bank_of_the_dense_level_alone_can_be_saved_and_run(pipe, host, calibration, tmp_path):
    bank = prune(host, calibration, levels=[0.0], multiple=16)
    expected = images(pipe)
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.uniform(0)).save(tmp_path / "b"))
    assert torch.allclose(images(pipe), expected, atol=1e-5)


def test_a_bank_of_any_multiple_can_be_saved_and_loaded(host, tmp_path):
    bank = prune(host, method="magnitude", levels=[0.3, 0.6])  # multiples of 64 do not divide 160 neurons
    assert Bundle.load(Bundle(bank).save(tmp_path / "b")).bank.kept == bank.kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(pipe, calibration, dtype, tmp_path):
    pipe.transformer.to(dtype)
    bank = prune(DiffusersHost(pipe), calibration, levels=[0.5], multiple=16)
    again = Bundle.load(Bundle(bank).save(tmp_path / "b")).bank
    assert {consumer.weight.dtype for consumer in again.consumers.values()} == {dtype}


def test_only_used_is_smaller_and_runs_the_same(pipe, bank, tmp_path):
    schedule = StageSchedule.from_levels([0, 0.5, 0.5, 0.7, 0.5])
    bundle = Bundle(bank, schedule)
    enable_stage_pruning(pipe, bundle)
    expected = images(pipe)
    disable_stage_pruning(pipe)
    whole, small = bundle.save(tmp_path / "whole"), bundle.save(tmp_path / "small", only_used=True)
    sizes = [(folder / "bank.safetensors").stat().st_size for folder in (whole, small)]
    assert sizes[1] < 0.8 * sizes[0]
    trimmed = Bundle.load(small)
    assert trimmed.bank.sparsities == (0, 0.5, 0.7)
    enable_stage_pruning(pipe, trimmed)
    assert torch.equal(images(pipe), expected)


def test_only_used_tells_the_right_realised_sparsities(banks, tmp_path):
    """Model card and manifest list a number a level: those of the levels that are left."""
    bank = banks["shared-shared"]
    realised = dict(zip(LEVELS, bank.provenance["realised"], strict=True))
    folder = Bundle(bank, StageSchedule.from_levels([0, 0.5, 0.7])).save(tmp_path / "b", only_used=True)
    data = json.loads((folder / MANIFEST).read_text())
    assert data["realised"] == [realised[sparsity] for sparsity in data["sparsities"]]
    assert f"| 1 | 0.500 | {realised[0.5]:.3f} |" in (folder / "README.md").read_text()


def test_model_card(bundle, tmp_path):
    text = (bundle.save(tmp_path / "b") / "README.md").read_text()
    assert "calibrated on 24 prompts, 5 steps, guidance 1.5" in text
    assert "enable_stage_pruning" in text and str(bundle.schedule) in text


def test_saving_replaces_a_bundle_but_nothing_else(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    bundle.save(tmp_path / "empty")
    bundle.save(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(BundleError, match="exists and is not a bundle; it is not overwritten"):
            bundle.save(tmp_path / name)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["tensors", "card", "rename"])
def test_a_failure_while_saving_leaves_the_old_bundle(bundle, banks, tmp_path, monkeypatch, error, where):
    folder = bundle.save(tmp_path / "b")
    before = contents(folder)
    other = Bundle(banks["shared-shared"], StageSchedule.uniform(0.2))

    def fail(*_, **__):
        raise error

    real, calls = Path.replace, []

    def second_rename_fails(self, target):
        calls.append(1)
        return fail() if len(calls) == 2 else real(self, target)

    with monkeypatch.context() as patch:
        if where == "rename":
            patch.setattr(Path, "replace", second_rename_fails)
        else:
            patch.setattr(bundle_module, {"tensors": "save_file", "card": "model_card"}[where], fail)
        with pytest.raises(type(error)):
            other.save(folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"], "nothing half-written stays behind"


def test_load_bundle_by_name(bundle, tmp_path, monkeypatch):
    bundle.save(tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_bundle("user/name").schedule == SCHEDULE
    with pytest.raises(BundleError, match="someone/nothing-there: no such folder, and the Hub gave no such repository"):
        load_bundle("someone/nothing-there")
    with pytest.raises(BundleError, match="no such bundle folder"):
        load_bundle("./no/such/place")


def test_hub_snapshots_are_links_and_load(bundle, tmp_path):
    """The Hub's cache keeps files in `blobs` and links to them from `snapshots/<commit>`."""
    saved = bundle.save(tmp_path / "plain")
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(saved.iterdir()):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(blobs / str(index))
    assert Bundle.load(snapshot).schedule == SCHEDULE


def test_enabling_from_disk_does_not_tie_weights_to_the_bundle(pipe, bundle, tmp_path):
    enable_stage_pruning(pipe, bundle)
    before = {key: consumer.weight.clone() for key, consumer in bundle.bank.consumers.items()}
    for name, buffer in pipe.transformer.named_buffers():
        if "stage_weight" in name:
            buffer.zero_()
    assert all(torch.equal(consumer.weight, before[key]) for key, consumer in bundle.bank.consumers.items())
    assert pruner_of(pipe.transformer).bank is bundle.bank
    assert state_of(pipe.transformer)
