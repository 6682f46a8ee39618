"""Tiny UNets with everything that their tests need: a host, calibrations and banks in which channels are pruned too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import zoo
from stageprune import StageSchedule
from stageprune.core.calibration import calibrate
from stageprune.core.groups import family_of
from stageprune.core.host import Conditions, InputSize, SamplerState
from stageprune.core.hosts.diffusers import reader_for
from stageprune.core.pruning import prune
from stageprune.core.runtime import StagePruner
from support import SHARING_IDS, SHARINGS

KINDS = ("head", "neuron", "channel")
LEVELS = (0.0, 0.3, 0.6)
EDGES = 2
TAUS = [0.75, 0.25]
UNETS = {
    "sd15": ("sd15", {}),
    "scale shift": ("sd15", {"resnet_time_scale_shift": "scale_shift", "sample_size": (6, 10)}),
    "sdxl": ("sdxl", {"sample_size": 12}),
}
CONV = "down_blocks.0.resnets.0"


@dataclass
class UNetHost:
    """The least that makes a denoiser into a trajectory: a few steps down its own output, on fixed text."""

    denoiser: nn.Module
    component: str = "unet"
    input_size: InputSize | None = None

    @property
    def tau_reader(self):
        return reader_for(self.denoiser)

    def taus(self, steps):
        return [1 - (index + 0.5) / steps for index in range(steps)]

    def encode(self, prompts):
        return Conditions({"seed": torch.tensor(prompts)})

    def start(self, seeds, steps):
        inputs = family_of(self.denoiser).example_inputs(self.denoiser, batch=len(seeds), seed=seeds[0])
        return SamplerState(0, inputs["sample"], (steps, inputs))

    def advance(self, state, conditions, guidance, until):
        latents, (steps, inputs) = state.latents, state.sampler
        for index in range(state.index, until):
            times = torch.full((len(latents),), round(1000 * self.taus(steps)[index]))
            output = self.denoiser(**{**inputs, "sample": latents, "timestep": times}, return_dict=False)[0]
            latents = latents - output / steps
        return SamplerState(until, latents, state.sampler)

    def describe(self):
        return {}


def make(name, seed=0, **changes):
    kind, config = UNETS[name]
    return zoo.make_denoiser(kind, seed, **{**config, **changes})


def forward(denoiser, tau):
    inputs = family_of(denoiser).example_inputs(denoiser, batch=2, seed=9)
    inputs["timestep"] = torch.full((2,), round(1000 * tau))
    with torch.no_grad():
        return denoiser(**inputs, return_dict=False)[0]


def attach(denoiser, bank, levels, **ways):
    schedule = StageSchedule.from_levels(levels)
    return StagePruner(denoiser, bank, schedule, reader_for(denoiser), **ways)


@cache
def calibration_for(name):
    """Two stages, all kinds of units."""
    return calibrate(UNetHost(make(name)), list(range(8)), steps=16, stages=EDGES, kinds=KINDS, batch_size=8)


@cache
def bank_for(name, sharing):
    """All kinds of units, in a way to hold weights (one of `SHARING_IDS`)."""
    order, consumers = SHARINGS[SHARING_IDS.index(sharing)]
    return prune(
        UNetHost(make(name)),
        calibration_for(name),
        levels=LEVELS,
        kinds=KINDS,
        multiple=8,
        layer_allocation="uniform",
        order=order,
        consumers=consumers,
    )
