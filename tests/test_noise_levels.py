"""Signal and noise of a tau are those of what the sampler itself would feed the denoiser."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import pytest
import torch

from stageprune.core.errors import StagePruneError
from stageprune.core.host import NoiseLevel
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers.bare import DenoiserHost
from zoo import make_pipeline

STEPS = 6
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
CASES = {
    "ddim": ("sd15", "DDIMScheduler", {}),
    "ddim-cosine": ("sd15", "DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "ddim-zero-snr": ("sd15", "DDIMScheduler", ZERO),
    "ddim-500": ("sd15", "DDIMScheduler", {"num_train_timesteps": 500}),
    "ddpm": ("sd15", "DDPMScheduler", {}),
    "euler": ("sdxl", "EulerDiscreteScheduler", {}),
    "euler-karras": ("sdxl", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-zero-snr": ("sdxl", "EulerDiscreteScheduler", ZERO),
    "euler-linspace": ("sd15", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "dpm++": ("sd15", "DPMSolverMultistepScheduler", {}),
    "flow": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-dynamic": ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "flow-dpm++": ("sd3", "DPMSolverMultistepScheduler", FLOW),
}


@pytest.mark.parametrize(("name", "scheduler", "config"), CASES.values(), ids=CASES)
def test_what_the_sampler_feeds_the_denoiser(name, scheduler, config):
    pipe = make_pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler)(**config)
    host = DiffusersHost(pipe)
    levels = host.noise_levels(host.taus(STEPS))
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=generator).double()
    for index, level in enumerate(levels):
        sampler = host.start([0], STEPS).sampler.scheduler
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(index)
        time = sampler.timesteps[index : index + 1]
        if hasattr(sampler, "scale_noise"):
            seen = sampler.scale_noise(clean, time, noise)
        else:
            seen = sampler.scale_model_input(sampler.add_noise(clean, noise, time), time[0])
        tolerance = 5e-3 if name == "sd3" else 1e-3  # DPM++ cuts its timesteps to whole numbers
        torch.testing.assert_close(level.signal * clean + level.noise * noise, seen, atol=tolerance, rtol=tolerance)
    assert all(before.log_snr < after.log_snr for before, after in pairwise(levels))


@pytest.mark.parametrize("name", ["dit", "sd15", "sd3", "flux"])
def test_log_snr_falls_with_tau(name):
    levels = DiffusersHost(make_pipeline(name)).noise_levels([index / 64 for index in range(65)])
    log_snr = [level.log_snr for level in levels]
    assert log_snr == sorted(log_snr, reverse=True)
    assert all(0 <= level.signal <= 1 and 0 <= level.noise <= 1 for level in levels)


def test_the_ends_of_log_snr():
    assert NoiseLevel(0, 1).log_snr == -math.inf and NoiseLevel(1, 0).log_snr == math.inf
    assert NoiseLevel(0.6, 0.3).log_snr == pytest.approx(math.log(4))
    pipe = make_pipeline("sd15")
    pipe.scheduler = diffusers.DDIMScheduler(**ZERO)
    assert [level.signal for level in DiffusersHost(pipe).noise_levels([0.999, 1.0, 7.0])] == [0, 0, 0]


def test_an_unknown_noise_schedule_is_refused():
    pipe = make_pipeline("sd15")
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(StagePruneError, match="noise schedule of EDMEulerScheduler is not known"):
        DiffusersHost(pipe).noise_levels([0.5])
    with pytest.raises(StagePruneError, match="has no sampler"):
        DenoiserHost(pipe.unet).noise_levels([0.5])
