"""SD3 and SD3.5 (Esser et al., 2024) as diffusers builds them: joint attention over image and text, a feed-forward for
each; in SD3.5-medium the first blocks have a second attention over the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import GroupError
from ...host import InputSize
from ..group import Group
from ..registry import register_family
from .inputs import Draw, full_size, patch_grid
from .mmdit import heads, side, token_streams, whole_blocks
from .parts import neurons

TEXT_TOKENS = 77 + 256
"""Text tokens of the pipeline's default: CLIP's 77 and T5's 256. The configuration does not hold them."""

# Every one of these is read by some attention processor; setting `heads` alone is silently wrong in a few.
COUNTS = ("heads", "sliceable_head_dim")
WIDTHS = ("inner_dim", "inner_kv_dim")


@register_family
class SD3:
    """Heads of `attn` (both streams) and `attn2` (image), neurons of `ff` and `ff_context`, and whole blocks. The
    adaLN modulation (a third of the parameters, under 1 % of the MACs) stays.
    """

    name = "sd3"
    denoisers = ("SD3Transformer2DModel",)

    def groups(self, denoiser: nn.Module) -> list[Group]:
        """Per block `blocks.{i}.attn`, `.attn2` if there, `.ff` and, but for the last, `.ff_context`; then `blocks`."""
        blocks = list(denoiser.transformer_blocks)  # type: ignore[arg-type]
        groups = [group for i, block in enumerate(blocks) for group in _block(i, block)]
        return [*groups, whole_blocks([f"transformer_blocks.{i}" for i in range(len(blocks))])]

    def tokens(self, denoiser: nn.Module, size: InputSize | None = None) -> Mapping[str, int]:
        """A token a patch, and the text; by default what the pipeline gives."""
        rows, columns, text = _grid(denoiser, size)
        return token_streams(rows * columns, text)

    def example_inputs(
        self, denoiser: nn.Module, batch: int = 1, seed: int = 0, size: InputSize | None = None
    ) -> dict[str, Any]:
        """Random latents at random timesteps with random text."""
        config: Any = denoiser.config
        draw = Draw(denoiser, batch, seed)
        rows, columns, text = _grid(denoiser, size)
        return {
            "hidden_states": draw.normal(config.in_channels, rows * config.patch_size, columns * config.patch_size),
            "timestep": draw.integers(1000),
            "encoder_hidden_states": draw.normal(text, config.joint_attention_dim),
            "pooled_projections": draw.normal(config.pooled_projection_dim),
        }


def _block(index: int, block: Any) -> list[Group]:
    """The groups of one block. The last one reads the text, but gives none."""
    name, path = f"blocks.{index}", f"transformer_blocks.{index}"
    fused = _fused(block.attn)
    text_output = None if block.context_pre_only else "to_add_out"
    both = [side("image", "attn", fused, "to_out.0"), side("text", "attn", fused, text_output)]
    groups = [heads(f"{name}.attn", path, block, "attn", both, COUNTS, WIDTHS)]
    if block.attn2 is not None:
        image = [side("image", "attn2", _fused(block.attn2), "to_out.0")]
        groups.append(heads(f"{name}.attn2", path, block, "attn2", image, COUNTS, WIDTHS))
    groups.append(neurons(f"{name}.ff", f"{path}.ff", block.ff, "image"))
    if block.ff_context is not None:
        groups.append(neurons(f"{name}.ff_context", f"{path}.ff_context", block.ff_context, "text"))
    return groups


def _fused(attention: Any) -> bool:
    """By the processor that is set: unfusing leaves the fused Linears and their flag behind."""
    return "Fused" in type(attention.processor).__name__


def _grid(denoiser: nn.Module, size: InputSize | None) -> tuple[int, int, int]:
    """Rows and columns of patches, which the position table bounds, and text tokens."""
    config: Any = denoiser.config
    height, width, text = full_size(size, (config.sample_size, config.sample_size, TEXT_TOKENS))
    rows, columns = patch_grid(height, width, config.patch_size)
    largest = config.pos_embed_max_size
    if max(rows, columns) > largest:
        raise GroupError(
            f"`size` must be at most {largest * config.patch_size} a side for this SD3Transformer2DModel "
            f"(pos_embed_max_size {largest} x patch_size {config.patch_size}), got {height} x {width}."
        )
    return rows, columns, text
