"""How much each denoising step counts in the Hessians.

The named weights are those of OBS-Diff (arXiv 2510.06751, equation 5 and the ablation in table 6): between 0.8 and 1.2,
by the number of the step. Any function of the noise level tau can stand in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import CalibrationError

AlphaFunction = Callable[[float], float]
"""From tau in [0, 1] (1 is pure noise) to the weight of a step there."""

Alpha = str | AlphaFunction

LOW, HIGH = 0.8, 1.2
"""OBS-Diff's least and largest weight."""


def uniform(steps: int) -> list[float]:
    """Every step counts the same."""
    return [1.0] * steps


def linear_decrease(steps: int) -> list[float]:
    """Falling by the same amount each step. A single step gets the largest weight, as in all of these."""
    return [HIGH - (HIGH - LOW) * index / max(steps - 1, 1) for index in range(steps)]


def log_decrease(steps: int) -> list[float]:
    """Falling with the logarithm of the steps that are left (equation 5): noisy steps count more.

    The published formula divides by ln 1 = 0 at a single step.
    """
    if steps == 1:
        return [HIGH]
    return [LOW + (HIGH - LOW) * math.log(steps - index) / math.log(steps) for index in range(steps)]


ALPHAS: dict[str, Callable[[int], list[float]]] = {
    "uniform": uniform,
    "log-decrease": log_decrease,
    "log-increase": lambda steps: log_decrease(steps)[::-1],
    "linear-decrease": linear_decrease,
    "linear-increase": lambda steps: linear_decrease(steps)[::-1],
}


def step_weights(alpha: Alpha, taus: Sequence[float]) -> list[float]:
    """Weight of each step, first (noisiest) to last.

    Args:
        alpha: a name in `ALPHAS`, or a function of tau.
        taus: noise level of each step.

    Raises:
        CalibrationError: no such name, or a function that gives something else than finite weights of at least 0, some
            of them above.

    Example:
        >>> step_weights(lambda tau: 1 - tau / 2, [1.0, 0.5])
        [0.5, 0.75]
    """
    if not callable(alpha):
        if alpha not in [*ALPHAS]:  # a list, say, has no hash
            raise CalibrationError(f"`alpha` must be a function of tau or one of {', '.join(ALPHAS)}; got {alpha!r}.")
        return ALPHAS[alpha](len(taus))
    weights = [_weight(alpha(tau), tau) for tau in taus]
    if not any(weights):
        raise CalibrationError("`alpha` is 0 at every step, so that nothing would be recorded.")
    return weights


def alpha_name(alpha: Alpha) -> str:
    """What to call it in provenance."""
    return alpha if isinstance(alpha, str) else getattr(alpha, "__name__", type(alpha).__name__)


def _weight(value: float, tau: float) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        raise CalibrationError(f"`alpha` must give a number; at tau {tau:g} it gave {value!r}.") from None
    if not (math.isfinite(weight) and weight >= 0):
        raise CalibrationError(f"`alpha` must give finite weights of at least 0; at tau {tau:g} it gave {weight:g}.")
    return weight
