"""FLUX.1 (Black Forest Labs, 2024) as diffusers builds it: double blocks with joint attention and a feed-forward for
each stream, then single blocks over both streams at once, whose heads and neurons share one output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...host import InputSize
from ..group import Cols, Group, Rows, UnitCost
from ..registry import register_family
from .inputs import Draw, full_size, patch_grid
from .mmdit import PROJECTIONS, Side, heads, side, token_streams, whole_blocks
from .parts import neurons

DEFAULT = (128, 128, 512)
"""Latent height and width (1024 pixels) and text tokens of the pipeline's default. The configuration has none."""

PACKED = 2
"""The pipeline packs 2 x 2 pixels of the latent into a token, before the model sees them."""

# What some attention processor reads. The head dimension is an attribute too, but stays as it is.
COUNTS, WIDTHS = ("heads",), ("inner_dim",)


@register_family
class Flux:
    """Heads and neurons of both kinds of block, and whole blocks. The adaLN modulation (27 % of the parameters, under
    1 % of the MACs) stays.
    """

    name = "flux"
    denoisers = ("FluxTransformer2DModel",)

    def groups(self, denoiser: nn.Module) -> list[Group]:
        """Per double block `blocks.{i}.attn`, `.ff`, `.ff_context`, per single block `single_blocks.{i}.attn`, `.ff`;
        then `blocks`, those of both kinds.
        """
        double: Any = denoiser.transformer_blocks
        single: Any = denoiser.single_transformer_blocks
        groups = [group for i, block in enumerate(double) for group in _double(i, block)]
        groups += [group for i, block in enumerate(single) for group in _single(i, block)]
        paths = [f"transformer_blocks.{i}" for i in range(len(double))]
        return [*groups, whole_blocks([*paths, *(f"single_transformer_blocks.{i}" for i in range(len(single)))])]

    def tokens(self, denoiser: nn.Module, size: InputSize | None = None) -> Mapping[str, int]:
        """A token for 2 x 2 pixels of the latent, and the text; by default 128 x 128 and 512."""
        rows, columns, text = _grid(size)
        return token_streams(rows * columns, text)

    def example_inputs(
        self, denoiser: nn.Module, batch: int = 1, seed: int = 0, size: InputSize | None = None
    ) -> dict[str, Any]:
        """Random packed latents at random timesteps (0 to 1) with random text."""
        config: Any = denoiser.config
        draw = Draw(denoiser, batch, seed)
        rows, columns, text = _grid(size)
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(draw.like)
        inputs = {
            "hidden_states": draw.normal(rows * columns, config.in_channels),
            "timestep": draw.uniform(),
            "encoder_hidden_states": draw.normal(text, config.joint_attention_dim),
            "pooled_projections": draw.normal(config.pooled_projection_dim),
            "img_ids": places,
            "txt_ids": places.new_zeros(text, 3),
        }
        return {**inputs, "guidance": 3.5 * torch.ones_like(inputs["timestep"])} if config.guidance_embeds else inputs


def _grid(size: InputSize | None) -> tuple[int, int, int]:
    """Rows and columns of image tokens, and text tokens."""
    height, width, text = full_size(size, DEFAULT)
    return (*patch_grid(height, width, PACKED), text)


def _double(index: int, block: Any) -> list[Group]:
    """The groups of one double block."""
    name, path, fused = f"blocks.{index}", f"transformer_blocks.{index}", block.attn.fused_projections
    both = [side("image", "attn", fused, "to_out.0"), side("text", "attn", fused, "to_add_out")]
    return [
        heads(f"{name}.attn", path, block, "attn", both, COUNTS, WIDTHS),
        neurons(f"{name}.ff", f"{path}.ff", block.ff, "image"),
        neurons(f"{name}.ff_context", f"{path}.ff_context", block.ff_context, "text"),
    ]


def _single(index: int, block: Any) -> list[Group]:
    """The groups of one single block: `proj_out` has the heads' columns first, then the neurons'."""
    name, path = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
    names = PROJECTIONS["image"][block.attn.fused_projections]
    joint = Side("joint", [f"attn.{projection}" for projection in names], "proj_out")
    attention = heads(f"{name}.attn", path, block, "attn", [joint], COUNTS, WIDTHS)
    up, down = block.proj_mlp, block.proj_out
    mlp = Group(
        name=f"{name}.ff",
        kind="neuron",
        size=up.out_features,
        width=1,
        producers=(Rows(f"{path}.proj_mlp"),),
        consumers=(Cols(f"{path}.proj_out", offset=attention.channels),),
        cost=UnitCost.of((up.in_features + down.out_features, "joint")),
    )
    return [attention, mlp]
