"""The pipeline adapters: final latents bit-equal to the pipeline's own, whatever the guidance and the scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from stageprune import StagePruneError
from stageprune.core.hosts.diffusers import DiffusersHost
from zoo import NAMES, PROMPTS, drive, generate, make_pipeline, prompts_for

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

TEXT_NAMES = [name for name in NAMES if name != "dit"]
VARIANTS = {
    **{name: (name, {}) for name in TEXT_NAMES},
    "sd15-lcm": ("sd15", {"time_cond_proj_dim": 8}),
    "flux-embedded": ("flux", {"guidance_embeds": True}),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "sd15": [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DDPMScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
    ],
    "sdxl": [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DDIMScheduler", {}),
    ],
    "sd3": [
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("UniPCMultistepScheduler", FLOW),
    ],
    "flux": [
        ("UniPCMultistepScheduler", FLOW),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}),
    ],
}
SCHEDULED = [(name, *scheduler) for name, schedulers in SCHEDULERS.items() for scheduler in schedulers]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", VARIANTS)
def test_latents_and_images_are_bit_equal_to_the_pipeline(name, guidance):
    base, config = VARIANTS[name]
    pipe = make_pipeline(base, **config)
    host = DiffusersHost(pipe)
    expected = generate(pipe, guidance)
    got = drive(pipe, guidance)
    assert torch.equal(got, expected)
    assert torch.equal(host.decode(got), generate(pipe, guidance, "pt"))
    assert float((expected[0] - expected[1]).abs().max()) > 0.01
    weaker = drive(pipe, guidance / 2)
    assert torch.equal(got, weaker) == (name in TEXT_NAMES and guidance == 1), "only a model that takes it needs none"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("name", "scheduler", "config"), SCHEDULED, ids=[f"{n}-{s}" for n, s, _ in SCHEDULED])
def test_schedulers_are_driven_as_the_pipeline_drives_them(name, scheduler, config, guidance):
    """Stochastic ones too: they draw from the generators that the first noise came from."""
    pipe = make_pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler)(**config)
    assert torch.equal(drive(pipe, guidance), generate(pipe, guidance))


@pytest.mark.parametrize("name", NAMES)
def test_a_stochastic_trajectory_can_be_continued_again_and_again(name):
    """Even where the pipeline itself leaves a stochastic scheduler without generators (DiT, SD3, FLUX)."""
    pipe = make_pipeline(name)
    flow = name in ("sd3", "sd35", "flux")
    pipe.scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        if flow
        else diffusers.EulerAncestralDiscreteScheduler()
    )
    host = DiffusersHost(pipe)
    conditions = host.encode(prompts_for(pipe))
    whole = host.advance(host.start([0, 1, 2], 4), conditions, 4.0, 4)
    half = host.advance(host.start([0, 1, 2], 4), conditions, 4.0, 2)
    for _ in range(2):
        assert torch.equal(host.advance(half, conditions, 4.0, 4).latents, whole.latents)


def test_a_bare_default_call_is_what_the_host_runs():
    """With nothing but prompts and seeds the pipelines choose the same size, text length and guidance."""
    for name in ("sd15", "sdxl"):
        pipe = make_pipeline(name)
        host = DiffusersHost(pipe)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
        expected = pipe(PROMPTS, num_inference_steps=2, generator=seeds, output_type="latent").images
        assert torch.equal(drive(pipe, host.default_guidance, steps=2), expected)


def test_default_guidance():
    expected = {"dit": 1.5, "sd15": 7.5, "sdxl": 5.0, "sd3": 7.0, "sd35": 7.0, "flux": 1.0}
    assert {name: DiffusersHost(make_pipeline(name)).default_guidance for name in NAMES} == expected
    assert DiffusersHost(make_pipeline("flux", guidance_embeds=True)).default_guidance == 3.5


def test_sdxl_without_zeros_for_the_empty_prompt():
    pipe = make_pipeline("sdxl")
    zeros = DiffusersHost(pipe).encode(PROMPTS).tensors["negative_embeds"]
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert float(zeros.abs().max()) == 0 < float(DiffusersHost(pipe).encode(PROMPTS).tensors["negative_embeds"].max())
    assert torch.equal(drive(pipe, 4.0), generate(pipe, 4.0))


def test_sdxl_vae_with_a_mean_and_a_spread():
    pipe = make_pipeline("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    host = DiffusersHost(pipe)
    assert torch.equal(host.decode(drive(pipe, 4.0)), generate(pipe, 4.0, "pt"))


@pytest.mark.parametrize("upcast", [True, False])
def test_sdxl_vae_in_float16(upcast):
    pipe = make_pipeline("sdxl")
    pipe.vae.register_to_config(force_upcast=upcast)
    latents = drive(pipe, 4.0)
    pipe.vae.half()
    seen = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    images = DiffusersHost(pipe).decode(latents.half())
    hook.remove()
    assert seen == [torch.float32 if upcast else torch.float16] and pipe.vae.dtype == torch.float16
    assert images.dtype == torch.float32


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_half_precision_is_bit_equal_too(name):
    pipe = make_pipeline(name).to(torch.bfloat16)
    assert torch.equal(drive(pipe, 4.0), generate(pipe, 4.0))


def test_sd3_without_t5():
    pipe = make_pipeline("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    host = DiffusersHost(pipe)
    assert host.encode(PROMPTS).tensors["embeds"].shape[1] == 16 + 256
    assert torch.equal(drive(pipe, 4.0), generate(pipe, 4.0))


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_conditions_are_per_prompt(name):
    host = DiffusersHost(make_pipeline(name))
    conditions = host.encode(PROMPTS)
    assert len(conditions) == 3 and all(len(tensor) == 3 for tensor in conditions.tensors.values())
    part = conditions[1:2]
    alone = host.encode(PROMPTS[1:2])
    assert list(part.tensors) == list(alone.tensors)
    assert all(torch.allclose(part.tensors[key], alone.tensors[key], atol=1e-5) for key in alone.tensors)
    assert not any(tensor.requires_grad for tensor in conditions.tensors.values())


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_prompts_of_another_type_are_refused(name):
    host = DiffusersHost(make_pipeline(name))
    with pytest.raises(StagePruneError, match=r"prompt 3 is of type int, but \w+Pipeline takes texts: give strings"):
        host.encode(["red fox", 3])
    with pytest.raises(StagePruneError, match="`prompts` is empty"):
        host.encode([])


def test_default_prompts_are_varied_texts():
    prompts = DiffusersHost(make_pipeline("flux")).default_prompts()
    assert len(prompts) == len(set(prompts)) == 32 and all(isinstance(prompt, str) for prompt in prompts)


def test_many_prompts_are_encoded_a_few_at_a_time():
    host = DiffusersHost(make_pipeline("sd15"))
    sizes = []
    host.pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    assert len(host.encode(PROMPTS * 13)) == 39
    assert max(sizes) == 32
