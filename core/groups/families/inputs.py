"""What the families' `tokens` and `example_inputs` share: random tensors, and the latent's grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import GroupError
from ...host import InputSize


class Draw:
    """Random tensors with one row a sample, on the denoiser's device and in its dtype.

    Args:
        denoiser: whose device and dtype it takes.
        batch: samples.
        seed: the same seed gives the same values on every device.
    """

    def __init__(self, denoiser: nn.Module, batch: int, seed: int) -> None:
        self.like = next(denoiser.parameters())
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Normal values, shape (batch, *shape)."""
        values = torch.randn((self.batch, *shape), generator=self.generator)
        return values.to(self.like.device, self.like.dtype)

    def uniform(self) -> Tensor:
        """Values between 0 and 1, shape (batch,)."""
        return torch.rand(self.batch, generator=self.generator).to(self.like.device, self.like.dtype)

    def integers(self, high: int) -> Tensor:
        """Integers below `high`, shape (batch,)."""
        return torch.randint(0, high, (self.batch,), generator=self.generator).to(self.like.device)


def full_size(size: InputSize | None, default: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latent height and width and text tokens: what `size` leaves open is taken from `default`.

    Example:
        >>> full_size(InputSize(64, 48), default=(128, 128, 512))
        (64, 48, 512)
    """
    if size is None:
        return default
    return size.height, size.width, default[2] if size.text is None else size.text


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in a latent. GroupError if a side is no multiple of the patch.

    Args:
        height: of the latent.
        width: of the latent.
        patch: side of a patch.

    Example:
        >>> patch_grid(128, 96, 2)
        (64, 48)
    """
    if min(height, width) < 1 or height % patch or width % patch:
        raise GroupError(f"`size` must be multiples of {patch} (latent height and width), got {height} x {width}.")
    return height // patch, width // patch
