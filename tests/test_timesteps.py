"""The noise level of each call that a real pipeline makes is the one that the host predicts, whatever the scheduler."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from stageprune.core.hosts.diffusers import DiffusersHost, reader_for, timesteps
from stageprune.core.hosts.diffusers.known import KnownValues
from zoo import generate, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

STEPS = 4
DIFFUSION = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "500-timesteps": ("DDIMScheduler", {"num_train_timesteps": 500}),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
FLOW_MATCHING = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "euler-dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "euler-karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "dpm++2m": ("DPMSolverMultistepScheduler", FLOW),
}
CASES = [
    *((name, scheduler, *DIFFUSION[scheduler]) for name in ("sd15", "sdxl") for scheduler in DIFFUSION),
    *((name, scheduler, *FLOW_MATCHING[scheduler]) for name in ("sd3", "flux") for scheduler in FLOW_MATCHING),
]
REFUSED = {("flux", "heun")}
"""What the pipeline itself refuses: this scheduler takes no sigmas."""


def record(pipe, guidance):
    """The tau of each call of the denoiser, read where stage pruning reads it."""
    host = DiffusersHost(pipe)
    taus, reader = [], host.tau_reader
    hook = host.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: taus.append(reader(args, kwargs)), with_kwargs=True
    )
    generate(pipe, guidance, steps=STEPS)
    hook.remove()
    return taus


@pytest.mark.parametrize(("name", "case", "scheduler", "config"), CASES, ids=[f"{n}-{case}" for n, case, _, _ in CASES])
def test_taus_are_those_of_the_pipelines_own_calls(name, case, scheduler, config):
    if case == "lms":
        pytest.importorskip("scipy")
    pipe = make_pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler)(**config)
    if (name, case) in REFUSED:
        with pytest.raises(ValueError, match="does not support custom"):
            DiffusersHost(pipe).taus(STEPS)
        return
    expected = DiffusersHost(pipe).taus(STEPS)
    seen = record(pipe, 4.0)
    if name == "flux":  # guidance by a second call
        assert seen[::2] == seen[1::2]
        seen = seen[::2]
    assert seen == expected
    assert len(seen) >= STEPS and all(0 <= tau <= 1 for tau in seen)
    assert seen[0] > 0.7 > 0.6 > seen[-1] and seen[0] == max(seen)


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("steps", [1, 7])
def test_flow_matching_tau_is_sigma(name, steps):
    host = DiffusersHost(make_pipeline(name))
    sigmas = host.start([0], steps).sampler.scheduler.sigmas[:-1]
    assert host.taus(steps) == pytest.approx(sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_models_precision(name, dtype):
    """FLUX is told the time in the precision of its latents: what it sees is what counts."""
    pipe = make_pipeline(name).to(dtype)
    seen = record(pipe, 1.0)
    assert seen == DiffusersHost(pipe).taus(STEPS)


@pytest.mark.parametrize("name", ["dit", "sd15", "sd3", "flux"])
def test_the_time_is_found_by_place_and_by_name(name):
    denoiser = DiffusersHost(make_pipeline(name)).denoiser
    reader = reader_for(denoiser)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    assert names[reader.position] == reader.argument == "timestep"
    time = torch.tensor([0.25 * reader.scale])
    args = tuple(time if place == reader.position else None for place in range(len(names)))
    assert reader(args, {}) == reader((), {"timestep": time}) == 0.25


@pytest.mark.parametrize(("name", "waits"), [("dit", 1), ("sd15", 1), ("sdxl", 1), ("sd3", 1), ("flux", 2 * STEPS)])
def test_a_pipelines_timesteps_are_copied_to_the_host_once(name, waits, monkeypatch):
    """Each copy would wait for an accelerator. FLUX's pipeline computes what it passes, by two calls a step here."""
    copies, reading, real = [], [], timesteps.TimestepReader.__call__

    def read(self, args, kwargs):
        reading.append(True)
        try:
            return real(self, args, kwargs)
        finally:
            reading.pop()

    def spied(function):
        def copy(tensor):
            copies.extend(reading)
            return function(tensor)

        return copy

    monkeypatch.setattr(timesteps.TimestepReader, "__call__", read)
    for copy in ("item", "tolist"):
        monkeypatch.setattr(torch.Tensor, copy, spied(getattr(torch.Tensor, copy)))
    assert len(record(make_pipeline(name), 4.0)) >= STEPS
    assert len(copies) == waits


SEEN_AS = {
    "element": lambda times, place: times[place],
    "expanded": lambda times, place: times[place].expand(3),
    "slice": lambda times, place: times[place : place + 1],
    "reversed": lambda times, place: times.flip(0)[len(times) - 1 - place],
    "strided": lambda times, place: times[place % 2 :: 2][place // 2].expand(2, 3),
    "computed": lambda times, place: (times / 2)[place].expand(2) * 2,
    "int32": lambda times, place: times.to(torch.int32)[place],
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("seen_as", SEEN_AS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_known_values_are_those_of_the_tensor(seen_as, dtype, inference):
    """Also once its memory has been written to, or another tensor has come to its place."""
    known = KnownValues()
    with torch.inference_mode(inference):
        for _ in range(5):
            times = torch.randint(0, 256, (6,)).to(dtype)
            for place in (0, 3, 3, 5):
                value = SEEN_AS[seen_as](times, place)
                got = known(value)
                assert got in (None, float(times[place])), "None: to be read otherwise"
                assert got is not None or value.stride() == (1,)
                times[place] += 1
                times.mul_(2).remainder_(251)
            del times, value


def test_different_values_are_not_taken_for_one():
    known = KnownValues()
    assert known(torch.tensor([3.0, 0.0])) is None and known(torch.tensor([])) is None
    assert known(torch.tensor([3.0, 7.0])[1]) == 7 and known(torch.zeros(100_000)[7]) == 0
    same = torch.tensor([3.0])
    assert known(same) == 3 and known(same.view(torch.int32)) == same.view(torch.int32).item()
    reader = reader_for(DiffusersHost(make_pipeline("dit")).denoiser)
    assert reader((), {reader.argument: torch.tensor([0, 250])}) == 0.25, "the largest: 0 are clean frames"
