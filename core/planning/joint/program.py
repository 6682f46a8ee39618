"""The best way down the noise axis under a budget: exact dynamic programming over (grid point, cost)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RESOLUTION = 500
"""Costs are counted in this many parts of a dense call, rounded up, so that a budget is kept."""

Path = tuple[tuple[int, int, int], ...]
"""Jumps (from, to, level), from the first grid point to the end."""


def best_path(prices: Tensor, costs: Sequence[float], budget: float, resolution: int = RESOLUTION) -> Path | None:
    """The jumps of least total price whose calls cost no more than the budget; None if none does.

    Exact for costs that are whole numbers of `1 / resolution`.

    Args:
        prices: of the jump from point i to point j at a level, shape (points, points + 1, levels); infinite if it is
            not allowed.
        costs: of a call at each level, in dense calls.
        budget: in dense calls.
        resolution: parts of a dense call.
    """
    points, _, levels = prices.shape
    parts = [max(math.ceil(cost * resolution - 1e-6), 1) for cost in costs]
    room = math.floor(budget * resolution + 1e-6)
    best = torch.full((points + 1, room + 1), math.inf, dtype=torch.float64)
    came = torch.zeros((points + 1, room + 1, 2), dtype=torch.int32)  # from which point, at which level
    best[0, 0] = 0.0
    for place in range(points):
        for level in range(levels):
            part = parts[level]
            if part > room:
                continue
            reached = best[place, : room + 1 - part]
            total = reached[None, :] + prices[place, place + 1 :, level, None]
            better = total < best[place + 1 :, part:]
            best[place + 1 :, part:] = torch.where(better, total, best[place + 1 :, part:])
            came[place + 1 :, part:][better] = torch.tensor([place, level], dtype=torch.int32)
    spent = int(best[points].argmin())
    if not math.isfinite(float(best[points, spent])):
        return None
    path, place = [], points
    while place > 0:
        before, level = (int(value) for value in came[place, spent])
        path.append((before, place, level))
        place, spent = before, spent - parts[level]
    return tuple(reversed(path))
