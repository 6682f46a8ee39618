"""DiT (Peebles & Xie, 2023) as diffusers builds it: self-attention and a GELU feed-forward, adaLN-zero in each
block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import GroupError
from ...host import InputSize
from ..group import Attribute, Cols, Group, Rows, UnitCost
from ..registry import register_family
from .inputs import Draw, patch_grid


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
        groups = [group for i, block in enumerate(blocks) for group in (_heads(i, block), _neurons(i, block))]
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


def _heads(index: int, block: Any) -> Group:
    """The attention heads of one block: rows of q, k, v; columns of the output projection."""
    attention = block.attn1
    path = f"transformer_blocks.{index}.attn1"
    heads, inputs, outputs = attention.heads, attention.to_q.in_features, attention.to_out[0].out_features
    width = attention.to_q.out_features // heads
    return Group(
        name=f"blocks.{index}.attn",
        kind="head",
        size=heads,
        width=width,
        producers=tuple(Rows(f"{path}.{name}") for name in ("to_q", "to_k", "to_v")),
        consumers=(Cols(f"{path}.to_out.0"),),
        # Every one of these is read by some attention processor; setting `heads` alone is silently wrong in a few.
        attributes=(
            Attribute(path, "heads"),
            Attribute(path, "sliceable_head_dim"),
            Attribute(path, "inner_dim", width),
            Attribute(path, "inner_kv_dim", width),
        ),
        cost=UnitCost.of((width * (3 * inputs + outputs), "image"), (2 * width, "image", "image")),
    )


def _neurons(index: int, block: Any) -> Group:
    """The neurons of one feed-forward: rows of the first Linear, columns of the second."""
    up, down = block.ff.net[0].proj, block.ff.net[2]
    path = f"transformer_blocks.{index}.ff"
    return Group(
        name=f"blocks.{index}.ff",
        kind="neuron",
        size=down.in_features,
        width=1,
        producers=(Rows(f"{path}.net.0.proj", up.out_features // down.in_features),),
        consumers=(Cols(f"{path}.net.2"),),
        cost=UnitCost.of((up.in_features * (up.out_features // down.in_features) + down.out_features, "image")),
    )
