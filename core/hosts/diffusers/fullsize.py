"""Published architectures with random weights: true speed, memory and cost without a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from ...host import InputSize
from ...pruning import Bank, prune
from .bare import DenoiserHost


@dataclass(frozen=True)
class Architecture:
    """A denoiser by its published configuration.

    Args:
        title: its name in tables.
        model: class of the denoiser.
        config: what differs from the class's defaults.
        pixels: side of the images that its pipeline makes by default, and `measure_cost` counts for.
    """

    title: str
    model: type[nn.Module]
    pixels: int
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The denoiser with random weights.

        Args:
            device: where to make them; on `meta` there are none, only shapes, and it takes no memory.
            dtype: they are made in this precision, not converted to it: FLUX in float32 would need 48 GB first.
            seed: of the weights.

        Example:
            >>> sum(p.numel() for p in FULL_SIZE["flux-dev"].build("meta").parameters())
            11901408320
        """
        torch.manual_seed(seed)
        with torch.device(device), _default_dtype(dtype):
            model = self.model(**self.config)
        return nn.Module.to(model, dtype).eval()  # buffers; diffusers' own `to` warns, as for a loaded model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
_SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

FULL_SIZE: dict[str, Architecture] = {
    "dit-xl": Architecture("DiT-XL/2", DiTTransformer2DModel, 256, {"sample_size": 32, "out_channels": 8}),
    "sd15": Architecture("SD 1.5", UNet2DConditionModel, 512, {"sample_size": 64, "cross_attention_dim": 768}),
    "sdxl": Architecture("SDXL", UNet2DConditionModel, 1024, _SDXL),
    "sd3-medium": Architecture("SD3-medium", SD3Transformer2DModel, 1024, _SD3),
    "sd35-medium": Architecture(
        "SD3.5-medium",
        SD3Transformer2DModel,
        1024,
        {**_SD3, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384},
    ),
    "sd35-large": Architecture("SD3.5-large", SD3Transformer2DModel, 1024, {**_SD35_LARGE, "qk_norm": "rms_norm"}),
    "flux-dev": Architecture("FLUX.1-dev", FluxTransformer2DModel, 1024, {"guidance_embeds": True}),
}


def random_bank(
    denoiser: nn.Module, levels: Sequence[float], multiple: int = 64, size: InputSize | None = None
) -> Bank:
    """A bank with a random order: for speed and memory, which do not depend on which units go."""
    return prune(DenoiserHost(denoiser, size), method="random", levels=levels, multiple=multiple)
