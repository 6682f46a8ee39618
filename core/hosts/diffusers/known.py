"""Values that live on an accelerator, read without waiting for it each time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_BYTES = 64 * 1024
"""Of a buffer that is copied whole: a scheduler's timesteps have a few hundred bytes."""


@dataclass
class KnownValues:
    """Reads single numbers out of one buffer that hardly ever changes, as a scheduler's timesteps.

    A pipeline hands its denoiser one element of `scheduler.timesteps`, seldom a copy: the same buffer at every step,
    seen from another place. It is copied to the host once, and again when it is another one or has been written to.
    Reading waits for the accelerator only then. Any other value is read as it is, which waits.
    """

    _buffer: Tensor | None = field(default=None, repr=False)  # held, so that no other one can take its address
    _version: int = 0
    _values: list[float] = field(default_factory=list, repr=False)

    def __call__(self, value: Tensor) -> float | None:
        """The number that all elements of `value` are, shape any; None if that cannot be told by looking at one."""
        if not _is_one_element(value):
            return None
        buffer = _whole(value)
        if buffer is None:
            return float(value.flatten()[0].item())
        if not self._holds(buffer, value._version):
            self._buffer, self._version, self._values = buffer, value._version, buffer.tolist()
        return self._values[value.storage_offset()]

    def _holds(self, buffer: Tensor, version: int) -> bool:
        mine = self._buffer
        same = mine is not None and mine.data_ptr() == buffer.data_ptr() and mine.dtype == buffer.dtype
        return same and self._version == version


def _is_one_element(value: Tensor) -> bool:
    """Of memory: expanded over a batch it is still one."""
    sizes = zip(value.shape, value.stride(), strict=True)
    return value.numel() > 0 and all(size == 1 or stride == 0 for size, stride in sizes)


def _whole(value: Tensor) -> Tensor | None:
    """All of the memory that `value` is a part of; None if it is much, or cannot be seen whether it was written to."""
    if value.is_inference() or type(value) is not Tensor or value.layout is not torch.strided:
        return None
    storage = value.untyped_storage()
    if storage.nbytes() > MOST_BYTES:
        return None
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
