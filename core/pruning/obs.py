"""Greedy structured Optimal Brain Surgeon: the order in which units are given up, least loss first.

Legend (OBS-Diff, arXiv 2510.06751, section 3; group form as in MosaicDiff, arXiv 2510.11962): W (out, d) the consumer,
u the columns of a unit, w of them, H the damped second moment of its inputs, A = H^-1, M = W^T W.

The loss of a unit is tr(W_u (A_uu)^-1 W_u^T) = tr((A_uu)^-1 M_uu), so A and M on the units' own columns are all that
the order needs. Giving up u makes W - W_u (A_uu)^-1 A_u of W. With the lower Cholesky factor A_uu = R R^T, and

    l = R^-1 A_u    m = R^-1 M_u    g = m - 1/2 (R^-1 M_uu R^-T) l

that is A - l^T l and M - l^T g - g^T l: a Cholesky factorisation of A that picks its pivots by loss and takes M along.
As in blocked pivoted Cholesky (LAPACK's dpstrf), l and g are collected in panels. Within a panel only what the next
choice reads is kept up to date, the diagonal blocks; rows are computed when their unit goes; one matrix product a panel
does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 128
"""Columns that are given up between two updates of the whole matrices, unless a unit alone has more."""


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
    panel = min(state.panel for state in states)
    present = torch.arange(len(columns[0]))
    removed: list[int] = []
    losses: list[float] = []
    while len(present):
        gone = torch.zeros(len(present), dtype=torch.bool)
        for _ in range(min(panel, len(present))):
            loss = torch.stack([state.losses().cpu() for state in states]).sum(0)
            loss[gone] = torch.inf
            place = int(loss.argmin())
            gone[place] = True
            removed.append(int(present[place]))
            losses.append(float(loss[place]))
            for state in states:
                state.remove(place)
        # The last places that stay move into those that are free, so that the work shrinks and nothing is copied.
        stay = len(present) - int(gone.sum())
        free, moved = gone[:stay].nonzero()[:, 0], (~gone[stay:]).nonzero()[:, 0] + stay
        present[free] = present[moved]
        present = present[:stay]
        for state in states:
            state.close_panel(free, moved, stay)
    return Order(torch.tensor(removed[::-1]), torch.tensor(losses[::-1], dtype=torch.float64))


class _State:
    """One consumer during the greedy removal: A and M on the columns of the units that are left, in float64.

    Args:
        weight: (out, d + 1).
        hessian: (d + 1, d + 1), damped.
        columns: of the units, shape (units, width).
    """

    def __init__(self, weight: Tensor, hessian: Tensor, columns: Tensor) -> None:
        index = columns.to(weight.device).reshape(-1)
        self.width = columns.shape[1]
        self.panel = max(PANEL // self.width, 1)
        factor = torch.linalg.cholesky(hessian.to(weight.device).double())
        self.inverse = torch.cholesky_inverse(factor)[index][:, index]  # A
        used = weight.double()[:, index]
        self.gram = used.T @ used  # M
        self.inverse_blocks = self._diagonal_blocks(self.inverse)
        self.gram_blocks = self._diagonal_blocks(self.gram)
        self.left = self.inverse.new_empty(self.panel * self.width, len(index))  # the panel's l, one row a column gone
        self.right = torch.empty_like(self.left)  # and g
        self.filled = 0

    def _diagonal_blocks(self, matrix: Tensor) -> Tensor:
        units = len(matrix) // self.width
        blocks = matrix.view(units, self.width, units, self.width).diagonal(dim1=0, dim2=2)
        return blocks.movedim(-1, 0).contiguous()  # (units, width, width)

    def losses(self) -> Tensor:
        """Loss of each unit if it went now, shape (units,). Meaningless for units that are gone."""
        if self.width == 1:
            return (self.gram_blocks / self.inverse_blocks)[:, 0, 0]
        solved: Tensor = torch.linalg.solve(self.inverse_blocks, self.gram_blocks)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, place: int) -> None:
        """Give up the unit at `place`: one more l and g in the panel, and the diagonal blocks of all others."""
        unit = slice(place * self.width, (place + 1) * self.width)
        left, right = self.left[: self.filled], self.right[: self.filled]
        inverse = self.inverse[unit] - left[:, unit].T @ left
        gram = self.gram[unit] - left[:, unit].T @ right - right[:, unit].T @ left
        root = torch.linalg.cholesky(inverse[:, unit])
        new_left, moment = torch.linalg.solve_triangular(root, torch.stack([inverse, gram]), upper=False)
        both = torch.linalg.solve_triangular(root, moment[:, unit].T, upper=False)
        new_right = moment - 0.5 * both @ new_left
        end = self.filled + self.width
        self.left[self.filled : end], self.right[self.filled : end] = new_left, new_right
        self.filled = end
        lefts, rights = (rows.view(self.width, -1, self.width).movedim(1, 0) for rows in (new_left, new_right))
        self.inverse_blocks -= lefts.mT @ lefts
        cross = lefts.mT @ rights
        self.gram_blocks -= cross + cross.mT
        # What is left there is rounding; a unit matrix keeps later solves of this dead block regular.
        self.inverse_blocks[place] = torch.eye(self.width, dtype=root.dtype, device=root.device)

    def close_panel(self, free: Tensor, moved: Tensor, stay: int) -> None:
        """Move the units at `moved` to the places `free`, keep the first `stay`, and update the whole of A and M."""
        device, columns = self.inverse.device, stay * self.width
        free, moved = free.to(device), moved.to(device)
        for blocks in (self.inverse_blocks, self.gram_blocks):
            blocks[free] = blocks[moved]
        self.inverse_blocks, self.gram_blocks = self.inverse_blocks[:stay], self.gram_blocks[:stay]
        within = torch.arange(self.width, device=device)
        free, moved = ((places[:, None] * self.width + within).reshape(-1) for places in (free, moved))
        for rows in (self.left, self.right, self.inverse, self.gram):
            rows[:, free] = rows[:, moved]
        for square in (self.inverse, self.gram):
            square[free] = square[moved]
        self.inverse, self.gram = self.inverse[:columns, :columns], self.gram[:columns, :columns]
        self.left, self.right = self.left[:, :columns], self.right[:, :columns]
        left, right = self.left[: self.filled], self.right[: self.filled]
        self.inverse.addmm_(left.T, left, alpha=-1)
        self.gram.addmm_(torch.cat([left, right]).T, torch.cat([right, left]), alpha=-1)
        self.filled = 0
