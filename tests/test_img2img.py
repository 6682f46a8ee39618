"""The stage depends on the noise level alone: runs that start or stop in the middle; pipelines without an adapter."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch

from stageprune import Bundle, StagePruneError, StageSchedule, disable_stage_pruning, enable_stage_pruning
from stageprune.core.hosts.diffusers import DiffusersHost, find_denoiser
from stageprune.core.pruning import prune
from stageprune.core.runtime import pruner_of
from support import same_state, state_of
from zoo import PROMPTS, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

LEVELS = (0.0, 0.2, 0.5, 0.7)
SCHEDULE = StageSchedule.from_levels([0.7, 0.2, 0.5, 0, 0.7])
STEPS = 10

TWINS = {
    "sd15": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}


def pruned_pipeline(name):
    """A pipeline and its bundle."""
    return make_pipeline(name), bundle_for(name)


@cache
def bundle_for(name):
    """By magnitude, which needs no data."""
    bank = prune(DiffusersHost(make_pipeline(name)), method="magnitude", levels=LEVELS, multiple=16)
    return Bundle(bank, SCHEDULE)


def twin_of(pipe, cls, **components):
    """Another pipeline around the same components."""
    twin = getattr(diffusers, cls).from_pipe(pipe, **components)
    twin.set_progress_bar_config(disable=True)
    return twin


def seeds():
    return [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]


def length(name):
    """T5 reads no more than the tiny tokenizer's length."""
    return {"max_sequence_length": 16} if name in ("sd3", "flux") else {}


def picture(name):
    """One image a prompt, at the size that the pipeline makes."""
    side = 32 if name == "sdxl" else 16
    return torch.rand(len(PROMPTS), 3, side, side, generator=torch.Generator().manual_seed(0))


def run(pipe, **arguments):
    """Latents, and the noise level and sparsity of each call of the enabled denoiser."""
    denoiser = find_denoiser(pipe)[1]
    pruner, calls = pruner_of(denoiser), []
    hook = denoiser.register_forward_hook(
        lambda _, args, kwargs, out: calls.append(
            (pruner.read_tau(args, kwargs), pruner.bank.sparsities[pruner.level])
        ),
        with_kwargs=True,
    )
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    latents = pipe(prompt=PROMPTS, generator=seeds(), **arguments).images
    hook.remove()
    return latents, calls


@pytest.mark.parametrize("strength", [0.6, 0.3])
@pytest.mark.parametrize("name", TWINS)
def test_img2img_switches_at_the_same_noise_levels(name, strength):
    pipe, bundle = pruned_pipeline(name)
    enable_stage_pruning(pipe, bundle)
    _, whole = run(pipe, **length(name))
    size = {"height": 16, "width": 16} if name in ("sd3", "flux") else {}
    _, part = run(twin_of(pipe, TWINS[name][0]), image=picture(name), strength=strength, **length(name), **size)
    assert whole[-len(part) :] == part, "the end of the same trajectory, level by level"
    assert len(part) == int(STEPS * strength)
    assert all(level == SCHEDULE.levels[SCHEDULE.stage_of(tau)] for tau, level in whole)
    assert len({level for _, level in whole}) == len(LEVELS)


@pytest.mark.parametrize("split", [0.5, 0.3])
def test_two_sdxl_pipelines_share_a_trajectory(split):
    """`denoising_end` and `denoising_start`: the second pipeline enters in the middle of a stage."""
    pipe, bundle = pruned_pipeline("sdxl")
    dense = pipe(PROMPTS, num_inference_steps=STEPS, generator=seeds(), output_type="latent").images
    enable_stage_pruning(pipe, bundle)
    expected, whole = run(pipe)
    first, begun = run(pipe, denoising_end=split)
    second, ended = run(twin_of(pipe, "StableDiffusionXLImg2ImgPipeline"), image=first, denoising_start=split)
    assert begun + ended == whole and len(begun) == round(STEPS * split)
    assert torch.equal(second, expected) and not torch.equal(second, dense)


@pytest.mark.parametrize(("name", "cls"), [(name, cls) for name, classes in TWINS.items() for cls in classes])
def test_pipelines_without_an_adapter_can_be_enabled(name, cls):
    pipe, bundle = pruned_pipeline(name)
    twin = twin_of(pipe, cls)
    component, denoiser = find_denoiser(twin)
    state = state_of(denoiser)
    assert denoiser is DiffusersHost(pipe).denoiser and component == DiffusersHost(pipe).component
    twin.enable_stage_pruning(bundle)
    assert twin.is_stage_pruning_enabled() and pipe.is_stage_pruning_enabled()
    assert str(twin.stage_pruning_summary()) == str(pipe.stage_pruning_summary())
    with pytest.raises(StagePruneError, match=f"{cls} cannot be calibrated or evaluated yet"):
        twin.stage_pruning_summary(steps=4)
    disable_stage_pruning(twin)
    assert same_state(state_of(denoiser), state)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_with_a_controlnet(name):
    """Its residuals have the width of the streams, which pruning leaves alone; the ControlNet itself stays dense."""
    pipe, bundle = pruned_pipeline(name)
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    cls = {"sd15": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}[name]
    twin = twin_of(pipe, cls, controlnet=controlnet.eval())
    arguments = {"image": picture(name)}
    dense = twin(prompt=PROMPTS, num_inference_steps=4, generator=seeds(), output_type="latent", **arguments).images
    enable_stage_pruning(twin, bundle)
    latents, calls = run(twin, num_inference_steps=4, **arguments)
    assert [level for _, level in calls] == [SCHEDULE.levels[SCHEDULE.stage_of(tau)] for tau, _ in calls]
    assert not torch.equal(latents, dense)
    disable_stage_pruning(twin)
    again = twin(prompt=PROMPTS, num_inference_steps=4, generator=seeds(), output_type="latent", **arguments).images
    assert torch.equal(again, dense)
