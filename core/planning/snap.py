"""From relative sparsities to the bank's levels: scaled to the budget, then snapped within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .best_levels import best_levels


def levels_for(
    weights: Sequence[float], calls: Sequence[int], costs: Mapping[float, int], limit: int
) -> tuple[float, ...]:
    """Levels whose sparsities are about in proportion to `weights` and whose cost stays within `limit`.

    Args:
        weights: relative sparsity of each stage; all zero means all alike.
        calls: denoiser calls of each stage.
        costs: sparsity -> cost of one call; must hold 0 and stay within `limit` at its least.
        limit: largest cost of all calls.
    """
    return nearest_levels(scaled(weights, calls, costs, limit), calls, costs, limit)


def scaled(weights: Sequence[float], calls: Sequence[int], costs: Mapping[float, int], limit: int) -> list[float]:
    """The sparsities c * weight, none above the highest level, that spend the limit; cost is linear between levels.

    Where the limit cannot be met because stages of no weight stay dense, all others are at the highest level.
    """
    highest, largest = max(costs), max(weights)
    weights = [round(weight / largest, 9) for weight in weights] if largest > 0 else [1.0] * len(weights)

    def at(factor: float) -> list[float]:
        return [min(factor * weight, highest) for weight in weights]

    def spent(factor: float) -> float:
        return sum(count * _between(costs, value) for count, value in zip(calls, at(factor), strict=True))

    low, high = 0.0, highest / min(weight for weight in weights if weight > 0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > limit else (low, middle)
    return at(high) if spent(0.0) > limit else at(0.0)


def nearest_levels(
    wanted: Sequence[float], calls: Sequence[int], costs: Mapping[float, int], limit: int
) -> tuple[float, ...]:
    """The levels nearest to `wanted`, in squares over all calls, among those whose cost stays within `limit`: exact,
    so that no rounding can exceed the budget or pile what is left on one stage.
    """
    sparsities = sorted(costs)
    prices = [[count * costs[sparsity] for sparsity in sparsities] for count in calls]
    distances = [
        [count * (sparsity - value) ** 2 for sparsity in sparsities] for count, value in zip(calls, wanted, strict=True)
    ]
    (chosen,) = best_levels(prices, distances, limit)
    return tuple(sparsities[index] for index in chosen)


def _between(costs: Mapping[float, int], sparsity: float) -> float:
    """Cost of a sparsity between two levels."""
    below = max(level for level in costs if level <= sparsity)
    above = min(level for level in costs if level >= sparsity)
    part = (sparsity - below) / (above - below) if above > below else 0.0
    return costs[below] + part * (costs[above] - costs[below])
