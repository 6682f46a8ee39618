"""A second lesson for the denoisers while they train: say from inner features what is shown where.

The denoising loss alone teaches a small model slowly how many objects there are, and of which kind. Aligning inner
features with a good representation of the clean picture speeds that up many times (REPA, Yu et al., 2025); here the
layout itself is known, so the representation is exact. The reader is thrown away after training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapes.scenes import CELL_FACTS, LATENT_SIDE


class LayoutReader(nn.Module):
    """Reads every cell's shape, colour and size from the features that `tap` gives in a forward pass.

    Args:
        tap: module of the denoiser whose output holds the features.
        as_map: turns that output into features (B, C, h, w), h x w at most 16x16.
        channels: C.
        side: h.
    """

    def __init__(self, tap: nn.Module, as_map: Callable[[Any], Tensor], channels: int, side: int) -> None:
        super().__init__()
        fold = LATENT_SIDE // side
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.SiLU(),
            nn.Conv2d(channels, sum(CELL_FACTS) * fold**2, 1),
            nn.PixelShuffle(fold),
        )
        self.as_map = as_map
        self.features = torch.empty(0)
        tap.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.features = self.as_map(output)

    def loss(self, cells: Tensor) -> Tensor:
        """Cross-entropy of what was read in the last forward pass, summed over the facts; `cells` (B, 3, 16, 16)."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.head(self.features).float().split(list(CELL_FACTS), dim=1)
        parts = [F.cross_entropy(part, cells[:, i].long()) for i, part in enumerate(logits)]
        return torch.stack(parts).sum()
