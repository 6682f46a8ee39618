"""How far the images are from the dense model's, seed by seed."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Fitness, FitnessRequest, Outcome, register_fitness

HIGH = 0.25
"""Frequencies above this are high, in cycles a pixel: half of what an image can hold."""

_SILENCE = 1e-12
"""Energy below which an image has no high frequencies."""


def squared(made: Outcome, dense: Outcome) -> Tensor:
    """Mean squared error of each image."""
    return (made.images - dense.images).square().flatten(1).mean(1)


def high_frequency_energy(images: Tensor) -> Tensor:
    """Mean energy of the frequencies above 0.25 cycles a pixel, shape (images,).

    Args:
        images: shape (images, channels, height, width).
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images.double(), norm="ortho").abs().square().mean(1)
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    energy: Tensor = spectrum[:, (down.square() + across.square()).sqrt() > HIGH].mean(1)
    return energy


def detail(made: Outcome, dense: Outcome) -> Tensor:
    """Log ratio, without its sign, of the high frequencies' energy: 0 is as much detail as the dense model's."""
    ours, theirs = (high_frequency_energy(each.images).clamp_min(_SILENCE) for each in (made, dense))
    return (ours / theirs).log().abs()


@register_fitness("image_mse")
def image_mse(_: FitnessRequest) -> Fitness:
    """Mean squared error of pixels in [0, 1]."""
    return Fitness("image_mse", squared, floor=0.0)


@register_fitness("image_ssim")
def image_ssim(_: FitnessRequest) -> Fitness:
    """1 - structural similarity; Diff-ES's objective for SDXL. Needs the extra `report`."""
    # Evaluation builds on planning, so that only what is asked for may be taken from there.
    from ...evaluation.extras import report_extra  # noqa: PLC0415
    from ...evaluation.metrics import ssim  # noqa: PLC0415

    with report_extra():
        import torchmetrics  # noqa: F401, PLC0415  (now, rather than after the first trajectories)

    def unlike(made: Outcome, dense: Outcome) -> Tensor:
        return (1 - ssim(made.images, dense.images)).clamp_min(0)

    return Fitness("image_ssim", unlike, floor=0.0)


@register_fitness("image_frequency")
def image_frequency(_: FitnessRequest) -> Fitness:
    """As much fine detail as the dense model's images have, wherever it is."""
    return Fitness("image_frequency", detail, floor=0.0)
