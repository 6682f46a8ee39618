"""Choice of one level a stage under a budget, where the errors of stages add up as vectors.

As long as errors are small, a schedule's final latents differ from the dense ones by the sum of what each of its stages
changes alone. Its squared error is therefore a quadratic form: the stages' own errors, and for each two of them how far
they push the same way. A sum of the stages' errors, which dynamic programming minimises exactly, is its diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Levels = tuple[int, ...]


def best_together(
    costs: Sequence[Sequence[int]], products: Tensor, budget: int, starts: Iterable[Levels], count: int = 1
) -> list[Levels]:
    """The `count` best choices that descents from some others end at, best first; fewer if fewer ends differ.

    Each descent changes two stages at once, as pays most, until no change of two pays: one gains what the other gives.

    Args:
        costs: per stage, the cost of each level.
        products: mean product of what two stages at two levels change, shape (stages, levels, stages, levels), float64;
            levels whose product with themselves is not finite are never chosen.
        budget: largest total cost.
        starts: level of each stage; those over the budget, or with a level that cannot be chosen, are left out.
        count: how many choices.
    """
    own = products.flatten(0, 1).flatten(1).diagonal().reshape(products.shape[:2])
    usable = own.isfinite()
    price = torch.tensor(costs, dtype=torch.float64).masked_fill(~usable, torch.inf)
    finite = products.nan_to_num(0.0, 0.0, 0.0)
    stages = torch.arange(len(costs))
    ends: dict[Levels, float] = {}
    for start in dict.fromkeys(starts):
        levels = torch.tensor(start)
        if float(price[stages, levels].sum()) <= budget:
            ends.update([_descend(levels, finite, price, budget)])
    return sorted(ends, key=lambda each: (ends[each], each))[:count]


def error_of(levels: Sequence[int], products: Tensor) -> float:
    """The quadratic form at one choice."""
    stages, chosen = torch.arange(len(levels)), torch.tensor(levels)
    return float(products[stages, chosen][:, stages, chosen].sum())


def _descend(levels: Tensor, products: Tensor, price: Tensor, budget: int) -> tuple[Levels, float]:
    """The end of a descent, and its error."""
    error = error_of(levels.tolist(), products)
    while True:
        gain = _gains(levels, products, price, budget)
        best = int(gain.argmax())
        if gain.flatten()[best] <= 1e-12 * abs(error):  # rounding
            return tuple(levels.tolist()), error
        first, second, *both = (int(each) for each in torch.unravel_index(torch.tensor(best), gain.shape))
        levels = levels.clone()
        levels[[first, second]] = torch.tensor(both)
        error = error_of(levels.tolist(), products)


def _gains(levels: Tensor, products: Tensor, price: Tensor, budget: int) -> Tensor:
    """What it takes from the error to give two stages two levels, shape (stages, stages, levels, levels); -inf where
    that exceeds the budget, or is one stage twice.
    """
    stages = torch.arange(len(levels))
    beside = products[:, :, stages, levels]  # of a stage at a level, with each other stage as it is
    alone = products.flatten(0, 1).flatten(1).diagonal().reshape(price.shape)
    rest = beside.sum(2) - beside[stages, :, stages]
    single = alone + 2 * rest
    one = single[:, None, :, None] - 2 * beside.transpose(1, 2)[:, :, :, None]
    other = single[None, :, None, :] - 2 * beside.transpose(1, 2).transpose(0, 1)[:, :, None, :]
    error = one + other + 2 * products.transpose(1, 2)
    now = error[stages[:, None], stages[None], levels[:, None], levels[None]]
    spent = price[stages, levels]
    cost = spent.sum() - spent[:, None, None, None] - spent[None, :, None, None]
    cost = cost + price[:, None, :, None] + price[None, :, None, :]
    gain = now[:, :, None, None] - error
    gain[cost > budget] = -torch.inf
    gain[stages, stages] = -torch.inf
    return gain
