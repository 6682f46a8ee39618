"""Optimal Brain Surgeon weight by weight: unstructured and N:M sparsity, SparseGPT's algorithm.

Legend (Frantar & Alistarh, SparseGPT, arXiv 2301.00774, section 3 and algorithm 1; OBS-Diff, arXiv 2510.06751, uses it
as it is): W (out, d) the layer's matrix, H (d, d) the damped second moment of its inputs, U upper with H^-1 = U^T U.

Columns are visited from left to right. Row j of U is, up to its scale, row j of the inverse that is left once the
columns before j are fixed, so that zeroing w in column j costs w^2 / U_jj^2, and the columns after it make up for that
by subtracting (w / U_jj) U_j. Which weights go is decided block by block, on weights that have already made up for
earlier blocks (adaptive mask selection). The updates of the columns behind a block wait for its end and are then one
matrix product (lazy batch updates). The bias is the weight of a constant-1 input, the last column, which is never
pruned and makes up for all the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BankError, CalibrationError

BLOCK = 128
"""Columns of a block: the paper's choice for the mask and for the lazy updates alike."""


@dataclass(frozen=True)
class Share:
    """Unstructured sparsity: of each block's weights, this share become zeros, in whichever rows they cost least.

    Args:
        zeros: in [0, 1).
    """

    zeros: float

    def __post_init__(self) -> None:
        if not 0 <= self.zeros < 1:
            raise BankError(f"the share of zeros must be in [0, 1), got {self.zeros}.")

    def span(self, columns: int) -> int:
        """Columns for which the mask is chosen at once, in a block of `columns`."""
        return columns

    def choose(self, costs: Tensor) -> Tensor:
        """Which weights become zeros.

        Args:
            costs: of zeroing each, shape (columns, out).

        Returns:
            True for zeros, same shape.
        """
        cheapest = costs.flatten().topk(round(self.zeros * costs.numel()), largest=False, sorted=False).indices
        return torch.zeros_like(costs, dtype=torch.bool).flatten().scatter_(0, cheapest, True).view_as(costs)

    def holds(self, weight: Tensor) -> bool:
        """Whether a matrix (out, columns) has that many zeros, but for the rounding of each block."""
        blocks = -(-weight.shape[1] // BLOCK)
        return int((weight == 0).sum()) >= self.zeros * weight.numel() - blocks

    def __str__(self) -> str:
        return f"{self.zeros:g}"


@dataclass(frozen=True)
class NM:
    """N:M sparsity: of every M consecutive weights of a row, N are kept, as in the hardware's 2:4.

    SparseGPT calls the number of zeros n, which for 2:4 and 4:8 is the same.

    Args:
        kept: N, from 1 to M.
        of: M.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.of:
            raise BankError(f"N:M sparsity keeps N of M weights, 1 <= N <= M; got {self}.")

    def span(self, columns: int) -> int:
        """Columns for which the mask is chosen at once, in a block of `columns`."""
        return self.of

    def choose(self, costs: Tensor) -> Tensor:
        """Which weights become zeros. Shapes as in `Share.choose`."""
        cheapest = costs.topk(self.of - self.kept, dim=0, largest=False, sorted=False).indices
        return torch.zeros_like(costs, dtype=torch.bool).scatter_(0, cheapest, True)

    def holds(self, weight: Tensor) -> bool:
        """Whether in a matrix (out, columns) every M consecutive weights of a row have at most N that are not 0."""
        if weight.shape[1] % self.of:
            return False
        return bool(((weight != 0).reshape(len(weight), -1, self.of).sum(2) <= self.kept).all())

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


Pattern = Share | NM


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """`"2:4"` is N:M, a number (or `"0.5"`) the share of zeros. BankError for anything else.

    Example:
        >>> parse_pattern("4:8"), parse_pattern(0.5)
        (NM(kept=4, of=8), Share(zeros=0.5))
    """
    if isinstance(text, Share | NM):
        return text
    try:
        if isinstance(text, str) and ":" in text:
            kept, of = text.split(":")
            return NM(int(kept), int(of))
        return Share(float(text))
    except BankError:
        raise
    except (TypeError, ValueError):
        raise BankError(
            f"`pattern` must be N:M such as '2:4' (of every 4 weights 2 are kept) or a share of zeros such as 0.5, got "
            f"{text!r}."
        ) from None


def mask_of(costs: Tensor, pattern: Pattern) -> Tensor:
    """Zeros of a whole layer chosen at once, without blocks and without making up for any.

    Args:
        costs: of zeroing each weight, shape (out, columns), columns a multiple of M for `NM`.
        pattern: what to zero.

    Returns:
        True for zeros, same shape.
    """
    span = pattern.span(costs.shape[1])
    parts = costs.reshape(len(costs), -1, span).movedim(2, 0)  # (span, out, parts)
    return pattern.choose(parts.flatten(1)).view(parts.shape).movedim(0, 2).flatten(1)


def sparsify(weight: Tensor, hessian: Tensor, pattern: Pattern, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Zero weights by `pattern`, the others making up for them.

    Args:
        weight: (out, d + 1), the last column the bias (see `with_bias`). For a convolution the columns are those of
            `matrix_of`: channels, and in each its taps.
        hessian: (d + 1, d + 1), damped (see `damp`), the last row and column the constant-1 input.
        pattern: `Share(0.5)`, or `NM(2, 4)` along the columns in their order.
        block: columns between two updates of the rest, and for `Share` those for which the mask is chosen at once;
            rounded down to a multiple of M for `NM`, at least M.

    Returns:
        Weight (out, d) with exact zeros, and bias (out,), float64.

    Raises:
        BankError: the columns are no multiple of M, or the shapes do not fit.
        CalibrationError: the Hessian is not positive definite: it was not damped.

    Example:
        >>> weight, bias = sparsify(with_bias(linear.weight, linear.bias), damp(hessian, 0.01), NM(2, 4))
    """
    columns = weight.shape[1] - 1
    size = _block_size(columns, hessian, pattern, block)
    factor = _inverse_factor(hessian.to(weight.device).double())
    rows = weight.detach().double().T.contiguous()  # W^T: a column of W is contiguous here
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        here = slice(begin, end)
        errors = _sparsify_block(rows[here], factor[here, here], pattern)
        rows[end:].addmm_(factor[here, end:].T, errors, alpha=-1)
    return rows[:-1].T.contiguous(), rows[-1].clone()


def _sparsify_block(rows: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """Sparsify the columns of one block in place.

    Args:
        rows: the block of W^T, shape (columns, out).
        factor: its block of U, shape (columns, columns).
        pattern: what to zero.

    Returns:
        The errors w / U_jj that the columns behind the block must make up for, shape (columns, out).
    """
    span, diagonal = pattern.span(len(rows)), factor.diagonal()[:, None]
    zeros = torch.zeros_like(rows, dtype=torch.bool)
    errors = torch.zeros_like(rows)
    for j in range(len(rows)):
        if j % span == 0:
            part = slice(j, j + span)
            zeros[part] = pattern.choose((rows[part] / diagonal[part]).square())
        errors[j] = (rows[j] / factor[j, j]).masked_fill(~zeros[j], 0)
        rows[j].masked_fill_(zeros[j], 0)
        rows[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return errors


def _block_size(columns: int, hessian: Tensor, pattern: Pattern, block: int) -> int:
    """Columns of a block, after checking that everything fits."""
    if hessian.shape != (columns + 1, columns + 1):
        shape = " x ".join(map(str, hessian.shape))
        raise BankError(f"a layer of {columns} columns and a bias needs a Hessian of {columns + 1}, got {shape}.")
    if block < 1:
        raise BankError(f"`block` must be at least 1, got {block}.")
    if isinstance(pattern, Share):
        return block
    if columns % pattern.of:
        raise BankError(
            f"{pattern} sparsity needs a multiple of {pattern.of} columns, the layer has {columns}. Leave it dense, or "
            f"take an M that divides {columns}."
        )
    return max(block // pattern.of, 1) * pattern.of


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, the upper Cholesky factor of the inverse, without forming the inverse.

    With rows and columns in reverse, Cholesky gives H = V V^T for an upper V; then U = V^-1.
    """
    reverse, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) or not bool(torch.isfinite(reverse).all()):
        raise CalibrationError("a Hessian is not positive definite: damp it, or calibrate with more prompts.")
    upper = reverse.flip(0, 1)
    one = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, one, upper=True)
    return factor
