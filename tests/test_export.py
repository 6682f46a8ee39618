"""Levels as plain models: what stock diffusers loads gives what the level gives; what it cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch
from diffusers import DiTPipeline, FluxPipeline

import stageprune
from stageprune import Bank, Bundle, StageSchedule, calibrate, enable_stage_pruning, export, prune
from stageprune.core.errors import BankError, ExportError, ScheduleError, StagePruneError
from stageprune.core.groups import find_groups
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers import export as export_module
from stageprune.core.plain_folder import RECORD
from support import images, inside, make_pipe, relative, same_state, state_of
from zoo import NAMES, drive, make_pipeline, prompts_for

GUIDANCE = 3.0
EDGES = [0.7, 0.4]
TOLERANCE = 1e-4

GONE = {  # blocks that the config of each family can do without
    "dit": ["transformer_blocks.1"],
    "sd15": ["mid_block.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.0.transformer_blocks.0"],
    "sdxl": [
        "down_blocks.2.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.1",
        "up_blocks.0.attentions.1.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
    ],
    "sd3": ["transformer_blocks.0"],
    "sd35": ["transformer_blocks.0"],  # of the two with a second attention, the second becomes the first
    "flux": ["transformer_blocks.0", "single_transformer_blocks.1"],
}
IMPOSSIBLE = {
    "dit": (["transformer_blocks.0"], "a DiT's output layer reads the timestep by that block's norm"),
    "sd3": (["transformer_blocks.2"], "always builds its last one without a text output"),
    "sdxl": (["mid_block.attentions.0.transformer_blocks.1"], "leaves 1 transformer blocks in the middle and 2 in the"),
}


def denoiser_of(pipe):
    return DiffusersHost(pipe).denoiser


def without(pipe, gone) -> Bank:
    """A bank whose level 0.5 leaves out exactly these blocks."""
    group = next(group for group in find_groups(denoiser_of(pipe)) if group.kind == "block")
    left_out = [group.blocks.index(path) for path in gone]
    order = torch.tensor([*(i for i in range(group.size) if i not in left_out), *left_out])
    bank = prune(pipe, method="random", kinds=["block"], levels=[0.5])
    kept = {"blocks": (group.size, group.size - len(gone))}
    return dataclasses.replace(bank, orders={"blocks": order}, kept=kept)


@cache
def width_bank(name: str, sharing: str = "shared", kinds: tuple[str, ...] = ("head", "neuron")) -> Bank:
    pipe = make_pipeline(name)
    calibration = calibrate(pipe, prompts_for(pipe) * 4, steps=4, guidance=GUIDANCE, stages=EDGES, kinds=kinds)
    return prune(pipe, calibration, levels=[0.5], multiple=16, order=sharing, consumers=sharing)


def pruned(pipe, bank, schedule=None):
    """Latents of the level through the run time."""
    enable_stage_pruning(pipe, Bundle(bank, schedule or StageSchedule.uniform(0.5)))
    try:
        return drive(pipe, GUIDANCE)
    finally:
        stageprune.disable_stage_pruning(pipe)


def plain(pipe, folder):
    """Latents of the pipeline with the denoiser that stock diffusers loads from `folder`."""
    loaded = type(denoiser_of(pipe)).from_pretrained(folder)
    pipe.register_modules(**{DiffusersHost(pipe).component: loaded})
    return drive(pipe, GUIDANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_shallower_model_is_the_level(name, tmp_path):
    pipe = make_pipeline(name)
    denoiser, bank = denoiser_of(pipe), without(pipe, GONE[name])
    expected, dense = pruned(pipe, bank), drive(pipe, GUIDANCE)
    state, structure = state_of(denoiser), inside(denoiser)
    folder = export(denoiser, bank, tmp_path / "x", sparsity=0.5)
    assert same_state(state, state_of(denoiser)) and inside(denoiser) == structure
    got = plain(pipe, folder)
    assert relative(got, expected) < TOLERANCE < relative(got, dense)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (denoiser, denoiser_of(pipe))]
    removed = sum(p.numel() for path in GONE[name] for p in denoiser.get_submodule(path).parameters())
    assert parameters[0] - parameters[1] == removed
    record = json.loads((folder / RECORD).read_text())
    assert record["kept"] == {"blocks": bank.kept["blocks"][1]} and record["form"] == "small"


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_blocks_that_no_configuration_can_do_without(name, tmp_path):
    pipe, (gone, message) = make_pipeline(name), IMPOSSIBLE[name]
    bank = without(pipe, gone)
    with pytest.raises(ExportError, match=message):
        export(denoiser_of(pipe), bank, tmp_path / "x", sparsity=0.5)
    assert not list(tmp_path.iterdir())
    expected = pruned(pipe, bank)
    export(denoiser_of(pipe), bank, tmp_path / "zeros", sparsity=0.5, form="zeros")
    assert relative(plain(pipe, tmp_path / "zeros"), expected) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_widths_that_no_configuration_can_say(name, tmp_path):
    """Refused, and nothing is written; filled with zeros, stock diffusers gives the level's latents."""
    pipe, bank = make_pipeline(name), width_bank(name)
    denoiser = denoiser_of(pipe)
    with pytest.raises(ExportError, match=f"no configuration of {type(denoiser).__name__} in diffusers .* gives this"):
        export(denoiser, bank, tmp_path / "x", sparsity=0.5)
    assert not list(tmp_path.iterdir())
    expected, dense, state = pruned(pipe, bank), drive(pipe, GUIDANCE), state_of(denoiser)
    folder = export(denoiser, bank, tmp_path / "zeros", sparsity=0.5, form="zeros")
    assert same_state(state, state_of(denoiser))
    got = plain(pipe, folder)
    assert relative(got, expected) < TOLERANCE < relative(got, dense)
    for group in bank.groups:
        removed = bank.order(group.name, 0)[bank.kept[group.name][1] :]
        for producer in group.producers:
            assert not denoiser_of(pipe).get_submodule(producer.path).weight[group.rows(removed, producer.blocks)].any()


def test_channels_of_convolutions(tmp_path):
    pipe = make_pipeline("sd15")
    calibration = calibrate(pipe, ["fox"] * 12, steps=8, guidance=1.0, kinds=["channel"])
    bank = prune(pipe, calibration, levels=[0.5])
    expected = pruned(pipe, bank)
    folder = export(pipe.unet, bank, tmp_path / "x", sparsity=0.5, form="zeros")
    assert relative(plain(pipe, folder), expected) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 2])
def test_one_stage_of_a_bank_that_has_several(stage, tmp_path):
    pipe, bank = make_pipeline("dit"), width_bank("dit", "stage")
    with pytest.raises(BankError, match=r"`stage` must be from 0 \(noisiest\) to 2, got 3"):
        export(pipe.transformer, bank, tmp_path / "y", sparsity=0.5, stage=3, form="zeros")
    expected = pruned(pipe, bank.at_stage(stage))
    folder = export(pipe.transformer, bank, tmp_path / "x", sparsity=0.5, stage=stage, form="zeros")
    assert relative(plain(pipe, folder), expected) < TOLERANCE
    assert json.loads((folder / RECORD).read_text())["stage"] == stage


@pytest.mark.parametrize("form", ["small", "zeros"])
def test_a_whole_pipeline(form, tmp_path):
    pipe = make_pipe()
    bank = without(pipe, GONE["dit"])
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.uniform(0.5)))
    expected = images(pipe)
    stageprune.disable_stage_pruning(pipe)
    folder = export(pipe, Bundle(bank, StageSchedule.uniform(0.5)), tmp_path / "x", form=form)
    dense = pipe.transformer
    loaded = DiTPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert relative(images(loaded), expected) < TOLERANCE
    assert len(loaded.transformer.transformer_blocks) == (2 if form == "small" else 3)
    assert pipe.transformer is dense and pipe.config["transformer"][1] == "DiTTransformer2DModel"


def test_a_whole_pipeline_with_text_encoders(tmp_path):
    pipe = make_pipeline("flux")
    bank = without(pipe, GONE["flux"])
    loaded = FluxPipeline.from_pretrained(export(pipe, bank, tmp_path / "x", sparsity=0.5))
    loaded.default_sample_size = 8
    loaded.set_progress_bar_config(disable=True)
    assert relative(drive(loaded, GUIDANCE), pruned(pipe, bank)) < TOLERANCE


def test_from_a_bundle_folder_and_over_an_earlier_export(tmp_path):
    pipe = make_pipe()
    Bundle(without(pipe, GONE["dit"])).save(tmp_path / "bundle")
    for _ in range(2):
        export(pipe.transformer, tmp_path / "bundle", tmp_path / "x", sparsity=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StagePruneError, match="was not written by stageprune"):
        export(pipe.transformer, tmp_path / "bundle", tmp_path / "mine", sparsity=0.5)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    pipe = make_pipe()
    pipe.transformer.to(dtype)
    folder = export(pipe.transformer, without(pipe, GONE["dit"]), tmp_path / "x", sparsity=0.5)
    loaded = type(pipe.transformer).from_pretrained(folder, torch_dtype=dtype)
    assert torch.equal(
        loaded.transformer_blocks[1].ff.net[2].weight, pipe.transformer.transformer_blocks[2].ff.net[2].weight
    )


def test_the_dense_level_is_the_dense_model(tmp_path):
    pipe = make_pipe()
    folder = export(pipe.transformer, width_bank("dit"), tmp_path / "x", sparsity=0)
    assert same_state(state_of(type(pipe.transformer).from_pretrained(folder)), state_of(pipe.transformer))


def test_an_export_that_went_wrong_is_not_written(tmp_path, monkeypatch):
    """It is loaded and run before its folder gets its name."""
    pipe = make_pipe()
    renumbered = export_module.renumbered
    monkeypatch.setattr(
        export_module, "renumbered", lambda *a: {name: 2 * tensor for name, tensor in renumbered(*a).items()}
    )
    with pytest.raises(ExportError, match=r"differs from the level by .* nothing was written"):
        export(pipe.transformer, without(pipe, GONE["dit"]), tmp_path / "x", sparsity=0.5)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path):
    pipe, bank = make_pipe(), width_bank("dit")
    with pytest.raises(ExportError, match=r"say which level to export by `sparsity`: .* the bank has 0, 0.5"):
        export(pipe, bank, tmp_path / "x")
    two = Bundle(bank, StageSchedule.from_levels([0, 0.5]))
    with pytest.raises(ExportError, match="say which level"):
        export(pipe, two, tmp_path / "x")
    with pytest.raises(ScheduleError, match=r"no level of sparsity 0.3"):
        export(pipe, bank, tmp_path / "x", sparsity=0.3)
    with pytest.raises(ExportError, match="`form` must be 'small' or 'zeros', got 'tiny'"):
        export(pipe, bank, tmp_path / "x", sparsity=0.5, form="tiny")
    with pytest.raises(BankError, match="the bank is for another DiTTransformer2DModel"):
        export(make_pipe(seed=1), bank, tmp_path / "x", sparsity=0.5)
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.uniform(0.5)))
    with pytest.raises(StagePruneError, match="stage pruning is enabled"):
        export(pipe, bank, tmp_path / "x", sparsity=0.5)
