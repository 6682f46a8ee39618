"""Exact choice of one level a stage under a budget: dynamic programming over (cost, error) labels."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def best_levels(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int, count: int = 1
) -> list[tuple[int, ...]]:
    """The `count` choices of least total error whose total cost stays within `budget`, best first.

    Costs are whole numbers and nothing is discretised, so the result is exact: a partial choice is dropped only if
    `count` others are at least as cheap and as good. With all stages cheap to enumerate this equals brute force (a
    test says so).

    Args:
        costs: per stage, the cost of each level.
        errors: per stage, the error of each level.
        budget: largest total cost.
        count: how many choices to return; fewer if fewer fit.
    """
    cheapest_rest = [0]
    for row in reversed(costs):
        cheapest_rest.append(cheapest_rest[-1] + min(row))
    cheapest_rest.reverse()
    labels: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for stage, (stage_costs, stage_errors) in enumerate(zip(costs, errors, strict=True)):
        room = budget - cheapest_rest[stage + 1]
        grown = [
            (cost + stage_costs[level], error + stage_errors[level], (*choice, level))
            for cost, error, choice in labels
            for level in range(len(stage_costs))
            if cost + stage_costs[level] <= room
        ]
        labels = _undominated(grown, count)
    return [choice for _, _, choice in sorted(labels, key=lambda label: (label[1], label[0]))[:count]]


def _undominated(
    labels: list[tuple[int, float, tuple[int, ...]]], count: int
) -> list[tuple[int, float, tuple[int, ...]]]:
    """Labels that fewer than `count` others beat or equal in both cost and error."""
    kept = []
    best: list[float] = []  # the `count` least errors so far, negated, as a heap
    for label in sorted(labels):
        if len(best) < count:
            heapq.heappush(best, -label[1])
        elif label[1] < -best[0]:
            heapq.heapreplace(best, -label[1])
        else:
            continue
        kept.append(label)
    return kept
