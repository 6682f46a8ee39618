"""DiT (Peebles & Xie, 2023) as diffusers builds it: self-attention and a GELU feed-forward, adaLN-zero in each
block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import GroupError
from ...host import InputSize
from ..group import Group
from ..registry import register_family
from .inputs import Draw, patch_grid
from .parts import attention_heads, neurons


@register_family
class DiT:
    """Heads of `attn1`, neurons of `ff`, and whole blocks. The adaLN modulation (36 % of the parameters of DiT-XL/2,
    under 1 % of its MACs) stays.
    """

    name = "dit"
    denoisers = ("DiTTransformer2DModel",)

    def groups(self, denoiser: nn.Module) -> list[Group]:
        """Per block `blocks.{i}.attn` and `blocks.{i}.ff`; then `blocks`, the blocks themselves."""
        blocks = list(denoiser.transformer_blocks)  # type: ignore[arg-type]
        groups = []
        for i, block in enumerate(blocks):
            path = f"transformer_blocks.{i}"
            groups.append(attention_heads(f"blocks.{i}.attn", f"{path}.attn1", block.attn1, "image", "image"))
            groups.append(neurons(f"blocks.{i}.ff", f"{path}.ff", block.ff, "image"))
        paths = tuple(f"transformer_blocks.{i}" for i in range(len(blocks)))
        return [*groups, Group(name="blocks", kind="block", size=len(blocks), width=0, blocks=paths)]

    def tokens(self, denoiser: nn.Module, size: InputSize | None = None) -> Mapping[str, int]:
        """One stream, `image`: a token a patch."""
        config: Any = denoiser.config
        own = _own_size(denoiser, size)
        rows, columns = patch_grid(own, own, config.patch_size)
        return {"image": rows * columns}

    def example_inputs(
        self, denoiser: nn.Module, batch: int = 1, seed: int = 0, size: InputSize | None = None
    ) -> dict[str, Any]:
        """Random latents at random timesteps with random class labels."""
        config: Any = denoiser.config
        draw, own = Draw(denoiser, batch, seed), _own_size(denoiser, size)
        return {
            "hidden_states": draw.normal(config.in_channels, own, own),
            "timestep": draw.integers(1000),
            "class_labels": draw.integers(config.num_embeds_ada_norm),
        }


def _own_size(denoiser: nn.Module, size: InputSize | None) -> int:
    """The side of the only size that the model is trained for; GroupError for another."""
    config: Any = denoiser.config
    own: int = config.sample_size
    if size is not None and (size.height, size.width) != (own, own):
        raise GroupError(
            f"`size` must be {own} x {own}, the one that this DiT is made for; got {size.height} x {size.width}."
        )
    return own
