"""Streaming second moments of the consumers' inputs; a convolution's inputs are its patches."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups.layer import Layer, layer_at, taps_of
from .packages import device_for
from .tf32 import tf32_products

PATCH_NUMBERS = 2**24
"""Most numbers that are unfolded at once (64 MiB in float32), unless one line of places needs more."""

SLICES = 8
"""Slices of columns in which a CPU multiplies a symmetric product: nine sixteenths of the work of all of it."""

NARROW = 256
"""Columns up to which one product is as fast."""


class HessianRecorder:
    """Sums H = sum of alpha x x^T per consumer and stage while the denoiser runs.

    A constant 1 is appended to x, so that the last row and column hold the inputs' sums and the compensation can
    correct the bias too. Sums are float32, of products in TF32 on a GPU: inputs in half precision lose nothing by it,
    and float32 ones nothing that images tell from chance (`docs/engine.md`). The solver works in float64.

    Args:
        denoiser: the denoiser.
        widths: consumer path -> columns of its matrix (input channels x taps).
        stages: number of stages that are kept apart.
        tokens: path -> share of each call's inputs that is summed; all of a path that is not in it. They are drawn at
            random, anew for each call and layer but alike for all samples of a call, so that the sums depend neither
            on which samples run together nor on which layers are recorded together.
    """

    def __init__(
        self, denoiser: nn.Module, widths: Mapping[str, int], stages: int, tokens: Mapping[str, float] | None = None
    ) -> None:
        self.denoiser = denoiser
        self.widths = widths
        self.tokens = tokens or {}
        self.seed = 0
        self._seen: Counter[str] = Counter()  # calls of this trajectory, for the draws
        self.hessians = {path: torch.zeros(stages, d + 1, d + 1) for path, d in widths.items()}
        self.rows = {path: torch.zeros(stages, dtype=torch.int64) for path in widths}
        self.stage = 0
        self.alpha = 1.0

    def add_batch(self, path: str, inputs: Tensor) -> None:
        """Add one call's inputs of the consumer at `path` to the current stage: shape (..., columns), or (batch,
        channels, height, width) of a convolution. Only upper triangles are sums until `recording` ends.
        """
        if self.alpha == 0:
            return  # inputs that do not count must not count for the rank either
        layer, inputs = layer_at(self.denoiser, path), inputs.detach()
        share, draws = self.tokens.get(path, 1.0), self._draws(path)
        parts = drawn_rows(layer, inputs, share, draws) if share < 1 else sample_rows(layer, inputs)
        for rows in parts:
            self._add_rows(path, rows.flatten(0, 1).float())

    def begin(self, seed: int) -> None:
        """Trajectories follow; their draws of tokens are those of this seed."""
        self.seed = seed
        self._seen.clear()

    def _draws(self, path: str) -> torch.Generator:
        """For one call: whichever its parts are, they draw the same numbers one after the other."""
        self._seen[path] += 1
        name = f"{self.seed} {path} {self._seen[path]}"
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def _add_rows(self, path: str, rows: Tensor) -> None:
        hessian = self.hessians[path][self.stage]
        sums = rows.sum(0).to(hessian.device)
        with tf32_products():
            _add_gram(hessian[:-1, :-1], rows, self.alpha)
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
            for path in mine:
                for table in self.hessians[path]:
                    table.triu_().add_(table.triu(1).mT)

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


def _add_gram(total: Tensor, rows: Tensor, alpha: float) -> None:
    """Total += alpha rows^T rows, in place and at least in the upper triangle."""
    columns = rows.shape[1]
    slices = SLICES if rows.device.type == "cpu" and columns > NARROW else 1
    step = -(-columns // slices)
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        part = (rows[:, begin:end].T @ rows[:, begin:]).to(total.device)
        total[begin:end, begin:].add_(part, alpha=alpha)


def design_rows(layer: Layer, inputs: Tensor) -> Iterator[Tensor]:
    """The rows of `sample_rows`, those of all samples together: parts of shape (rows, columns)."""
    return (part.flatten(0, 1) for part in sample_rows(layer, inputs))


def sample_rows(layer: Layer, inputs: Tensor, numbers: int = PATCH_NUMBERS) -> Iterator[Tensor]:
    """The rows x for which the layer computes W x + b, W its weight as a matrix.

    For a Linear, all at once. For a convolution, one row for each output place, padding included, in parts of whole
    output lines so that memory stays bounded.

    Args:
        layer: a Linear or Conv2d.
        inputs: of one call.
        numbers: most numbers in one part, unless a single output line has more.

    Returns:
        Parts of shape (samples, rows, columns), columns as in `matrix_of`.
    """
    if isinstance(layer, nn.Linear):
        yield inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return
    (tall, _), (down, _), (gap, _) = layer.kernel_size, layer.stride, layer.dilation
    padded, lines, places = _padded(layer, inputs)
    step = max(1, numbers // (len(inputs) * places * inputs.shape[1] * taps_of(layer)))
    for begin in range(0, lines, step):
        end = min(begin + step, lines)
        part = padded[:, :, begin * down : (end - 1) * down + gap * (tall - 1) + 1]
        patches = F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride)  # (samples, columns, places)
        yield patches.mT


def drawn_rows(
    layer: Layer, inputs: Tensor, share: float, draws: torch.Generator, numbers: int = PATCH_NUMBERS
) -> Iterator[Tensor]:
    """About this share of the rows of `sample_rows`, the same places of every sample.

    Of a convolution only these places are unfolded, which is most of the work where few are drawn.

    Args:
        layer: a Linear or Conv2d.
        inputs: of one call.
        share: probability of each place.
        draws: on the CPU; it gives one number a place.
        numbers: most numbers in one part, unless a single place has more.

    Returns:
        Parts of shape (samples, rows, columns).
    """
    if isinstance(layer, nn.Linear):
        (rows,) = sample_rows(layer, inputs)
        yield rows[:, _drawn(rows.shape[1], share, draws).to(rows.device)]
        return
    (tall, wide), (down, across), (gap, gap_across) = layer.kernel_size, layer.stride, layer.dilation
    padded, lines, places = _padded(layer, inputs)
    chosen = _drawn(lines * places, share, draws)
    taps = torch.arange(tall)[:, None] * gap * padded.shape[3] + torch.arange(wide) * gap_across
    corners = chosen // places * down * padded.shape[3] + chosen % places * across
    pixels = padded.permute(0, 2, 3, 1).flatten(1, 2)  # channels last: what is gathered lies together
    step = max(1, numbers // (len(inputs) * inputs.shape[1] * taps.numel()))
    for part in torch.split(corners, step):
        places_of = (part[:, None] + taps.flatten()).flatten().to(pixels.device)
        patches = pixels.index_select(1, places_of).view(len(pixels), len(part), taps.numel(), inputs.shape[1])
        yield patches.transpose(2, 3).flatten(2)


def _drawn(count: int, share: float, draws: torch.Generator) -> Tensor:
    """Which of so many places."""
    return (torch.rand(count, generator=draws) < share).nonzero()[:, 0]


def _padded(layer: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, int, int]:
    """The inputs as Conv2d itself pads them, whatever its `padding` and `padding_mode`; output lines, places a line."""
    (tall, wide), (down, across), (gap, gap_across) = layer.kernel_size, layer.stride, layer.dilation
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    lines = (padded.shape[2] - gap * (tall - 1) - 1) // down + 1
    places = (padded.shape[3] - gap_across * (wide - 1) - 1) // across + 1
    return padded, lines, places
