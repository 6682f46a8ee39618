"""Optimal-Brain-Surgeon compensation in closed form: the consumer that best keeps the dense output on fewer inputs.

Legend: W (out, d) the dense consumer, H (d, d) the second moment of its inputs, k kept columns first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError

logger = logging.getLogger(__name__)

DAMPING_RETRIES = (1, 10, 100, 1000)


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """W with the bias as a last column, float64: the weight of the constant-1 input that the Hessian also holds."""
    bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias
    return torch.cat([weight.detach().double(), bias.detach().double()[:, None]], dim=1)


def finite(hessian: Tensor) -> Tensor:
    """The Hessian in float64; CalibrationError if it is not finite."""
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            "a Hessian holds NaN or infinity; recalibrate, in float32 if the model was in half precision."
        )
    return hessian.double()


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` x the mean of the diagonal to the diagonal, in float64.

    The constant-1 input (last column) is left alone: it is never pruned, and damping it would shrink the bias
    correction. The damping is raised tenfold, up to three times, if the result is not positive definite.

    Raises:
        CalibrationError: the matrix is not finite, or stays indefinite: the calibration data are too few or broken.
    """
    hessian = finite(hessian)
    mean = hessian.diagonal()[:-1].mean()
    for factor in DAMPING_RETRIES:
        damped = hessian.clone()
        damped.diagonal()[:-1] += mean * damping * factor
        if int(torch.linalg.cholesky_ex(damped).info) == 0:
            if factor > 1:
                logger.warning("damping raised from %g to %g to factor a Hessian", damping, damping * factor)
            return damped
    raise CalibrationError(
        f"a Hessian of size {len(hessian)} has no Cholesky factor even with damping {damping * DAMPING_RETRIES[-1]:g}: "
        "calibrate with more prompts, or prune with a larger `damping`."
    )


def compensate(weight: Tensor, hessian: Tensor, columns: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Compensated consumers for every prefix of `columns`, from one Cholesky factor.

    With the columns in their order and H = L L^T, the minimiser of tr((W - W_k) H (W - W_k)^T) over weights that use
    only the first k columns is W_k = W H[:, :k] H[:k, :k]^-1 = (W L)[:, :k] L[:k, :k]^-1 (OBS, Hassibi & Stork 1993;
    the factored form is this project's).

    Args:
        weight: (out, d + 1), the last column the bias (see `with_bias`).
        hessian: (d + 1, d + 1), damped, the last row and column the constant-1 input.
        columns: a permutation of range(d), most important first.
        counts: how many of `columns` each level keeps.

    Returns:
        Per count: weight (out, count) with columns in the given order, and bias (out,), float64.
    """
    # The constant-1 input comes first, so every prefix holds it and every level gets its bias corrected.
    order = torch.cat([columns.new_tensor([len(hessian) - 1]), columns])
    factor = torch.linalg.cholesky(hessian[order][:, order])
    product = weight[:, order] @ factor
    solutions = []
    for count in counts:
        k = count + 1
        kept = torch.linalg.solve_triangular(factor[:k, :k], product[:, :k], upper=False, left=False)
        solutions.append((kept[:, 1:].contiguous(), kept[:, 0].contiguous()))
    return solutions


def reconstruction_loss(weight: Tensor, hessian: Tensor, columns: Tensor, kept: tuple[Tensor, Tensor]) -> float:
    """tr((W - W_k) H (W - W_k)^T) over tr(W H W^T): the share of the output's energy that is lost. Arguments as
    above.
    """
    difference = weight.clone()
    difference[:, columns[: kept[0].shape[1]]] -= kept[0]
    difference[:, -1] -= kept[1]
    lost = torch.einsum("oi,ij,oj->", difference, hessian, difference)
    energy = torch.einsum("oi,ij,oj->", weight, hessian, weight)
    return float(lost / energy)
