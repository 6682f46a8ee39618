"""The pipeline adapters: final latents bit-equal to the pipeline's own, whatever the guidance and the scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stageprune
from stageprune import StagePruneError
from stageprune.core.evaluation.variants import make_variants
from stageprune.core.groups import InputSize, measure_cost
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import realised_sparsity
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
    with pytest.raises(StagePruneError, match=r"must be a list of .* got one str; give \['red fox'\]"):
        host.encode("red fox")


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


SIZES = {"sd15": (24, 16), "sdxl": (40, 24), "sd3": (12, 24), "sd35": (12, 24), "flux": (24, 40)}
"""Neither the pipeline's own nor square; sd15 and sdxl take multiples of 8 pixels, the others of 4."""


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", TEXT_NAMES)
def test_other_sizes_are_bit_equal_to_the_pipeline(name, guidance):
    pipe, size = make_pipeline(name), SIZES[name]
    host = DiffusersHost(pipe, size)
    arguments = host.adapter.call_arguments(pipe, PROMPTS, guidance)
    assert (arguments["height"], arguments["width"]) == size
    got = drive(pipe, guidance, size=size)
    assert torch.equal(got, generate(pipe, guidance, size=size))
    images = host.decode(got)
    assert images.shape == (3, 3, *size) and torch.equal(images, generate(pipe, guidance, "pt", size=size))
    assert host.describe()["size"] == list(size)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_the_pipelines_own_size_can_be_asked_for(name):
    pipe = make_pipeline(name)
    own = DiffusersHost(pipe).describe()["size"]
    side = {"sd15": 16, "sdxl": 32, "sd3": 16, "sd35": 16, "flux": 16}[name]
    assert own == [side, side]
    assert torch.equal(drive(pipe, 4.0, size=side), drive(pipe, 4.0))
    assert "height" not in DiffusersHost(pipe).adapter.call_arguments(pipe, PROMPTS, 4.0)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_noise_levels_follow_the_size(name):
    """As the pipeline shifts them; bit-equal trajectories of another size would show nothing if all shifts were one."""
    pipe = make_pipeline(name)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    small, large = DiffusersHost(pipe, 8).taus(4), DiffusersHost(pipe, 32).taus(4)
    assert all(few < many for few, many in zip(small[1:], large[1:], strict=True))
    assert torch.equal(drive(pipe, 4.0, size=32), generate(pipe, 4.0, size=32))


def test_flux_rounds_its_own_size_down():
    pipe = make_pipeline("flux")
    pipe.default_sample_size = 9
    host = DiffusersHost(pipe)
    assert host.describe()["size"] == [16, 16] and host.input_size == InputSize(8, 8, 16)
    assert torch.equal(drive(pipe, 4.0), generate(pipe, 4.0))


def macs_of_the_call(pipe, size):
    """What torch counts in the first call that the pipeline itself makes for one sample without guidance."""
    host, calls = DiffusersHost(pipe, size), []
    hook = host.denoiser.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    pipe(**host.adapter.call_arguments(pipe, PROMPTS[:1], 1.0), num_inference_steps=1, output_type="latent")
    hook.remove()
    args, kwargs = calls[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        host.denoiser(*args, **kwargs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_cost_is_that_of_the_pipelines_own_calls(name):
    """Size and text included. The family's default text is longer than the tests'."""
    pipe, costs = make_pipeline(name), []
    for size in (None, SIZES[name]):
        host = DiffusersHost(pipe, size)
        costs.append(measure_cost(host.denoiser, size=host.input_size).dense)
        assert costs[-1] == macs_of_the_call(pipe, size)
        assert host.encode(PROMPTS).tensors["embeds"].shape[1] == host.input_size.text
    assert costs[0] != costs[1] and costs[0] != measure_cost(host.denoiser).dense


@pytest.mark.parametrize("change", [{"text_encoder_3": None, "tokenizer_3": None}, {"tokenizer": None}])
def test_text_length_without_some_encoder(change):
    pipe = make_pipeline("sd3")
    pipe.register_modules(**change)
    assert DiffusersHost(pipe).input_size.text == (272 if "tokenizer_3" in change else 32)
    pipe = make_pipeline("sd15")
    pipe.register_modules(tokenizer=None)
    assert DiffusersHost(pipe).input_size == InputSize(8, 8), "the family's text, since nobody can tell"


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd15", 20, "multiples of 8 pixels .* StableDiffusionPipeline, got 20 x 20"),
        ("sdxl", (32, 33), "multiples of 8 pixels .* StableDiffusionXLPipeline, got 32 x 33"),
        ("sd3", (18, 16), "multiples of 4 pixels .* StableDiffusion3Pipeline, got 18 x 16"),
        ("sd3", (16, 36), "at most 32 pixels a side for this StableDiffusion3Pipeline .* got 16 x 36"),
        ("flux", [16, 22], "multiples of 4 pixels .* FluxPipeline, got 16 x 22"),
        ("dit", 32, "must be 16 x 16 pixels, the one that this DiT is made for; got 32 x 32"),
        ("flux", 0, "a side in pixels or .height, width., got 0"),
        ("flux", "16", "a side in pixels or .height, width., got '16'"),
        ("flux", (16, 16, 16), "a side in pixels or .height, width."),
        ("flux", (16.0, 16), "a side in pixels or .height, width."),
    ],
)
def test_sizes_that_a_pipeline_cannot_make(name, size, message):
    with pytest.raises(StagePruneError, match=message):
        DiffusersHost(make_pipeline(name), size)


def test_a_unet_without_a_size_of_its_own():
    pipe = make_pipeline("sd15")
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(StagePruneError, match="no `sample_size`, so the pipeline has no size of its own"):
        DiffusersHost(pipe).start([0], 4)


@pytest.fixture(scope="module")
def flux_bank():
    """Made at 24 x 40 pixels, of which only the calibration was told."""
    pipe = make_pipeline("flux")
    calibration = stageprune.calibrate(pipe, PROMPTS * 2, steps=4, size=(24, 40))
    assert calibration.provenance["size"] == [24, 40]
    return stageprune.prune(pipe, calibration, levels=[0.3, 0.6], multiple=8)


def test_a_bank_knows_its_size(flux_bank):
    pipe = make_pipeline("flux")
    host = DiffusersHost(pipe, (24, 40))
    assert flux_bank.provenance["size"] == flux_bank.provenance["calibration"]["size"] == [24, 40]
    cost = measure_cost(host.denoiser, size=host.input_size)
    assert flux_bank.provenance["realised"] == [
        round(realised_sparsity(flux_bank.kept, cost, level), 6) for level in range(3)
    ]
    assert stageprune.prune(pipe, method="magnitude", size=32).provenance["size"] == [32, 32]
    assert stageprune.prune(pipe, method="magnitude").provenance["size"] == [16, 16]


def test_allocate_and_evaluate_run_at_the_size_of_the_bank(flux_bank, tmp_path):
    pipe, tokens = make_pipeline("flux"), set()
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.add(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    stageprune.Bundle(flux_bank).save(tmp_path / "bank")
    bank = stageprune.Bundle.load(tmp_path / "bank").bank
    allocation = stageprune.allocate(pipe, bank, target=0.7, stages=2)
    bundle = stageprune.Bundle(bank, allocation.schedule)
    report = stageprune.evaluate(pipe, bundle, count=2)
    assert tokens == {24 * 40 // 16}
    assert report.environment["size"] == "24 x 40 pixels"
    assert report.summary.size == InputSize(12, 20, 16)
    assert report.summary.dense_macs == macs_of_the_call(pipe, (24, 40))
    tokens.clear()
    assert stageprune.evaluate(pipe, bundle, count=2, size=32).environment["size"] == "32 x 32 pixels"
    assert stageprune.allocate(pipe, bank, target=0.7, stages=2, size=32).executed.share <= 0.705
    assert tokens == {32 * 32 // 16}


def test_magnitude_keeps_what_the_bank_keeps_at_every_size(flux_bank):
    pipe = make_pipeline("flux")
    bundle = stageprune.Bundle(flux_bank, stageprune.StageSchedule.uniform(0.3))
    for size in (16, (24, 40)):
        variants = {variant.name: variant for variant in make_variants(DiffusersHost(pipe, size), bundle, steps=4)}
        magnitude = variants["magnitude"].bank
        assert all(counts == flux_bank.kept[name][:2] for name, counts in magnitude.kept.items())
        assert variants["magnitude"].macs_share == variants["schedule"].macs_share


def test_a_size_that_another_model_has_recorded_is_no_ones_business(flux_bank):
    with pytest.raises(stageprune.StagePruneError, match="the bank is for a FluxTransformer2DModel, got a UNet2D"):
        stageprune.allocate(make_pipeline("sd15"), flux_bank, target=0.7, steps=4, prompts=PROMPTS * 2)


def test_a_host_has_its_size_already(flux_bank):
    host = DiffusersHost(make_pipeline("flux"), 32)
    assert stageprune.allocate(host, flux_bank, target=0.7, strategy="uniform").executed.share <= 0.705
    with pytest.raises(StagePruneError, match="this host was made for a size already"):
        stageprune.allocate(host, flux_bank, size=16)


def test_the_summary_is_for_the_pipelines_size_or_any_other(flux_bank):
    pipe = make_pipeline("flux")
    pruner = pipe.enable_stage_pruning(stageprune.Bundle(flux_bank, stageprune.StageSchedule.uniform(0.6)))
    assert pruner.size == InputSize(8, 8, 16)
    own, other = pipe.stage_pruning_summary(steps=4), pipe.stage_pruning_summary(steps=4, size=(24, 40))
    pipe.disable_stage_pruning()
    assert own.dense_macs == macs_of_the_call(pipe, None) and other.dense_macs == macs_of_the_call(pipe, (24, 40))
    assert "at latents of 8 x 8 and 16 text tokens" in str(own)
    assert "at latents of 12 x 20 and 16 text tokens" in str(other)
    assert other.stages[0].realised == pytest.approx(flux_bank.provenance["realised"][2], abs=1e-6)
    assert other.resident_bytes == own.resident_bytes and own.stages[0].realised != other.stages[0].realised
    pipe.transformer.__dict__.pop("_stage_bank")
    bare = stageprune.enable_stage_pruning(
        pipe.transformer, stageprune.Bundle(flux_bank, stageprune.StageSchedule.uniform(0.6))
    )
    assert bare.size is None
    summary = stageprune.stage_pruning_summary(pipe.transformer)
    assert "at the model's default size" in str(summary)
    with pytest.raises(StagePruneError, match="`size` is in pixels of the image: pass the pipeline"):
        stageprune.stage_pruning_summary(pipe.transformer, size=16)
