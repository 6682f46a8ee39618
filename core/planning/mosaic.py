"""MosaicDiff's closed form (arXiv 2510.11962): how fast a stage of the trajectory learns, by its noise schedule alone.

With x_t = a x_0 + s eps, d values, m = |x_0|^2 / d and eps of unit variance, the expected distance to the clean one is

    E[MSE(t)] = (1 - a_t)^2 m + s_t^2

and E[Grad(t)] = E[MSE(t)] - E[MSE(t - 1)]. For DDPM-like schedules (a^2 = alpha_bar, s^2 = 1 - alpha_bar) these are the
paper's formulas; for flow matching (a = 1 - sigma, s = sigma) they give E[MSE] = sigma^2 (1 + m), whose gradient only
rises: its fast stage reaches up to pure noise, and there is no early one.

score(t) = E[Grad(t)] + lambda ln SNR(t). The steps whose score exceeds M max(score) are the middle, fast stage, which
is pruned least; s_i is proportional to 1 - mean(score)_i. The paper leaves two things open, and these are this module's
answers: mean scores are taken relative to the largest one (raw ones are near 0.003, and 1 - 0.003 would tell no stage
from another), and lambda is 0 unless given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AllocationError
from ..host import NoiseLevel
from ..schedule import StageSchedule

GRID = 1000
"""Timesteps on which the closed form is evaluated: t = 0 .. 999, tau = t / 1000."""

LOG_SNR_LIMIT = 20.0
"""Where ln SNR is cut off: it is infinite at either end of flow matching, and at zero terminal SNR."""


@dataclass(frozen=True)
class MosaicSettings:
    """The free parameters of MosaicDiff.

    Args:
        threshold: M, the share of the largest score above which a step belongs to the fast stage.
        snr_weight: lambda. Scores are near 0.003 and ln SNR near 10: values above 1e-4 drown the gradient.
        mean_square: m, the mean square of the data's values; measured on a few dense samples if None.
    """

    threshold: float = 0.55
    snr_weight: float = 0.0
    mean_square: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise AllocationError(f"mosaic's `threshold` must be in (0, 1), got {self.threshold}.")
        if not 0 <= self.snr_weight < 1:
            raise AllocationError(f"mosaic's `snr_weight` must be in [0, 1), got {self.snr_weight}.")
        if self.mean_square is not None and not 0 < self.mean_square < float("inf"):
            raise AllocationError(f"mosaic's `mean_square` must be a positive number, got {self.mean_square}.")


def grid() -> list[float]:
    """Tau of every timestep of the closed form, rising from 0."""
    return [index / GRID for index in range(GRID)]


def expected_mse(level: NoiseLevel, mean_square: float) -> float:
    """E[MSE(t)]: mean squared distance of x_t to x_0.

    Args:
        level: signal and noise at t.
        mean_square: m, of the values of x_0.
    """
    return (1 - level.signal) ** 2 * mean_square + level.noise**2


def expected_gradient(levels: Sequence[NoiseLevel], mean_square: float) -> list[float]:
    """E[Grad(t)] = E[MSE(t)] - E[MSE(t - 1)] at each timestep; the clean image comes before the first.

    Args:
        levels: signal and noise at t = 0, 1, ...
        mean_square: m, of the values of x_0.
    """
    errors = [expected_mse(level, mean_square) for level in levels]
    return [error - before for before, error in zip([0.0, *errors], errors, strict=False)]


def scores(levels: Sequence[NoiseLevel], mean_square: float, snr_weight: float = 0.0) -> list[float]:
    """score(t) = E[Grad(t)] + lambda ln SNR(t), ln SNR cut off at +-20.

    Args:
        levels: signal and noise at t = 0, 1, ...
        mean_square: m, of the values of x_0.
        snr_weight: lambda.
    """
    gradients = expected_gradient(levels, mean_square)
    cut = [min(max(level.log_snr, -LOG_SNR_LIMIT), LOG_SNR_LIMIT) for level in levels]
    return [gradient + snr_weight * log_snr for gradient, log_snr in zip(gradients, cut, strict=True)]


def fast_stage(score: Sequence[float], threshold: float) -> tuple[int, int]:
    """First and last timestep whose score reaches `threshold` times the largest."""
    largest = max(score)
    if largest <= 0:
        raise AllocationError("mosaic's scores are all negative: give a smaller `snr_weight`.")
    fast = [index for index, value in enumerate(score) if value >= threshold * largest]
    return fast[0], fast[-1]


def mosaic_boundaries(score: Sequence[float], threshold: float) -> list[float]:
    """Inner boundaries in tau, falling: where the early stage ends and where the late one begins, if there are any.

    Args:
        score: at tau = 0, 1 / n, ... (n - 1) / n.
        threshold: M.
    """
    first, last = fast_stage(score, threshold)
    early = [(last + 1) / len(score)] if last + 1 < len(score) else []
    return early + ([first / len(score)] if first > 0 else [])


def relative_sparsities(score: Sequence[float], stages: StageSchedule) -> list[float]:
    """1 - mean(score) / max(score) of each stage: what the sparsities are in proportion to.

    Args:
        score: at tau = 0, 1 / n, ... (n - 1) / n.
        stages: any partition; its levels do not matter.
    """
    largest, count = max(score), len(score)
    result = []
    for stage in stages.stages:
        inside = [value for index, value in enumerate(score) if stage.low <= index / count < stage.high]
        inside = inside or [score[min(int(stage.low * count), count - 1)]]  # a stage narrower than the grid
        result.append(1 - sum(inside) / len(inside) / largest)
    return result
