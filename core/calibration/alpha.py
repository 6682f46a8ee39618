"""How much each denoising step counts in the Hessians."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import CalibrationError

Alpha = Callable[[int], list[float]]


def uniform(steps: int) -> list[float]:
    """Every step counts the same."""
    return [1.0] * steps


def log_decrease(steps: int, low: float = 0.8, high: float = 1.2) -> list[float]:
    """OBS-Diff's weight, falling with the logarithm of the step (arXiv 2510.06751, equation 5): noisy steps count more.

    A single step gets `high` (the published formula divides by ln 1 = 0 there).
    """
    if steps == 1:
        return [high]
    return [low + (high - low) * math.log(steps - index) / math.log(steps) for index in range(steps)]


ALPHAS: dict[str, Alpha] = {"uniform": uniform, "log-decrease": log_decrease}


def step_weights(name: str, steps: int) -> list[float]:
    """Weight of each step, first (noisiest) to last. CalibrationError lists the names that exist."""
    if name not in ALPHAS:
        raise CalibrationError(f"`alpha` must be one of {', '.join(ALPHAS)}; got {name!r}.")
    return ALPHAS[name](steps)
