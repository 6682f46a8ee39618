"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL (Rombach et al., 2022; Podell et al., 2023) as diffusers
builds it.

Groups are named by diffusers' own module paths: `<transformer block>.attn1`, `.attn2` and `.ff`, and `<resnet>` itself
for its inner channels, with `down_blocks.0.attentions.1.transformer_blocks.0` and `up_blocks.1.resnets.2` for paths.
Another host maps its names to these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from torch import nn

from ...errors import GroupError
from ...host import InputSize
from ..group import Attribute, Cols, Group, Rows, UnitCost
from ..registry import register_family
from .inputs import Draw, full_size
from .parts import attention_heads, neurons

TEXT_TOKENS = 77
"""Length of a CLIP prompt. The configuration does not hold it."""

BLOCKS = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
)


@register_family
class UNet:
    """Heads of self- and cross-attention, neurons of the feed-forwards, inner channels of the resnets (a unit is a
    group of `norm2`, so that its statistics stay within a unit), and whole transformer blocks. What the residual stream
    is made of (projections, shortcuts, samplers, embeddings) stays.
    """

    name = "unet"
    denoisers = ("UNet2DConditionModel",)

    def groups(self, denoiser: nn.Module) -> list[Group]:
        """From input to output: a resnet's channels, then heads, cross heads and neurons of the transformer blocks
        after it; last `blocks`, the transformer blocks themselves.
        """
        groups, blocks = [], []
        for path, module, stream in _sites(denoiser):
            if type(module).__name__ == "ResnetBlock2D":
                groups.append(_channels(path, module, stream))
            else:
                groups += _transformer(path, module, stream)
                blocks.append(path)
        if blocks:
            groups.append(Group(name="blocks", kind="block", size=len(blocks), width=0, blocks=tuple(blocks)))
        return groups

    def tokens(self, denoiser: nn.Module, size: InputSize | None = None) -> Mapping[str, int]:
        """Streams `level0` (latent resolution), `level1` (after the first downsampler), ..., and `text`."""
        unet: Any = denoiser
        *sides, text = _full_size(denoiser, size)
        height, width = (_convolved(unet.conv_in, side) for side in sides)
        tokens = {"text": text}
        for index, block in enumerate(unet.down_blocks):
            tokens[f"level{index}"] = height * width
            for sampler in block.downsamplers or ():
                height, width = _downsampled(sampler, height), _downsampled(sampler, width)
        return tokens

    def example_inputs(
        self, denoiser: nn.Module, batch: int = 1, seed: int = 0, size: InputSize | None = None
    ) -> dict[str, Any]:
        """Random latents, timesteps and text, with whatever else the configuration asks for."""
        config: Any = denoiser.config
        draw = Draw(denoiser, batch, seed)
        height, width, text = _full_size(denoiser, size)
        inputs = {
            "sample": draw.normal(config.in_channels, height, width),
            "timestep": draw.integers(1000),
            "encoder_hidden_states": draw.normal(text, _text_width(config)),
        }
        if config.time_cond_proj_dim is not None:
            inputs["timestep_cond"] = draw.normal(config.time_cond_proj_dim)
        return inputs | _class_inputs(denoiser, draw) | _added_inputs(denoiser, draw)


def _sites(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and stream of every resnet and transformer block, in the order in which they run."""
    unet: Any = denoiser
    last = len(unet.down_blocks) - 1
    stages = [(f"down_blocks.{i}", block, i) for i, block in enumerate(unet.down_blocks)]
    stages += [("mid_block", unet.mid_block, last)] if unet.mid_block is not None else []
    stages += [(f"up_blocks.{i}", block, last - i) for i, block in enumerate(unet.up_blocks)]
    for path, block, level in stages:
        _expect(path, block, *BLOCKS)
        # Every kind of block alternates: a resnet, then the attention after it if it has one.
        pairs = zip_longest(block.resnets, getattr(block, "attentions", ()))
        for index, (resnet, attention) in enumerate(pairs):
            _expect(f"{path}.resnets.{index}", resnet, "ResnetBlock2D")
            yield f"{path}.resnets.{index}", resnet, f"level{level}"
            if attention is None:
                continue
            _expect(f"{path}.attentions.{index}", attention, "Transformer2DModel")
            for inner, transformer in enumerate(attention.transformer_blocks):
                name = f"{path}.attentions.{index}.transformer_blocks.{inner}"
                _expect(name, transformer, "BasicTransformerBlock")
                yield name, transformer, f"level{level}"


def _expect(path: str, module: nn.Module, *classes: str) -> None:
    """Blocks of other classes (Kandinsky, DeepFloyd IF, k-diffusion) are laid out otherwise."""
    if type(module).__name__ not in classes:
        raise GroupError(
            f"`{path}` is a {type(module).__name__}; the UNet family supports {', '.join(classes)} there. Register a "
            "family of your own for this model."
        )


def _transformer(path: str, block: Any, stream: str) -> list[Group]:
    """Self-attention, cross-attention and feed-forward of one transformer block."""
    if hasattr(block, "fuser"):
        raise GroupError(f"`{path}` has gated attention (GLIGEN), which is not supported: load the plain model.")
    first_keys = "text" if block.only_cross_attention else stream
    groups = [_heads(f"{path}.attn1", block.attn1, stream, first_keys)]
    if block.attn2 is not None:
        groups.append(_heads(f"{path}.attn2", block.attn2, stream, "text"))
    return [*groups, neurons(f"{path}.ff", f"{path}.ff", block.ff, stream)]


def _heads(path: str, attention: Any, queries: str, keys: str) -> Group:
    """The heads of one attention; refused if it holds rows of heads that the group would not slice."""
    if getattr(attention, "fused_projections", False):
        raise GroupError(f"`{path}` has fused projections: call unfuse_qkv_projections() first.")
    for name in ("added_kv_proj_dim", "norm_q", "norm_k"):
        if getattr(attention, name, None) is not None:
            raise GroupError(f"`{path}` has `{name}`, which the UNet family does not know. Register a family for it.")
    return attention_heads(path, path, attention, queries, keys)


def _channels(path: str, resnet: Any, stream: str) -> Group:
    """The inner channels of one resnet: rows of `conv1` and of the time embedding, columns of `conv2`."""
    first, norm, second, time = resnet.conv1, resnet.norm2, resnet.conv2, resnet.time_emb_proj
    width = norm.num_channels // norm.num_groups
    taps = first.kernel_size[0] * first.kernel_size[1]
    cost: list[tuple[int | str, ...]] = [(width * taps * (first.in_channels + second.out_channels), stream)]
    producers = [Rows(f"{path}.conv1")]
    if time is not None:
        packed = time.out_features // norm.num_channels  # 2 if it gives a scale and a shift
        producers.append(Rows(f"{path}.time_emb_proj", packed))
        cost.append((width * packed * time.in_features,))  # once a sample, not once a place
    return Group(
        name=path,
        kind="channel",
        size=norm.num_groups,
        width=width,
        producers=tuple(producers),
        consumers=(Cols(f"{path}.conv2"),),
        companions=(f"{path}.norm2",),
        attributes=(Attribute(f"{path}.norm2", "num_groups"), Attribute(f"{path}.norm2", "num_channels", width)),
        cost=UnitCost.of(*cost),
    )


def _full_size(denoiser: nn.Module, size: InputSize | None) -> tuple[int, int, int]:
    """Height, width and text tokens: by default those of the configuration, and CLIP's."""
    if size is not None:
        return full_size(size, (0, 0, TEXT_TOKENS))
    own: Any = denoiser.config.sample_size  # type: ignore[union-attr]
    if own is None:
        raise GroupError(
            "the UNet's configuration has no `sample_size`; set it with "
            "denoiser.register_to_config(sample_size=...) to the latent's height and width."
        )
    height, width = (own, own) if isinstance(own, int) else own
    return int(height), int(width), TEXT_TOKENS


def _convolved(conv: Any, side: int) -> int:
    """Output side of a convolution."""
    (kernel, *_), (stride, *_), (padding, *_) = conv.kernel_size, conv.stride, conv.padding
    return int((side + 2 * padding - kernel) // stride + 1)


def _downsampled(sampler: Any, side: int) -> int:
    """Output side of a Downsample2D, which pads one row at the end itself where its convolution pads none."""
    return _convolved(sampler.conv, side + (1 if sampler.padding == 0 else 0))


def _text_width(config: Any) -> int:
    """Width of the text that the model is given: that of its projection's input if it has one."""
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise GroupError(
            f"`encoder_hid_dim_type` is {config.encoder_hid_dim_type!r}; supported are None and 'text_proj' (unload "
            "an IP-Adapter first)."
        )
    if config.encoder_hid_dim is not None:
        return int(config.encoder_hid_dim)
    widths = config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(widths)
    if len(widths) != 1:
        raise GroupError(f"`cross_attention_dim` must be the same in every block, got {sorted(widths)}.")
    return int(widths.pop())


def _class_inputs(denoiser: nn.Module, draw: Draw) -> dict[str, Any]:
    """Class labels or class embeddings, whichever the model takes."""
    unet: Any = denoiser
    config = unet.config
    if config.class_embed_type is None and config.num_class_embeds is None:
        return {}
    if config.class_embed_type is None:
        return {"class_labels": draw.integers(config.num_class_embeds)}
    if config.class_embed_type == "timestep":
        return {"class_labels": draw.integers(1000)}
    if config.class_embed_type == "identity":
        return {"class_labels": draw.normal(unet.time_embedding.linear_2.out_features)}
    return {"class_labels": draw.normal(config.projection_class_embeddings_input_dim)}


def _added_inputs(denoiser: nn.Module, draw: Draw) -> dict[str, Any]:
    """SDXL's pooled text and sizes. The model joins both, so only their common width matters."""
    config: Any = denoiser.config
    if config.addition_embed_type in (None, "text"):
        return {}
    if config.addition_embed_type != "text_time":
        raise GroupError(
            f"`addition_embed_type` is {config.addition_embed_type!r}; supported are None, 'text' and 'text_time'."
        )
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    count = min(6, (total - 1) // each)  # original size, crop, target size; the refiner has five
    return {"added_cond_kwargs": {"text_embeds": draw.normal(total - count * each), "time_ids": draw.normal(count)}}
