"""Schedulers that visit listed noise levels: what they run, what they refuse, what they leave as it was."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune.core.errors import ScheduleError
from stageprune.core.host import NoiseLevel, sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers.listed import first_order, is_listed, original, visiting
from support import make_pipe, relative
from zoo import make_pipeline, prompts_for

DDPM = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    "ddim-leading": ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}),
    "ddim-500": ("DDIMScheduler", {"num_train_timesteps": 500, "clip_sample": False}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
}
PIPELINES = ["dit", "sdxl", "sd3", "flux"]


def run(host: DiffusersHost, steps: int) -> torch.Tensor:
    prompts = prompts_for(host.pipe)
    return sample(host, host.encode(prompts), range(len(prompts)), steps, 2.0)


def with_scheduler(name: str):
    pipe = make_pipe()
    cls, options = DDPM[name]
    pipe.scheduler = getattr(diffusers, cls)(**options)
    return pipe


@pytest.mark.parametrize("name", DDPM)
def test_its_own_noise_levels_are_its_own_run(name):
    """With 5 steps: where their number does not divide that of timesteps, DDIM does not step to where it goes on."""
    host = DiffusersHost(with_scheduler(name))
    assert torch.equal(run(host.visiting(host.taus(5)), 5), run(host, 5))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_multistep_solvers_of_flows(name):
    """Of first order they are Euler steps; by themselves they run the same from their own noise levels."""
    pipe, taus = make_pipeline(name), [1.0, 0.83, 0.5, 0.21]
    expected = run(DiffusersHost(pipe).visiting(taus), 4)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    if name == "flux":
        flow |= {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
    pipe.scheduler = DPMSolverMultistepScheduler(**flow, solver_order=1)
    assert relative(run(DiffusersHost(pipe).visiting(taus), 4), expected) < 1e-4
    pipe.scheduler = DPMSolverMultistepScheduler(**flow)
    host = DiffusersHost(pipe)
    own, listed = run(host, 8), run(host.visiting(host.taus(8)), 8)
    assert relative(listed, own) < 0.02 < relative(run(host, 6), own), "its timesteps are whole numbers"


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_can_visit_a_list(name):
    """Also where the pipeline passes noise levels of its own, or shifts them."""
    host = DiffusersHost(make_pipeline(name))
    own = host.taus(5)
    assert torch.equal(run(host.visiting(own), 5), run(host, 5))
    some = [own[0], own[1], own[3]]
    listed = host.visiting(some)
    assert listed.taus(3) == pytest.approx(some, abs=1e-6) and relative(run(listed, 3), run(host, 3)) > 1e-3


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("first", [False, True])
def test_a_run_of_first_order_is_the_closed_form(name, first):
    """x_j = n_j / n_i x_i + (s_j - s_i n_j / n_i) x_0, whatever the jumps; x_0 is read off a first jump elsewhere."""
    host = DiffusersHost(make_pipeline(name))
    if name != "flux" and name != "sd3" and not first:
        host.pipe.scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    taus = [0.95, 0.7, 0.31, 0.1]
    listed = host.visiting(taus, first_order=first)
    levels = [*listed.noise_levels(listed.taus(4)), NoiseLevel(1.0, 0.0)]
    prompts = prompts_for(host.pipe)
    conditions, state = host.encode(prompts), listed.start([5, 6, 7], 4)
    for index in range(4):
        here, there = levels[index], levels[index + 1]
        elsewhere = host.visiting([taus[index], taus[index] / 3], first_order=first)
        other = elsewhere.noise_levels(elsewhere.taus(2))[1]
        begin = elsewhere.start([5, 6, 7], 2)
        begin = type(begin)(0, state.latents, begin.sampler)
        x = state.latents.double()
        seen = elsewhere.advance(begin, conditions, 2.0, 1).latents.double()
        clean = (seen - other.noise / here.noise * x) / (other.signal - here.signal * other.noise / here.noise)
        expected = there.noise / here.noise * x + (there.signal - here.signal * there.noise / here.noise) * clean
        state = listed.advance(state, conditions, 2.0, index + 1)
        assert relative(state.latents.double(), expected) < 1e-4


def test_the_pipeline_runs_it_too():
    pipe = make_pipe()
    host = DiffusersHost(pipe)
    taus = [0.9, 0.5, 0.2]
    expected = host.decode(sample(host.visiting(taus), host.encode([1, 2]), [0, 1], 3, 1.5))
    pipe.scheduler = visiting(pipe.scheduler, taus)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    made = pipe([1, 2], num_inference_steps=3, guidance_scale=1.5, generator=generators, output_type="np").images
    assert relative(torch.from_numpy(made).permute(0, 3, 1, 2), expected) < 1e-5


def test_another_number_of_steps_is_refused():
    pipe = make_pipe()
    pipe.scheduler = visiting(pipe.scheduler, [0.9, 0.5, 0.2])
    with pytest.raises(ScheduleError, match=r"runs 3 listed noise levels.*num_inference_steps=3, got 20"):
        pipe([1, 2], num_inference_steps=20)


@pytest.mark.parametrize("taus", [[], [0.5, 0.5], [0.2, 0.9], [1.2, 0.5], [0.5, -0.1], [0.5003, 0.5001]])
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_noise_levels_that_do_not_fall_are_refused(name, taus):
    scheduler = make_pipeline(name).scheduler
    if name == "flux" and len(taus) == 2 and 1 >= taus[0] > taus[1] > 0:
        return  # flow matching knows no whole timesteps
    with pytest.raises(ScheduleError, match="must fall within"):
        visiting(scheduler, taus)


@pytest.mark.parametrize("cls", ["PNDMScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_schedulers_that_cannot_are_refused(cls):
    with pytest.raises(ScheduleError, match=f"{cls} cannot visit listed noise levels. Give the pipeline a"):
        visiting(getattr(diffusers, cls)(), [0.9, 0.5])


def test_class_and_configuration_stay(tmp_path):
    plain = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    listed = visiting(plain, [0.9, 0.5, 0.1])
    assert type(listed) is DPMSolverMultistepScheduler and plain.config.use_karras_sigmas and is_listed(listed)
    assert original(listed) is plain and original(plain) is plain and not is_listed(plain)
    assert original(visiting(listed, [0.8, 0.2])) is plain
    twin = copy.deepcopy(listed)
    twin.set_timesteps(3)
    assert twin.timesteps.tolist() == [900, 500, 100] and listed.num_inference_steps is None
    listed.save_pretrained(tmp_path)
    again = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    again.set_timesteps(20)
    assert len(again.timesteps) == 20


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_first_order_solver_is_of_the_same_model(cls):
    made = first_order(cls(beta_schedule="scaled_linear", prediction_type="v_prediction"))
    assert type(made) is DDIMScheduler and made.config.prediction_type == "v_prediction"
    assert made.config.beta_schedule == "scaled_linear" and not made.config.clip_sample


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(0, 999), min_size=1, max_size=12), st.sampled_from(["ddim", "dpm", "euler"]))
def test_any_list_is_visited(moments, name):
    taus = [moment / 1000 for moment in sorted(moments, reverse=True)]
    cls, options = DDPM[name]
    listed = visiting(getattr(diffusers, cls)(**options), taus)
    listed.set_timesteps(len(taus))
    assert [float(moment) for moment in listed.timesteps] == [round(1000 * tau) for tau in taus]
