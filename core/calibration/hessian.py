"""Streaming second moments of the consumers' inputs; a convolution's inputs are its patches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups.layer import Layer, layer_at, taps_of
from .packages import device_for

PATCH_NUMBERS = 2**24
"""Most numbers that are unfolded at once (64 MiB in float32), unless one line of places needs more."""


class HessianRecorder:
    """Sums H = sum of alpha x x^T per consumer and stage while the denoiser runs.

    A constant 1 is appended to x, so that the last row and column hold the inputs' sums and the compensation can
    correct the bias too. Sums are float32; the solver works in float64.

    Args:
        denoiser: the denoiser.
        widths: consumer path -> columns of its matrix (input channels x taps).
        stages: number of stages that are kept apart.
        tokens: share of each call's inputs that is summed, drawn at random.
    """

    def __init__(self, denoiser: nn.Module, widths: Mapping[str, int], stages: int, tokens: float = 1.0) -> None:
        self.denoiser = denoiser
        self.widths = widths
        self.tokens = tokens
        self.draws = torch.Generator()
        self.hessians = {path: torch.zeros(stages, d + 1, d + 1) for path, d in widths.items()}
        self.rows = {path: torch.zeros(stages, dtype=torch.int64) for path in widths}
        self.stage = 0
        self.alpha = 1.0

    def add_batch(self, path: str, inputs: Tensor) -> None:
        """Add one call's inputs of the consumer at `path` to the current stage: shape (..., columns), or (batch,
        channels, height, width) of a convolution.
        """
        if self.alpha == 0:
            return  # inputs that do not count must not count for the rank either
        for rows in design_rows(layer_at(self.denoiser, path), inputs.detach()):
            self._add_rows(path, self._drawn(rows).float())

    def _drawn(self, rows: Tensor) -> Tensor:
        """Some of the rows, or all."""
        if self.tokens == 1:
            return rows
        count = max(round(len(rows) * self.tokens), 1)
        return rows[torch.randperm(len(rows), generator=self.draws)[:count].to(rows.device)]

    def _add_rows(self, path: str, rows: Tensor) -> None:
        hessian = self.hessians[path][self.stage]
        gram, sums = (rows.T @ rows).to(hessian.device), rows.sum(0).to(hessian.device)
        hessian[:-1, :-1].add_(gram, alpha=self.alpha)
        hessian[-1, :-1].add_(sums, alpha=self.alpha)
        hessian[:-1, -1].add_(sums, alpha=self.alpha)
        hessian[-1, -1] += self.alpha * len(rows)
        self.rows[path][self.stage] += len(rows)

    @contextmanager
    def recording(self, paths: Collection[str] | None = None) -> Iterator[None]:
        """Record every call of these layers within the block; of all by default."""
        mine = [path for path in self.hessians if paths is None or path in paths]
        with ExitStack() as stack:
            stack.enter_context(self._near(mine))
            for path in mine:
                hook = layer_at(self.denoiser, path).register_forward_pre_hook(
                    lambda _, args, path=path: self.add_batch(path, args[0])
                )
                stack.callback(hook.remove)
            yield

    @contextmanager
    def _near(self, paths: Sequence[str]) -> Iterator[None]:
        """Hold these sums where they are added to, if there is room."""
        device = next(self.denoiser.parameters()).device
        near = device_for(paths, self.widths, len(next(iter(self.rows.values()), ())), device)
        try:
            for path in paths:
                self.hessians[path] = self.hessians[path].to(near)
            yield
        finally:
            for path in paths:
                self.hessians[path] = self.hessians[path].cpu()


def design_rows(layer: Layer, inputs: Tensor, numbers: int = PATCH_NUMBERS) -> Iterator[Tensor]:
    """The rows x for which the layer computes W x + b, W its weight as a matrix.

    For a Linear, all at once. For a convolution, one row for each output place, padding included, in parts of whole
    output lines so that memory stays bounded.

    Args:
        layer: a Linear or Conv2d.
        inputs: of one call.
        numbers: most numbers in one part, unless a single output line has more.

    Returns:
        Parts of shape (rows, columns), columns as in `matrix_of`.
    """
    if isinstance(layer, nn.Linear):
        yield inputs.reshape(-1, inputs.shape[-1])
        return
    (tall, wide), (down, across), (gap, gap_across) = layer.kernel_size, layer.stride, layer.dilation
    # As Conv2d itself pads, whatever its `padding` and `padding_mode`.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    samples, channels, height, width = padded.shape
    lines = (height - gap * (tall - 1) - 1) // down + 1
    places = (width - gap_across * (wide - 1) - 1) // across + 1
    step = max(1, numbers // (samples * places * channels * taps_of(layer)))
    for begin in range(0, lines, step):
        end = min(begin + step, lines)
        part = padded[:, :, begin * down : (end - 1) * down + gap * (tall - 1) + 1]
        patches = F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride)  # (samples, columns, places)
        yield patches.mT.reshape(-1, patches.shape[1])
