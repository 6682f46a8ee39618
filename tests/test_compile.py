"""torch.compile: one graph per level, none after the first image, and the numbers of eager mode."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from stageprune import Bundle, StageSchedule, disable_stage_pruning, enable_stage_pruning
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import prune
from stageprune.core.runtime import pruner_of
from support import LEVELS, SCHEDULE, TAUS, forward, images, latents, make_pipe, relative, same_state, state_of
from zoo import drive, make_pipeline

TOLERANCE = 1e-4
LAYOUTS = 2  # DiT's first block sees its input in another memory layout, so even dense it takes two graphs

two_banks = pytest.mark.parametrize("bank", ["shared-shared", "stage-stage"], indirect=True)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def room():
    """Room for all graphs of a test in dynamo's cache, so that they can be counted."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


class Counting:
    """A backend that runs the captured graph as it is and counts the captures."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compile_blocks(denoiser, backend, fullgraph=True):
    for block in denoiser.transformer_blocks:
        block.compile(backend=backend, fullgraph=fullgraph)


@two_banks
def test_blocks_have_one_graph_per_level(pipe, bundle, bank, room):
    enable_stage_pruning(pipe, bundle)
    expected = latents(pipe)
    backend = Counting()
    compile_blocks(pipe.transformer, backend)
    assert relative(latents(pipe), expected) < TOLERANCE
    graphs, variants = backend.graphs, len(set(pruner_of(pipe.transformer)._bound))
    assert variants == (4 if bank.stages == 1 else 5)
    assert LAYOUTS * variants <= graphs <= 3 * variants, "blocks of one width share a graph, and levels do not"
    for _ in range(2):
        assert relative(latents(pipe), expected) < TOLERANCE
        images(pipe)
    latents(pipe, steps=10)
    assert backend.graphs == graphs, "no later image may compile again"


@two_banks
def test_compiling_comes_first_and_disabling_last(pipe, bundle, room):
    """The usual order: a pipeline is compiled when it is loaded, and stage pruning is enabled later."""
    dense, state = latents(pipe), state_of(pipe.transformer)
    enable_stage_pruning(pipe, bundle)
    expected = latents(pipe)
    disable_stage_pruning(pipe)
    backend = Counting()
    compile_blocks(pipe.transformer, backend)
    assert relative(latents(pipe), dense) < TOLERANCE
    assert backend.graphs == LAYOUTS
    enable_stage_pruning(pipe, bundle)
    assert relative(latents(pipe), expected) < TOLERANCE
    disable_stage_pruning(pipe)
    graphs = backend.graphs
    assert relative(latents(pipe), dense) < TOLERANCE
    assert backend.graphs == graphs, "dense again is no new graph"
    assert same_state(state_of(pipe.transformer), state)


@pytest.mark.parametrize("levels", [5, 8])
@pytest.mark.parametrize("layers", ["uniform", "measured"])
def test_a_schedule_of_many_levels_compiles_with_the_default_settings(calibration, levels, layers):
    """A five-stage schedule, and the default bank's eight levels, with fullgraph, which makes a full cache an error.

    With layers of one width a level takes a graph for all blocks; with measured ones, a graph for each that differs.
    """
    pipe = make_pipe()
    bank = prune(DiffusersHost(pipe), calibration, multiple=8, layer_allocation=layers)
    assert len(bank.sparsities) == 8
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels(bank.sparsities[:levels])))
    expected = latents(pipe, steps=16)
    backend = Counting()
    compile_blocks(pipe.transformer, backend)
    assert relative(latents(pipe, steps=16), expected) < TOLERANCE
    blocks = {
        (
            level,
            *(counts[level] for name, counts in bank.kept.items() if name.startswith(f"blocks.{i}.")),
            LAYOUTS * (i == 0),
        )
        for level in range(levels)
        for i in range(3)
    }
    assert backend.graphs == len(blocks) and (layers == "measured" or len(blocks) == LAYOUTS * levels)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("bank", ["shared-shared"], indirect=True)
def test_whole_model(pipe, bundle, room, how):
    """The switch itself stays outside of the graph, and the graph after it follows the level."""
    dense = latents(pipe)
    enable_stage_pruning(pipe, bundle)
    expected = latents(pipe)
    disable_stage_pruning(pipe)
    backend = Counting()
    if how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    else:
        pipe.transformer.compile(backend=backend)
    assert relative(latents(pipe), dense) < TOLERANCE
    pipe.enable_stage_pruning(bundle)
    assert relative(latents(pipe), expected) < TOLERANCE
    graphs = backend.graphs
    assert graphs > 0
    assert relative(latents(pipe), expected) < TOLERANCE
    assert backend.graphs == graphs
    pipe.disable_stage_pruning()
    assert relative(latents(pipe), dense) < TOLERANCE


@two_banks
def test_level_switch_is_seen_by_a_compiled_block(pipe, bundle, room):
    """The same block at each level in turn: a graph that forgot to guard would return the first level's output."""
    enable_stage_pruning(pipe, bundle)
    running = pruner_of(pipe.transformer)
    expected = [forward(pipe.transformer, tau) for tau in TAUS]
    assert len({float(output.sum()) for output in expected}) == 5
    compile_blocks(pipe.transformer, "eager")
    for tau, output in [*zip(TAUS, expected, strict=True)] * 2:
        assert relative(forward(pipe.transformer, tau), output) < TOLERANCE
        assert LEVELS[running.level] == SCHEDULE.levels[TAUS.index(tau)]


@pytest.mark.parametrize("bank", ["stage-stage"], indirect=True)
def test_deepcopy_of_an_enabled_denoiser_compiles(enabled):
    expected = forward(enabled.transformer, 0.3)
    twin = copy.deepcopy(enabled.transformer)
    compile_blocks(twin, "eager")
    assert relative(forward(twin, 0.3), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile's default backend")
def test_inductor(pipe, banks):
    """The real compiler, once, on one block: dense and pruned."""
    enable_stage_pruning(pipe, Bundle(banks["shared-shared"], SCHEDULE))
    expected = [forward(pipe.transformer, tau) for tau in (0.9, 0.5)]
    pipe.transformer.transformer_blocks[0].compile(fullgraph=True)
    for tau, output in zip((0.9, 0.5), expected, strict=True):
        assert relative(forward(pipe.transformer, tau), output) < TOLERANCE


@pytest.mark.slow
def test_resnets_of_many_shapes_have_room():
    """Blocks of one class share a limit of graphs, but in a UNet they all differ: it must grow with their number."""
    torch._dynamo.config.recompile_limit = 8
    pipe = make_pipeline("sdxl")
    bank = prune(DiffusersHost(pipe), method="random", levels=(0.0, 0.5), kinds=["channel"])
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels([0, 0.5])))
    expected = drive(pipe, 1.0, steps=2)
    resnets = [module for module in pipe.unet.modules() if isinstance(module, ResnetBlock2D)]
    assert len(resnets) > 6
    for resnet in resnets:
        resnet.compile(backend=Counting(), fullgraph=True)  # past the limit this would raise
    assert relative(drive(pipe, 1.0, steps=2), expected) < TOLERANCE
