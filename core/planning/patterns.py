"""Diff-ES's named patterns (arXiv 2603.05105, initial populations of its search): fixed shapes of sparsity over stages.

Each is a function of the number of stages and gives one weight a stage, noisiest first; sparsities are in proportion to
them. The formulas are those of its reference code, which counts stages from the *clean* end: `front` prunes the last
steps of sampling most, `back` the first ones. Its `ramp_down` and `ramp_up` equal these two. Scaling to a budget and
snapping to levels happen elsewhere (`snap.py`), and not by its rounding, which gives the whole remainder to one stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Pattern = Callable[[int], list[float]]
"""Number of stages -> relative sparsity of each, noisiest first."""

PATTERNS: dict[str, Pattern] = {}


def register_pattern(*names: str) -> Callable[[Pattern], Pattern]:
    """Decorator: name a pattern."""

    def register(function: Pattern) -> Pattern:
        PATTERNS.update(dict.fromkeys(names, function))
        return function

    return register


@register_pattern("front", "ramp-down")
def front(count: int) -> list[float]:
    """A ramp that prunes the cleanest stage most: 1, 2, ... n."""
    return [float(index + 1) for index in range(count)]


@register_pattern("back", "ramp-up")
def back(count: int) -> list[float]:
    """A ramp that prunes the noisiest stage most: n, ... 2, 1."""
    return front(count)[::-1]


@register_pattern("middle")
def middle(count: int) -> list[float]:
    """A bell around the middle stage, as wide as a quarter of the stages."""
    return _bell(count, 4.0)


@register_pattern("ends")
def ends(count: int) -> list[float]:
    """What a bell leaves at the two ends; one or two stages have no middle, and are alike."""
    bell = _bell(count, 3.5)
    return [max(bell) - value + 1e-6 for value in bell]


@register_pattern("zigzag")
def zigzag(count: int) -> list[float]:
    """1.2 and 0.8 in turn, the cleanest stage 1.2."""
    return [0.8 if index % 2 else 1.2 for index in range(count)][::-1]


def _bell(count: int, parts: float) -> list[float]:
    """A Gaussian around the middle stage; its standard deviation is n / parts, at least 1."""
    centre, width = (count - 1) / 2, max(1.0, count / parts)
    return [math.exp(-0.5 * ((index - centre) / width) ** 2) for index in range(count)]
