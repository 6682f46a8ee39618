"""Full-size architectures with random weights: true speed and memory without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ...pruning import Bank, prune
from .bare import DenoiserHost


def dit_xl(device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """DiT-XL/2 at 256 x 256: 28 blocks, 16 heads of 72, 750 M parameters as diffusers builds it."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: nn.Module = DiTTransformer2DModel(sample_size=32, out_channels=8)
    model.to(dtype).eval()
    return model


FULL_SIZE: dict[str, Callable[..., nn.Module]] = {"dit-xl": dit_xl}


def random_bank(denoiser: nn.Module, levels: Sequence[float], multiple: int = 64) -> Bank:
    """A bank with a random order: for speed and memory, which do not depend on which units go."""
    return prune(DenoiserHost(denoiser), method="random", levels=levels, multiple=multiple)
