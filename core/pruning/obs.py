"""Greedy structured Optimal Brain Surgeon: the order in which units are given up, least loss first.

Legend (OBS-Diff, arXiv 2510.06751, section 3; group form as in MosaicDiff, arXiv 2510.11962): W (out, d) the consumer,
u the columns of a unit, H the damped second moment of its inputs. Loss of a unit: tr(W_u ([H^-1]_uu)^-1 W_u^T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """A group's units, most important first, and the loss that giving up each one added (same positions)."""

    units: Tensor
    losses: Tensor


def obs_order(consumers: Sequence[tuple[Tensor, Tensor]], columns: Sequence[Tensor]) -> Order:
    """Remove one unit after the other, each time the one that costs least once the rest has made up for it.

    The loss is exact for the group as a block (not the Cholesky diagonal of the reference code), the weights are
    updated after every removal, and with several consumers (joint attention) their losses are summed, not their ranks.

    Args:
        consumers: (weight (out, d + 1), damped Hessian (d + 1, d + 1)) of each consumer; the last column is the bias's
            constant-1 input, which is never removed.
        columns: for each consumer, the columns of the units, shape (units, width).

    Returns:
        The reverse of the removal order, so that every number of kept units is a prefix.
    """
    states = [_State(weight, hessian, cols) for (weight, hessian), cols in zip(consumers, columns, strict=True)]
    count = len(columns[0])
    gone = torch.zeros(count, dtype=torch.bool)
    removed, losses = [], []
    for _ in range(count):
        loss = torch.stack([state.losses() for state in states]).sum(0).cpu()
        loss[gone] = torch.inf
        unit = int(loss.argmin())
        removed.append(unit)
        losses.append(float(loss[unit]))
        gone[unit] = True
        for state in states:
            state.remove(unit)
    return Order(torch.tensor(removed[::-1]), torch.tensor(losses[::-1], dtype=torch.float64))


class _State:
    """One consumer during the greedy removal: W and H^-1, both kept up to date, in float64."""

    def __init__(self, weight: Tensor, hessian: Tensor, columns: Tensor) -> None:
        self.weight = weight.double().clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
        self.columns = columns.to(weight.device)

    def losses(self) -> Tensor:
        """Loss of each unit if it went now, shape (units,). Meaningless for units that are gone."""
        if self.columns.shape[1] == 1:
            column = self.columns[:, 0]
            return self.weight[:, column].square().sum(0) / self.inverse.diagonal()[column]
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        weights = self.weight[:, self.columns].movedim(0, -1)  # (units, width, out)
        solved: Tensor = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum((1, 2))

    def remove(self, unit: int) -> None:
        """Give up a unit: the weights that stay take over what they can, and its rows leave the inverse."""
        columns = self.columns[unit]
        rows = self.inverse[columns]  # (width, d + 1)
        step = torch.linalg.solve(rows[:, columns], rows)
        self.weight -= self.weight[:, columns] @ step
        self.inverse -= rows.T @ step
        # What is left there is rounding; a unit diagonal keeps later solves of this dead block regular.
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.inverse[columns, columns] = 1
