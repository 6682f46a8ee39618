"""How far the final latents are from the dense model's, seed by seed: no decoding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Fitness, FitnessRequest, Outcome, register_fitness

NOISELESS = 1e-12
"""Error over signal below which two latents count as equal: 120 dB."""


def _pair(made: Outcome, dense: Outcome) -> tuple[Tensor, Tensor]:
    """Latents of both, a row a probe, float32."""
    return made.latents.float().flatten(1), dense.latents.float().flatten(1)


def squared(made: Outcome, dense: Outcome) -> Tensor:
    """Mean squared error of each probe."""
    ours, theirs = _pair(made, dense)
    return (ours - theirs).square().mean(1)


def absolute(made: Outcome, dense: Outcome) -> Tensor:
    """Mean absolute error of each probe."""
    ours, theirs = _pair(made, dense)
    return (ours - theirs).abs().mean(1)


def turned(made: Outcome, dense: Outcome) -> Tensor:
    """1 - cosine similarity of each probe."""
    ours, theirs = _pair(made, dense)
    return (1 - F.cosine_similarity(ours.double(), theirs.double(), dim=1)).clamp_min(0)


def noise(made: Outcome, dense: Outcome) -> Tensor:
    """Minus the signal-to-noise ratio of each probe in dB, at least -120."""
    ours, theirs = _pair(made, dense)
    signal = theirs.square().sum(1)
    error = (ours - theirs).square().sum(1)
    return 10 * (error / signal).clamp_min(NOISELESS).log10()


@register_fitness("latent_mse")
def latent_mse(_: FitnessRequest) -> Fitness:
    """Mean squared error."""
    return Fitness("latent_mse", squared, floor=0.0)


@register_fitness("latent_mae")
def latent_mae(_: FitnessRequest) -> Fitness:
    """Mean absolute error: outliers count less."""
    return Fitness("latent_mae", absolute, floor=0.0)


@register_fitness("latent_cosine")
def latent_cosine(_: FitnessRequest) -> Fitness:
    """1 - cosine similarity: contrast does not count."""
    return Fitness("latent_cosine", turned, floor=0.0)


@register_fitness("latent_snr")
def latent_snr(_: FitnessRequest) -> Fitness:
    """Minus the mean signal-to-noise ratio in dB: probes that come out well count as much as bad ones."""
    return Fitness("latent_snr", noise, floor=-120.0)
