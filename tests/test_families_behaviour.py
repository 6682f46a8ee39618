"""What holds for every family: enabled, disabled, saved, compiled, interrupted.

On a class-conditional transformer, a UNet with two text encoders, and a transformer with joint attention and guidance
by a second call.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import stageprune
from stageprune import Bundle, StagePruneError, StageSchedule, disable_stage_pruning, enable_stage_pruning
from stageprune.core.errors import BankError
from stageprune.core.groups import find_groups
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers.bare import DenoiserHost
from stageprune.core.pruning import prune
from stageprune.core.runtime import pruner_of
from support import inside, raising, relative, same_state, state_of
from zoo import NAMES, drive, generate, make_denoiser, make_pipeline, prompts_for

FAMILIES = ("dit", "sdxl", "flux")
LEVELS = (0.0, 0.3, 0.6)
EDGES = [0.7, 0.4]
"""Four steps of each family's sampler fall into all three stages."""
SCHEDULE = StageSchedule.from_levels([0, 0.3, 0.6], EDGES)
GUIDANCE = 3.0
TOLERANCE = 1e-4


@cache
def bundle_for(name: str, sharing: str = "shared") -> Bundle:
    """Calibrated on the pipeline's own trajectories, in three stages."""
    pipe = make_pipeline(name)
    calibration = stageprune.calibrate(pipe, prompts_for(pipe) * 4, steps=4, guidance=GUIDANCE, stages=EDGES)
    bank = prune(DiffusersHost(pipe), calibration, levels=LEVELS, multiple=16, order=sharing, consumers=sharing)
    return Bundle(bank, SCHEDULE)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return make_pipeline(name)


def images(pipe):
    return generate(pipe, GUIDANCE, "pt")


def denoiser_of(pipe):
    return DiffusersHost(pipe).denoiser


@pytest.mark.parametrize("sharing", ["shared", "stage"])
def test_enable_disable_leaves_no_trace(pipe, name, sharing):
    denoiser = denoiser_of(pipe)
    before, state, structure = images(pipe), state_of(denoiser), inside(denoiser)
    for interrupted in (False, True):
        pipe.enable_stage_pruning(bundle_for(name, sharing))
        pruned = images(pipe)
        assert relative(pruned, before) > 0.01
        if interrupted:
            with (
                pytest.raises(KeyboardInterrupt),
                raising(denoiser.get_submodule(blocks_of(denoiser)[-1]), KeyboardInterrupt, call=3),
            ):
                images(pipe)
            assert torch.equal(images(pipe), pruned), "an exception must not leave a wrong level behind"
        assert same_state(state_of(denoiser), state)
        pipe.disable_stage_pruning()
        assert torch.equal(images(pipe), before)
        assert same_state(state_of(denoiser), state) and inside(denoiser) == structure


def test_disable_straight_after_an_exception(pipe, name):
    denoiser = denoiser_of(pipe)
    before, state = images(pipe), state_of(denoiser)
    enable_stage_pruning(pipe, bundle_for(name))
    with (
        pytest.raises(KeyboardInterrupt),
        raising(denoiser.get_submodule(blocks_of(denoiser)[-1]), KeyboardInterrupt, call=2),
    ):
        images(pipe)
    disable_stage_pruning(pipe)
    assert torch.equal(images(pipe), before) and same_state(state_of(denoiser), state)


def test_the_host_runs_what_the_pipeline_runs(pipe, name):
    """What is calibrated and measured is what the user gets, pruned too."""
    enable_stage_pruning(pipe, bundle_for(name))
    assert torch.equal(DiffusersHost(pipe).decode(drive(pipe, GUIDANCE)), images(pipe))


def test_level_zero_everywhere_is_dense(pipe, name):
    dense = drive(pipe, GUIDANCE)
    enable_stage_pruning(pipe, Bundle(bundle_for(name).bank, StageSchedule.from_levels([0.0] * 3, EDGES)))
    assert relative(drive(pipe, GUIDANCE), dense) < TOLERANCE


def test_every_call_runs_the_level_of_its_stage(pipe, name):
    enable_stage_pruning(pipe, bundle_for(name))
    levels = levels_of_calls(pipe, lambda: images(pipe))
    calls = 2 if name == "flux" else 1  # its guidance is a call of its own
    expected = [SCHEDULE.levels[SCHEDULE.stage_of(tau)] for tau in DiffusersHost(pipe).taus(4) for _ in range(calls)]
    assert levels == expected and set(levels) == set(LEVELS)


def test_save_pretrained_while_enabled_saves_the_dense_model(pipe, name, tmp_path):
    denoiser = denoiser_of(pipe)
    before, state = drive(pipe, GUIDANCE), state_of(denoiser)
    enable_stage_pruning(pipe, bundle_for(name))
    images(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    if name == "flux":
        again.default_sample_size = pipe.default_sample_size
    assert same_state(state_of(denoiser_of(again)), state)
    assert torch.equal(drive(again, GUIDANCE), before)


def test_bundle_round_trip(pipe, name, tmp_path):
    bundle = bundle_for(name)
    bundle.save(tmp_path)
    enable_stage_pruning(pipe, bundle)
    expected = drive(pipe, GUIDANCE)
    disable_stage_pruning(pipe)
    enable_stage_pruning(pipe, tmp_path)
    assert torch.equal(drive(pipe, GUIDANCE), expected)


def test_a_bundle_of_another_family_is_refused(pipe, name):
    other = FAMILIES[FAMILIES.index(name) - 1]
    state = state_of(denoiser_of(pipe))
    classes = [type(denoiser).__name__ for denoiser in (make_denoiser(other), denoiser_of(pipe))]
    with pytest.raises(BankError, match="the bank is for a {}, got a {}. Load what it was made from".format(*classes)):
        enable_stage_pruning(pipe, bundle_for(other))
    assert same_state(state_of(denoiser_of(pipe)), state) and not pipe.is_stage_pruning_enabled()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dit", {"num_layers": 2}),
        ("sdxl", {"transformer_layers_per_block": (1, 1, 1)}),
        ("sdxl", {"attention_head_dim": (2, 8, 6)}),
        ("flux", {"num_single_layers": 1}),
    ],
)
def test_a_bundle_of_another_architecture_is_refused(name, config):
    other = make_pipeline(name, **config)
    state = state_of(denoiser_of(other))
    with pytest.raises(StagePruneError, match=r"differ|is not a group of this|does not exist"):
        enable_stage_pruning(other, bundle_for(name))
    assert same_state(state_of(denoiser_of(other)), state)


def test_other_weights_are_refused(name):
    """The same architecture: what the bundle compensates is not there."""
    other = make_pipeline(name, seed=1)
    with pytest.raises(BankError, match=r"the bank is for another \w+: the weights differ"):
        enable_stage_pruning(other, bundle_for(name))
    assert not other.is_stage_pruning_enabled()


def test_inactive_levels_in_host_memory_and_deepcopy(pipe, name):
    bundle = bundle_for(name)
    enable_stage_pruning(pipe, bundle)
    expected = drive(pipe, GUIDANCE)
    disable_stage_pruning(pipe)
    enable_stage_pruning(pipe, bundle, resident="active")
    assert torch.equal(drive(pipe, GUIDANCE), expected)
    component = DiffusersHost(pipe).component
    twin = copy.deepcopy(denoiser_of(pipe))
    disable_stage_pruning(pipe)
    pipe.register_modules(**{component: twin})
    assert torch.equal(drive(pipe, GUIDANCE), expected)


@pytest.mark.parametrize(("name", "whole"), [("sdxl", False), ("flux", False), ("flux", True)])
def test_compiled_pipelines(pipe, name, whole):
    """The numbers of eager mode, no graph after the first image, and dense again at the end. (DiT: test_compile.py.)"""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    bundle = Bundle(bundle_for(name).bank, StageSchedule.from_levels([0, 0.6]))
    denoiser = denoiser_of(pipe)
    dense = drive(pipe, GUIDANCE)
    enable_stage_pruning(pipe, bundle)
    expected = drive(pipe, GUIDANCE)
    blocks = [denoiser.get_submodule(path) for path in blocks_of(denoiser)]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        for module in [denoiser] if whole else [blocks[0], blocks[-1]]:
            module.compile(backend=backend, fullgraph=not whole)
        assert relative(drive(pipe, GUIDANCE), expected) < TOLERANCE
        count = len(graphs)
        assert relative(drive(pipe, GUIDANCE), expected) < TOLERANCE
        assert len(graphs) == count > 0
        disable_stage_pruning(pipe)
        assert relative(drive(pipe, GUIDANCE), dense) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dit"])
def test_the_main_job(name, tmp_path):
    """Calibrate, prune, allocate, save, enable and generate, with nothing but the public functions and defaults."""
    pipe = make_pipeline(name)
    dense = images(pipe)
    calibration = stageprune.calibrate(pipe, prompts_for(pipe) * 4, steps=4)
    assert calibration.provenance["guidance"] == DiffusersHost(pipe).default_guidance
    bank = stageprune.prune(pipe, calibration, levels=LEVELS, multiple=16)
    allocation = stageprune.allocate(pipe, bank, target="macs:0.9", stages=2)
    Bundle(bank, allocation.schedule).save(tmp_path / "bundle")
    pipe.enable_stage_pruning(tmp_path / "bundle")
    assert "at 4 steps: " in str(pipe.stage_pruning_summary(steps=4))
    assert 1e-3 < relative(images(pipe), dense) < 1.0
    pipe.disable_stage_pruning()
    assert torch.equal(images(pipe), dense)


def test_a_bare_denoiser_knows_its_place():
    expected = {name: "unet" if name in ("sd15", "sdxl") else "transformer" for name in NAMES}
    assert {name: DenoiserHost(make_denoiser(name)).component for name in NAMES} == expected
    assert {name: DiffusersHost(make_pipeline(name)).component for name in NAMES} == expected


def levels_of_calls(pipe, run):
    """The sparsity that each call of the denoiser runs at."""
    denoiser, levels = denoiser_of(pipe), []
    running = pruner_of(denoiser)
    hook = denoiser.register_forward_hook(lambda *_: levels.append(running.bank.sparsities[running.level]))
    run()
    hook.remove()
    return levels


def blocks_of(denoiser):
    """The blocks that are repeated, which is what is compiled one by one; of a dense twin, as levels change widths."""
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)
    return [path for group in find_groups(twin) for path in group.blocks]
