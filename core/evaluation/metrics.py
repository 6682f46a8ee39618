"""Paired metrics (against the dense model's picture of the same seed) and set metrics (against the real pictures).

The two kinds answer different questions and often disagree, so a report always shows both. Paired metrics are a value a
sample; set metrics go through a `Judge`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import StagePruneError
from .extras import report_extra
from .judge import Judge, feature_statistics, frechet_distance

__all__ = [
    "feature_statistics",
    "frechet",
    "frechet_distance",
    "frechet_without_each",
    "jackknife_error",
    "mse",
    "psnr",
    "ssim",
    "standard_error",
]

SMALLEST_SIDE = 11
"""The side of SSIM's Gaussian window; smaller pictures have no place that it fits."""


def mse(values: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32.

    Args:
        values: latents or images, shape (samples, ...).
        reference: those of the dense model, same shape.

    Returns:
        Shape (samples,).

    Example:
        >>> mse(torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 3, 4, 4))
        tensor([0.2500, 0.2500])
    """
    _check_shapes(values, reference)
    return (values.float() - reference.float()).square().flatten(1).mean(1)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB, for images in [0, 1]; infinite where both are identical.

    Args:
        images: shape (samples, channels, height, width).
        reference: those of the dense model, same shape.

    Returns:
        Shape (samples,).

    Raises:
        StagePruneError: the shapes differ, or the extra `report` is not installed.
    """
    with report_extra():
        from torchmetrics.functional.image import peak_signal_noise_ratio  # noqa: PLC0415
    _check_shapes(images, reference)
    values: Tensor = peak_signal_noise_ratio(
        images.float(), reference.float(), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return values


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each sample (Gaussian window of 11 x 11), for images in [0, 1]; 1 is identical.

    Args:
        images: shape (samples, channels, height, width), at least 11 x 11 pixels.
        reference: those of the dense model, same shape.

    Returns:
        Shape (samples,).

    Raises:
        StagePruneError: the shapes differ, the images are too small, or the extra `report` is not installed.
    """
    with report_extra():
        from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: PLC0415
    _check_shapes(images, reference)
    if min(images.shape[-2:]) < SMALLEST_SIDE:
        raise StagePruneError(f"SSIM needs images of {SMALLEST_SIDE} x {SMALLEST_SIDE} or more, got {images.shape}.")
    values: Tensor = structural_similarity_index_measure(
        images.float(), reference.float(), data_range=1.0, reduction="none"
    )
    return values.reshape(-1)  # torchmetrics drops the dimension of a single sample


def frechet(judge: Judge, features: Tensor) -> float:
    """Squared Fréchet distance between images, given by the judge's features, and the real ones that it carries.

    Args:
        judge: supplies the real images' statistics.
        features: `judge.features(images)`, shape (samples, features), at least 2 samples. Few samples overstate the
            distance: compare values of equal counts only.
    """
    mean, covariance = feature_statistics(features)
    return frechet_distance(mean, covariance, judge.real_mean, judge.real_cov)


def frechet_without_each(judge: Judge, features: Tensor) -> Tensor:
    """`frechet` with each of the samples left out in turn, shape (samples,): what `jackknife_error` needs.

    Args:
        judge: supplies the real images' statistics.
        features: shape (samples, features), at least 3 samples.
    """
    every = torch.arange(len(features), device=features.device)
    return torch.tensor([frechet(judge, features[every != out]) for out in every], dtype=torch.float64)


def jackknife_error(without_each: Tensor) -> float:
    """Standard error of a statistic from its values with each sample left out, shape (samples,).

    For a Fréchet distance of few samples it is near the spread over fresh seeds, of which a bootstrap gives double.
    The difference of two variants' values gives the error of their difference: most noise is in the seeds, which both
    share.
    """
    return float((without_each.var(correction=0) * (len(without_each) - 1)).sqrt())


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of `values`, shape (samples,); 0 for a single one."""
    return float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def _check_shapes(values: Tensor, reference: Tensor) -> None:
    if values.shape != reference.shape:
        raise StagePruneError(
            f"paired metrics need equal shapes, got {tuple(values.shape)} and {tuple(reference.shape)}."
        )
