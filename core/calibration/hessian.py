"""Streaming second moments of the consumers' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..groups.group import linear_at


class HessianRecorder:
    """Sums H = sum of alpha x x^T per consumer and stage while the denoiser runs.

    A constant 1 is appended to x, so that the last row and column hold the inputs' sums and the compensation can
    correct the bias too. Sums are float32; the solver works in float64.

    Args:
        denoiser: the denoiser.
        widths: consumer path -> its input columns.
        stages: number of stages that are kept apart.
    """

    def __init__(self, denoiser: nn.Module, widths: Mapping[str, int], stages: int) -> None:
        self.denoiser = denoiser
        self.hessians = {path: torch.zeros(stages, d + 1, d + 1) for path, d in widths.items()}
        self.rows = {path: torch.zeros(stages, dtype=torch.int64) for path in widths}
        self.stage = 0
        self.alpha = 1.0

    def add_batch(self, path: str, inputs: Tensor) -> None:
        """Add the inputs of one call of the consumer at `path`, shape (..., columns), to the current stage."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        hessian = self.hessians[path][self.stage]
        gram, sums = (rows.T @ rows).to(hessian.device), rows.sum(0).to(hessian.device)
        hessian[:-1, :-1].add_(gram, alpha=self.alpha)
        hessian[-1, :-1].add_(sums, alpha=self.alpha)
        hessian[:-1, -1].add_(sums, alpha=self.alpha)
        hessian[-1, -1] += self.alpha * len(rows)
        self.rows[path][self.stage] += len(rows)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every call of the consumers within the block."""
        with ExitStack() as stack:
            for path in self.hessians:
                hook = linear_at(self.denoiser, path).register_forward_pre_hook(
                    lambda _, args, path=path: self.add_batch(path, args[0])
                )
                stack.callback(hook.remove)
            yield
