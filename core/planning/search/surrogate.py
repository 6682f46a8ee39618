"""What schedules that ran tell of those that did not: a Gaussian process over the sparsities of their stages.

Kriging with an external drift: the mean is a regression on what is known of every schedule beforehand (a constant, and
what an error table predicts), the rest is smooth in the sparsities, in each stage as smooth as the data say. Rasmussen
and Williams, "Gaussian Processes for Machine Learning", 2006, sections 2.2 (prediction), 2.7 (the mean's regression)
and 5.4.1 (hyperparameters by the marginal likelihood; a broad prior keeps them sane while candidates are few).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH, LENGTH_SPREAD = 0.8, 1.5
"""Change of a stage's sparsity over which errors change: what is expected, and the spread of its logarithm."""

LINEAR, NOISE, SPREAD = math.exp(-2), math.exp(-4), 2.0
"""Shares of the variance that are linear in the sparsities, and of no smooth kind; the spread of their logarithms."""

JITTER = 1e-6
"""Least noise, so that the covariance can be factored."""

FIT_STEPS, FIT_RATE = 60, 0.1


@dataclass
class Shape:
    """Logarithms of the hyperparameters.

    Args:
        lengths: of each stage, shape (stages,).
        linear: share of the linear part.
        noise: share of the rest.
    """

    lengths: Tensor
    linear: Tensor
    noise: Tensor

    @classmethod
    def expected(cls, stages: int) -> Shape:
        """Before any data."""
        lengths = torch.full((stages,), math.log(LENGTH), dtype=torch.float64)
        return cls(lengths, *(torch.tensor(math.log(share), dtype=torch.float64) for share in (LINEAR, NOISE)))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of them."""
        return self.lengths, self.linear, self.noise

    def covariance(self, here: Tensor, there: Tensor) -> Tensor:
        """Of the values at two sets of points, shapes (n, stages) and (m, stages), in units of the variance: (n, m)."""
        scale = self.lengths.exp()
        here, there = here / scale, there / scale
        product = here @ there.T
        apart = here.square().sum(1)[:, None] + there.square().sum(1)[None] - 2 * product
        return torch.exp(-apart.clamp(min=0) / 2) + self.linear.exp() * product

    def surprise(self) -> Tensor:
        """Minus the logarithm of the prior, up to a constant."""
        expected, spreads = Shape.expected(len(self.lengths)), (LENGTH_SPREAD, SPREAD, SPREAD)
        off = [(mine - its) / spread for mine, its, spread in zip(self.parts, expected.parts, spreads, strict=True)]
        return torch.cat([each.reshape(-1) for each in off]).square().sum() / 2


@dataclass
class _Solved:
    """The regression for given hyperparameters: `factor` of the covariance, of the mean, of the rest, its variance."""

    factor: Tensor
    mean: Tensor
    weights: Tensor
    variance: Tensor

    @property
    def unlikely(self) -> Tensor:
        """Minus the logarithm of the marginal likelihood at the best variance, up to a constant."""
        count = len(self.weights)
        return count / 2 * self.variance.clamp(min=1e-300).log() + self.factor.diagonal().log().sum()


class Surrogate:
    """A Gaussian process fitted to values at points.

    Args:
        points: sparsity of each stage, shape (n, stages), float64.
        values: at the points, shape (n,).
        drift: what the mean is regressed on, shape (n, terms).
        noise: variance of each value in units of the process's, beside what is fitted; shape (n,).

    Example:
        >>> at = torch.rand(20, 3, dtype=torch.float64)
        >>> model = Surrogate(at, at.sum(1), torch.ones(20, 1).double(), torch.zeros(20).double())
        >>> mean, covariance = model.predict(at[:2], torch.ones(2, 1).double())
    """

    def __init__(self, points: Tensor, values: Tensor, drift: Tensor, noise: Tensor) -> None:
        self.points, self.values, self.drift, self.noise = points, values, drift, noise
        self.shape = self._fit()
        self._solved = self._solve(self.shape)

    def predict(self, points: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, shape (m,), and covariance, shape (m, m), of the values at other points, as if the mean were known.

        Args:
            points: shape (m, stages).
            drift: shape (m, terms).
        """
        solved, across = self._solved, self.shape.covariance(points, self.points)
        mean = drift @ solved.mean + across @ solved.weights
        explained = torch.linalg.solve_triangular(solved.factor, across.T, upper=False)
        covariance = self.shape.covariance(points, points) - explained.T @ explained
        return mean, covariance * solved.variance

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def _fit(self) -> Shape:
        """By the marginal likelihood and the prior."""
        shape = Shape.expected(self.points.shape[1])
        for part in shape.parts:
            part.requires_grad_()
        optimiser = torch.optim.Adam(shape.parts, lr=FIT_RATE)
        for _ in range(FIT_STEPS):
            optimiser.zero_grad()
            torch.autograd.backward(self._solve(shape).unlikely + shape.surprise())
            optimiser.step()
        return Shape(*(part.detach() for part in shape.parts))

    def _solve(self, shape: Shape) -> _Solved:
        covariance = shape.covariance(self.points, self.points) + torch.diag(shape.noise.exp() + self.noise + JITTER)
        factor = torch.linalg.cholesky(covariance)
        whitened = torch.linalg.solve_triangular(factor, torch.cat([self.drift, self.values[:, None]], 1), upper=False)
        drift, values = whitened[:, :-1], whitened[:, -1]
        ridge = JITTER * torch.eye(drift.shape[1], dtype=drift.dtype)
        mean = torch.linalg.solve(drift.T @ drift + ridge, drift.T @ values)
        rest = values - drift @ mean
        weights = torch.linalg.solve_triangular(factor.T, rest[:, None], upper=True)[:, 0]
        return _Solved(factor, mean, weights, rest.square().mean())
