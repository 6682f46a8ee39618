"""Plain, slow versions of the solvers, and layers on which the fast ones must equal them; also for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stageprune.core.pruning.compensate import damp
from stageprune.core.pruning.obs import Order
from stageprune.core.pruning.sparse import NM, Share
from support import hessian_of


def plain_order(consumers: Sequence[tuple[Tensor, Tensor]], columns: Sequence[Tensor], removals: int = -1) -> Order:
    """Greedy structured OBS, the whole of W and H^-1 updated after every removal; arguments as of `obs_order`.

    Args:
        consumers: (weight, damped Hessian) of each.
        columns: of the units in each.
        removals: stop after so many; -1 removes all.
    """
    states = [_State(weight, hessian, cols) for (weight, hessian), cols in zip(consumers, columns, strict=True)]
    count = len(columns[0])
    gone = torch.zeros(count, dtype=torch.bool)
    removed, losses = [], []
    for _ in range(count if removals < 0 else removals):
        loss = torch.stack([state.losses() for state in states]).sum(0)
        loss[gone] = torch.inf
        unit = int(loss.argmin())
        removed.append(unit)
        losses.append(float(loss[unit]))
        gone[unit] = True
        for state in states:
            state.remove(unit)
    return Order(torch.tensor(removed[::-1]), torch.tensor(losses[::-1], dtype=torch.float64))


class _State:
    """One consumer: W and H^-1, both kept up to date, in float64."""

    def __init__(self, weight: Tensor, hessian: Tensor, columns: Tensor) -> None:
        self.weight = weight.double().clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
        self.columns = columns

    def losses(self) -> Tensor:
        if self.columns.shape[1] == 1:
            column = self.columns[:, 0]
            return self.weight[:, column].square().sum(0) / self.inverse.diagonal()[column]
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        weights = self.weight[:, self.columns].movedim(0, -1)  # (units, width, out)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def remove(self, unit: int) -> None:
        columns = self.columns[unit]
        rows = self.inverse[columns]
        step = torch.linalg.solve(rows[:, columns], rows)
        self.weight -= self.weight[:, columns] @ step
        self.inverse -= rows.T @ step
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.inverse[columns, columns] = 1


def brute_force_order(consumers: Sequence[tuple[Tensor, Tensor]], columns: Sequence[Tensor]) -> Order:
    """The same from nothing but its definition: at every step the best W and the inverse of H on the kept columns."""
    kept, removed, losses = list(range(len(columns[0]))), [], []
    while kept:
        pairs = zip(consumers, columns, strict=True)
        costs = torch.stack([_costs(weight, hessian, cols[kept]) for (weight, hessian), cols in pairs]).sum(0)
        place = int(costs.argmin())
        losses.append(float(costs[place]))
        removed.append(kept.pop(place))
    return Order(torch.tensor(removed[::-1]), torch.tensor(losses[::-1], dtype=torch.float64))


def _costs(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """tr(W_u ([H^-1]_uu)^-1 W_u^T) of each kept unit, shape (units,)."""
    stay = torch.cat([columns.flatten(), torch.tensor([len(hessian) - 1])])  # with the bias
    inverse = torch.linalg.inv(hessian[stay][:, stay])
    best = weight @ hessian[:, stay] @ inverse
    costs = []
    for unit in torch.arange(columns.numel()).view(columns.shape):
        block = torch.linalg.inv(inverse[unit][:, unit])
        costs.append(torch.einsum("oi,ij,oj->", best[:, unit], block, best[:, unit]))
    return torch.stack(costs)


def plain_sparsify(weight: Tensor, hessian: Tensor, span: int, zeros_of: Callable[[Tensor], Tensor]) -> Tensor:
    """SparseGPT column by column: no factor, no blocks, but the inverse of what is not yet fixed, anew at each.

    Args:
        weight: (out, d + 1).
        hessian: (d + 1, d + 1), damped.
        span: columns for which the mask is chosen at once.
        zeros_of: from the costs (out, columns) to a mask of the same shape, True for zeros.

    Returns:
        (out, d + 1).
    """
    weight, size = weight.double().clone(), len(hessian)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(size - 1)]
    for j in range(size - 1):
        if j % span == 0:
            end = min(j + span, size - 1)
            variances = torch.stack([inverses[c][0, 0] for c in range(j, end)])
            mask = zeros_of(weight[:, j:end].square() / variances)
        gone = torch.where(mask[:, j % span], weight[:, j], 0.0)
        weight[:, j:] -= gone[:, None] / inverses[j][0, 0] * inverses[j][0]
        weight[mask[:, j % span], j] = 0
    return weight


def layer_problem(
    seed: int, columns: int, outputs: int, kind: str = "full", rows: int | None = None, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """A layer with its bias, and its damped Hessian, in float64; `kind` as of `spoil`."""
    generator = torch.Generator().manual_seed(seed)
    count = rows or 3 * columns
    inputs = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5 + 0.5
    spoil(inputs, kind)
    weight = torch.randn(outputs, columns + 1, generator=generator, dtype=torch.float64)
    return weight, damp(hessian_of(inputs), damping)


def spoil(inputs: Tensor, kind: str) -> None:
    """Make some columns of inputs depend on others, or on nothing; `full` leaves them as they are."""
    half = inputs.shape[1] // 2
    if kind == "low rank":
        inputs[:, half:] = inputs[:, : inputs.shape[1] - half] * 2
    elif kind == "duplicates":
        inputs[:, -1] = inputs[:, 0]
    elif kind == "dead":
        inputs[:, ::3] = 0
    elif kind == "constant":
        inputs[:, 0] = 3.0


def zeros_of(pattern: Share | NM) -> Callable[[Tensor], Tensor]:
    """The mask by sorting."""

    def share(costs: Tensor) -> Tensor:
        return costs.flatten().argsort().argsort().view_as(costs) < round(pattern.zeros * costs.numel())

    def n_of_m(costs: Tensor) -> Tensor:
        parts = costs.unflatten(1, (-1, pattern.of))
        return (parts.argsort(2).argsort(2) < pattern.of - pattern.kept).flatten(1)

    return share if isinstance(pattern, Share) else n_of_m
