"""Offloading beside stage pruning: of the whole denoiser or of its blocks it changes nothing, of its layers it is
refused before a picture is made.
"""

from __future__ import annotations

from functools import cache

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading

from stageprune import (
    Bundle,
    StagePruneError,
    StageSchedule,
    calibrate,
    disable_stage_pruning,
    enable_stage_pruning,
    prune,
)
from stageprune.core.groups import measure_cost
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.runtime import pruner_of
from support import same_state, state_of
from zoo import drive, make_pipeline, prompts_for

CPU = torch.device("cpu")
GUIDANCE = 3.0
LEVELS = (0.0, 0.3, 0.6)
NAMES = ["dit", "sd15", "flux"]
RUNNING = {
    "all": {"schedule": StageSchedule.from_levels([0, 0.3, 0.6])},
    "active": {"schedule": StageSchedule.from_levels([0.3, 0.6, 0.3]), "resident": "active"},
}
"""`active` is trimmed too: a layer holds none of its dense weights then."""


def denoiser_of(pipe):
    return DiffusersHost(pipe).denoiser


def by_model(denoiser):
    """What pipe.enable_model_cpu_offload() does; that itself wants an accelerator."""
    accelerate.cpu_offload_with_hook(denoiser, execution_device=CPU)


def by_block(denoiser):
    apply_group_offloading(denoiser, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def by_layer(denoiser):
    """What pipe.enable_sequential_cpu_offload() does."""
    accelerate.cpu_offload(denoiser, CPU)


def by_leaf(denoiser):
    apply_group_offloading(denoiser, onload_device=CPU, offload_type="leaf_level")


def all_hooks_removed(denoiser):
    """The remedies of the messages; pipe.remove_all_hooks() does the first for each component."""
    remove_hook_from_module(denoiser, recurse=True)
    HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook("group_offloading")


def measured(pipe):
    return calibrate(pipe, prompts_for(pipe) * 4, steps=3, stages=1)


@cache
def bank_for(name):
    pipe = make_pipeline(name)
    return prune(pipe, measured(pipe), levels=LEVELS, multiple=8, layer_allocation="uniform")


def enable(pipe, name, way="all"):
    options = dict(RUNNING[way])
    enable_stage_pruning(pipe, Bundle(bank_for(name), options.pop("schedule")), **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", RUNNING)
@pytest.mark.parametrize("offload", [by_layer, by_leaf])
def test_offloading_layers_while_enabled_is_refused_and_undone(name, way, offload):
    pipe = make_pipeline(name)
    denoiser = denoiser_of(pipe)
    state, dense = state_of(denoiser), drive(pipe, GUIDANCE)
    enable(pipe, name, way)
    pruned = drive(pipe, GUIDANCE)
    with pytest.raises(StagePruneError, match=r"`\S+\.\S+` runs the levels.*enable_model_cpu_offload\(\).*Remove what"):
        offload(denoiser)
    assert torch.equal(drive(pipe, GUIDANCE), pruned), "what was offloaded before the refusal is no staged layer"
    all_hooks_removed(denoiser)
    assert torch.equal(drive(pipe, GUIDANCE), pruned)
    disable_stage_pruning(pipe)
    assert same_state(state, state_of(denoiser))
    assert torch.equal(drive(pipe, GUIDANCE), dense)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", RUNNING)
@pytest.mark.parametrize("offload", [by_model, by_block])
@pytest.mark.parametrize("first", ["enable", "offload"])
def test_offloading_the_model_or_its_blocks_changes_nothing(name, way, offload, first):
    pipe = make_pipeline(name)
    denoiser = denoiser_of(pipe)
    state, dense = state_of(denoiser), drive(pipe, GUIDANCE)
    enable(pipe, name, way)
    pruned = drive(pipe, GUIDANCE)
    if first == "offload":
        disable_stage_pruning(pipe)
    offload(denoiser)
    if first == "offload":
        enable(pipe, name, way)
    assert torch.equal(drive(pipe, GUIDANCE), pruned)
    disable_stage_pruning(pipe)
    assert same_state(state, state_of(denoiser))
    assert torch.equal(drive(pipe, GUIDANCE), dense)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offload", [by_model, by_block])
def test_measuring_an_offloaded_model_gives_the_same_bank(name, offload):
    pipe = make_pipeline(name)
    offload(denoiser_of(pipe))
    bank, plain = prune(pipe, measured(pipe), levels=LEVELS, multiple=8, layer_allocation="uniform"), bank_for(name)
    assert bank.kept == plain.kept
    for made, wanted in zip(bank.consumers.values(), plain.consumers.values(), strict=True):
        assert torch.equal(made.weight, wanted.weight) and torch.equal(made.bias, wanted.bias)
    assert measure_cost(denoiser_of(pipe)) == measure_cost(denoiser_of(make_pipeline(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offload", [by_layer, by_leaf])
def test_offloaded_layers_are_refused_before_anything_runs(name, offload):
    pipe, plain = make_pipeline(name), make_pipeline(name)
    calibration, denoiser = measured(plain), denoiser_of(pipe)
    offload(denoiser)
    calls = []
    denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    for refused in (
        lambda: measured(pipe),
        lambda: prune(pipe, calibration, levels=LEVELS),
        lambda: enable(pipe, name),
    ):
        with pytest.raises(StagePruneError, match=r"(offloaded by accelerate|hook of diffusers).*Remove that with"):
            refused()
    assert not calls and pruner_of(denoiser) is None
    all_hooks_removed(denoiser)
    enable(pipe, name)
    enable(plain, name)
    assert torch.equal(drive(pipe, GUIDANCE), drive(plain, GUIDANCE)), "removed hooks leave a forward in the layers"


def test_weights_taken_by_a_hook_around_the_layers_are_missed():
    """accelerate can hook a block with all that is in it: no staged layer is touched, but its weight is gone."""
    pipe = make_pipeline("dit")
    enable(pipe, "dit")
    accelerate.cpu_offload(pipe.transformer, CPU, preload_module_classes=["BasicTransformerBlock"])
    with pytest.raises(StagePruneError, match=r"weight of `\S+` has been taken.*Load the pipeline anew"):
        drive(pipe, GUIDANCE)
    with pytest.raises(StagePruneError, match="Load the pipeline anew"):
        disable_stage_pruning(pipe)


@pytest.mark.parametrize("first", ["enable", "offload"])
def test_blocks_that_can_be_skipped_are_not_offloaded_by_themselves(first):
    pipe = make_pipeline("flux")
    state = state_of(pipe.transformer)
    calibration = calibrate(pipe, prompts_for(pipe), steps=3, kinds=["block"])
    bundle = Bundle(prune(pipe, calibration, method="depth", levels=[0, 0.3]), StageSchedule.uniform(0.3))
    if first == "enable":
        enable_stage_pruning(pipe, bundle)
        with pytest.raises(StagePruneError, match="runs the levels of stage pruning"):
            by_block(pipe.transformer)
    else:
        by_block(pipe.transformer)
        with pytest.raises(StagePruneError, match="has a hook of diffusers"):
            enable_stage_pruning(pipe, bundle)
    all_hooks_removed(pipe.transformer)
    if first == "offload":
        enable_stage_pruning(pipe, bundle)
    drive(pipe, GUIDANCE)
    disable_stage_pruning(pipe)
    assert same_state(state, state_of(pipe.transformer))
    assert torch.equal(drive(pipe, GUIDANCE), drive(make_pipeline("flux"), GUIDANCE))
