"""The diffusers host: bit-equal to the pipeline itself, with the noise levels that its calls really have."""

from __future__ import annotations

import copy
import logging

import diffusers
import pytest
import torch

import stageprune
from stageprune import StagePruneError
from stageprune.core.errors import BankError
from stageprune.core.host import InputSize, sample
from stageprune.core.hosts.diffusers import DiffusersHost, attach, detach, find_denoiser, reader_for
from stageprune.core.hosts.diffusers.attach import METHODS
from stageprune.core.hosts.diffusers.load import pick_device
from stageprune.core.hosts.diffusers.timesteps import TimestepReader
from support import GUIDANCE, LABELS, images, make_pipe

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

# Ancestral and SDE samplers, and DDPM, draw noise for the doubled batch of guidance, so that no two ways of driving
# them agree. LMS needs scipy. Everything else that DiTPipeline can run is here.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    "ddim-leading": ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-single": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}


def with_scheduler(name):
    pipe = make_pipe()
    kind, config = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind)(**config)
    return pipe


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("steps", [4, 10])
def test_trajectories_are_bit_equal_to_the_pipeline(name, guidance, steps):
    pipe = with_scheduler(name)
    host, calls = DiffusersHost(pipe), []
    reader = host.tau_reader
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(reader(args, kwargs)), with_kwargs=True
    )
    expected = images(pipe, steps, guidance)
    hook.remove()
    assert calls == host.taus(steps), "the noise levels of the calls that the pipeline itself makes"
    got = sample(host, host.encode(LABELS), [0, 1, 2], steps, guidance)
    assert torch.equal(host.decode(got), expected)
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_advancing_in_parts_equals_in_one_go(name):
    """Multistep solvers carry a history: it must be part of the state, and a state can be used again."""
    host = DiffusersHost(with_scheduler(name))
    conditions, start = host.encode(LABELS), host.start([0, 1, 2], 6)
    calls = len(host.taus(6))
    whole = host.advance(start, conditions, GUIDANCE, calls)
    assert whole.index == calls and start.index == 0
    for split in range(0, calls + 1, 2):
        half = host.advance(start, conditions, GUIDANCE, split)
        for _ in range(2):
            assert torch.equal(host.advance(half, conditions, GUIDANCE, calls).latents, whole.latents)


def test_the_pipelines_own_scheduler_is_left_alone(pipe):
    host = DiffusersHost(pipe)
    pipe.scheduler.set_timesteps(7)
    before = copy.deepcopy(pipe.scheduler.__dict__)
    sample(host, host.encode(LABELS), [0, 1, 2], 4, GUIDANCE)
    assert pipe.scheduler.timesteps.tolist() == before["timesteps"].tolist()


def test_batches_change_nothing_but_rounding(host):
    seen = []
    conditions = host.encode([1, 2, 3, 4, 5])
    whole = sample(host, conditions, range(5), 5, GUIDANCE)
    parts = sample(host, conditions, range(5), 5, GUIDANCE, batch_size=2, on_batch=seen.append)
    assert seen == [2, 2, 1]
    assert torch.allclose(whole, parts, atol=1e-4)
    with pytest.raises(ValueError, match="one seed a sample: got 5 conditions and 3 seeds"):
        sample(host, conditions, range(3), 5, GUIDANCE)


def test_conditions_are_prompts_in_order(host):
    conditions = host.encode([3, "7", 1])
    assert len(conditions) == 3 and conditions.tensors["class_labels"].tolist() == [3, 7, 1]
    assert conditions[1:].tensors["class_labels"].tolist() == [7, 1]


def test_labels_by_name(pipe):
    pipe.labels = {"cat": 281, "white shark": 2}
    host = DiffusersHost(pipe)
    assert host.encode(["white shark", "cat"]).tensors["class_labels"].tolist() == [2, 281]
    with pytest.raises(StagePruneError, match="prompt 'dog' is no class of this pipeline; its labels are cat, white"):
        host.encode(["dog"])
    with pytest.raises(StagePruneError, match="prompt '²' is no class of this pipeline"):
        host.encode(["²"])  # a digit, but no number


def test_describe_is_plain_data_without_paths(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "my-model")
    description = DiffusersHost(type(pipe).from_pretrained(tmp_path / "my-model")).describe()
    assert description["model"] == "my-model" and str(tmp_path) not in str(description)
    assert description["pipeline"] == "DiTPipeline" and description["dtype"] == "float32"
    assert description["scheduler_config"]["timestep_spacing"] == "trailing"


def test_a_dit_has_one_size(pipe):
    """It may be asked for: a bundle that has recorded it does so."""
    for size in (16, (16, 16), [16, 16]):
        host = DiffusersHost(pipe, size)
        got = sample(host, host.encode(LABELS), [0, 1, 2], 4, GUIDANCE)
        assert torch.equal(host.decode(got), images(pipe, 4, GUIDANCE))
        assert host.adapter.call_arguments(pipe, LABELS, GUIDANCE) == {"class_labels": LABELS, "guidance_scale": 1.5}
    assert DiffusersHost(pipe).describe()["size"] == [16, 16]
    assert DiffusersHost(pipe).input_size == InputSize(8, 8)


READER = TimestepReader("timestep", 1, 1000.0)


@pytest.mark.parametrize(
    ("value", "tau"),
    [
        (torch.tensor(500), 0.5),
        (torch.tensor([500]), 0.5),
        (torch.tensor([250.5, 250.5]), 0.2505),
        (torch.tensor([[0, 0, 700], [0, 0, 700]]), 0.7),  # image-conditioned: clean frames are at 0
        (torch.tensor([999.0], dtype=torch.float64), 0.999),
        (torch.tensor([500.0], dtype=torch.float16), 0.5),
        (torch.tensor([0]), 0.0),
        (torch.tensor([1000]), 1.0),
        (torch.tensor([1001]), 1.0),
        (torch.tensor([-1.0]), 0.0),
        (300, 0.3),
        (300.0, 0.3),
    ],
)
def test_reading_tau(value, tau):
    assert READER((), {"timestep": value}) == pytest.approx(tau)
    assert READER((torch.zeros(1), value), {}) == pytest.approx(tau)
    backward = TimestepReader("timestep", 1, 1.0, reversed=True)
    scaled = value / 1000 if not isinstance(value, torch.Tensor) else value.double() / 1000
    smallest = float(scaled.min()) if isinstance(scaled, torch.Tensor) else scaled
    assert backward((), {"timestep": scaled}) == pytest.approx(min(max(1 - smallest, 0), 1))


def test_a_call_without_a_timestep_is_refused():
    for args in ((), (torch.zeros(1),)):
        with pytest.raises(StagePruneError, match="the denoiser was called without `timestep`"):
            READER(args, {"class_labels": 1})


def test_a_timestep_that_is_no_number_is_refused():
    """NaN falls in no stage; to run the last one would be a guess."""
    with pytest.raises(StagePruneError):
        READER((), {"timestep": torch.tensor([float("nan")])})


def test_reader_follows_the_scheduler_and_the_class(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=500)
    reader = DiffusersHost(pipe).tau_reader
    assert reader.scale == 500 and reader((), {"timestep": torch.tensor([250])}) == 0.5
    position = reader_for(pipe.transformer).position
    args = [None] * 6
    args[position] = torch.tensor([100])
    assert reader_for(pipe.transformer)(tuple(args), {}) == 0.1


@pytest.mark.parametrize(("cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_device_by_itself_is_one_with_float64(cuda, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == expected
    assert pick_device("mps") == "mps"


def test_find_denoiser(pipe):
    assert find_denoiser(pipe) == ("transformer", pipe.transformer)
    wrapped = torch.compile(pipe.transformer, backend="eager")
    pipe.transformer = wrapped
    assert find_denoiser(pipe)[1] is wrapped._orig_mod
    pipe.register_modules(vae=make_pipe().transformer)
    with pytest.raises(StagePruneError, match=r"exactly one denoiser of a supported class \(DiTTransformer2DModel"):
        find_denoiser(pipe)


class Other(diffusers.DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


def test_a_pipeline_without_an_adapter_says_so(pipe):
    other = Other(pipe.transformer, pipe.scheduler)
    with pytest.raises(StagePruneError, match=r"Other cannot be calibrated or evaluated yet; supported .*DiTPipeline"):
        DiffusersHost(other).encode([1])
    with pytest.raises(StagePruneError, match="Other cannot be calibrated or evaluated yet"):
        DiffusersHost(other, size=16)
    host = DiffusersHost(other)
    assert host.input_size is None and host.describe()["size"] is None


def test_a_pipeline_without_an_adapter_can_be_pruned_and_enabled(pipe, calibration):
    """With MACs at the denoiser's default size: nobody knows another."""
    other = Other(pipe.transformer, pipe.scheduler)
    with pytest.raises(BankError, match=r"layers cannot be measured: Other cannot be.*`layer_allocation` 'uniform'"):
        stageprune.prune(other, calibration, levels=[0.5], multiple=16)
    bank = stageprune.prune(other, calibration, levels=[0.5], multiple=16, layer_allocation="uniform")
    assert bank.provenance["size"] is None and bank.provenance["calibration"]["size"] == [16, 16]
    pruner = stageprune.enable_stage_pruning(other, stageprune.Bundle(bank, stageprune.StageSchedule.uniform(0.5)))
    assert pruner.size is None
    stageprune.disable_stage_pruning(other)


@pytest.fixture
def attached():
    yield
    detach()
    attach()


def test_methods_are_attached_and_detached(attached):
    names = [function.__name__ for function in METHODS]
    base = diffusers.DiffusionPipeline
    assert all(getattr(base, name) is function for name, function in zip(names, METHODS, strict=True))
    before = set(vars(base))
    attach()
    assert set(vars(base)) == before
    detach()
    assert set(vars(base)) == before - set(names)
    assert not any(hasattr(diffusers.DiTPipeline, name) for name in names)


def test_an_attribute_that_exists_is_not_replaced(attached, monkeypatch, caplog):
    detach()
    theirs = lambda self: "theirs"
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_stage_pruning", theirs, raising=False)
    with caplog.at_level(logging.WARNING):
        attach()
    assert diffusers.DiffusionPipeline.enable_stage_pruning is theirs
    assert "DiffusionPipeline.enable_stage_pruning exists already; use stageprune.enable_stage_pruning" in caplog.text
    detach()
    assert diffusers.DiffusionPipeline.enable_stage_pruning is theirs


def test_attaching_can_be_switched_off(attached, monkeypatch):
    detach()
    monkeypatch.setenv("STAGEPRUNE_NO_ATTACH", "1")
    attach()
    assert not hasattr(diffusers.DiffusionPipeline, "enable_stage_pruning")


def test_methods_do_what_the_functions_do(pipe, bundle):
    pipe.enable_stage_pruning(bundle)
    assert pipe.is_stage_pruning_enabled() and stageprune.is_stage_pruning_enabled(pipe.transformer)
    assert str(pipe.stage_pruning_summary()) == str(stageprune.stage_pruning_summary(pipe.transformer, steps=3))
    pipe.disable_stage_pruning()
    assert not pipe.is_stage_pruning_enabled()


def test_all_public_names_exist():
    assert all(hasattr(stageprune, name) for name in stageprune.__all__)
