"""What the configurations of diffusers' own denoisers can say of a smaller model.

Of whole blocks, how many there are, so most models can be written without some. Of units, nothing: in all of these
classes the number of heads times their width is the width of the model itself, and a feed-forward is 4 times as wide
(diffusers 0.42: DiTTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel). A model
with fewer heads or neurons has no configuration there, and `from_pretrained` would refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from ...errors import ExportError

Shrinker = Callable[[Any, Collection[str]], dict[str, Any]]
"""From a denoiser and the paths of the blocks that are gone to the changes of its configuration."""

_SHRINKERS: dict[str, Shrinker] = {}


def register_shrinker(denoiser: str) -> Callable[[Shrinker], Shrinker]:
    """Decorator: how the configuration of this class says that blocks are gone. ExportError where it cannot."""

    def register(function: Shrinker) -> Shrinker:
        _SHRINKERS[denoiser] = function
        return function

    return register


def shrunk_config(denoiser: nn.Module, gone: Collection[str]) -> dict[str, Any]:
    """The configuration of the denoiser without these blocks."""
    name, config = type(denoiser).__name__, dict(denoiser.config)  # type: ignore[arg-type]
    if not gone:
        return config
    if name not in _SHRINKERS:
        raise ExportError(f"nothing is known of how a {name} is configured without some blocks: enable the bundle.")
    changes = _SHRINKERS[name](denoiser, gone)
    # What a configuration lists as left at its default is not read from it.
    defaults = [key for key in config.pop("_use_default_values", ()) if key not in changes]
    return {**config, **changes, "_use_default_values": defaults}


def renumbered(state: dict[str, Tensor], denoiser: nn.Module, gone: Collection[str]) -> dict[str, Tensor]:
    """The state of the blocks that stay, each list of blocks numbered anew from 0."""
    new: dict[str, str] = {}
    for path in gone:
        parent = path.rpartition(".")[0]
        places = range(len(denoiser.get_submodule(parent)))  # type: ignore[arg-type]
        stay = [place for place in places if f"{parent}.{place}" not in gone]
        new |= {f"{parent}.{place}": f"{parent}.{index}" for index, place in enumerate(stay)}
    result = {}
    for name, tensor in state.items():
        block = next((path for path in new if name.startswith(f"{path}.")), None)
        result[name if block is None else new[block] + name.removeprefix(block)] = tensor
    return result


@register_shrinker("DiTTransformer2DModel")
def dit(denoiser: Any, gone: Collection[str]) -> dict[str, Any]:
    """`num_layers`."""
    if "transformer_blocks.0" in gone:
        raise ExportError(
            "the level leaves out `transformer_blocks.0`, but a DiT's output layer reads the timestep by that block's "
            "norm, so no plain DiT can do without it. Enable the bundle, or prune with another method."
        )
    return {"num_layers": len(denoiser.transformer_blocks) - len(gone)}


@register_shrinker("SD3Transformer2DModel")
def sd3(denoiser: Any, gone: Collection[str]) -> dict[str, Any]:
    """`num_layers`, and which of them have a second attention."""
    stay = [i for i in range(len(denoiser.transformer_blocks)) if f"transformer_blocks.{i}" not in gone]
    if stay[-1] != len(denoiser.transformer_blocks) - 1:
        raise ExportError(
            "the level leaves out the last block, but an SD3Transformer2DModel always builds its last one without a "
            "text output. Enable the bundle, or prune with another method."
        )
    dual = tuple(index for index, place in enumerate(stay) if denoiser.transformer_blocks[place].attn2 is not None)
    return {"num_layers": len(stay), "dual_attention_layers": dual}


@register_shrinker("FluxTransformer2DModel")
def flux(denoiser: Any, gone: Collection[str]) -> dict[str, Any]:
    """`num_layers` and `num_single_layers`."""
    single = sum(path.startswith("single_") for path in gone)
    return {
        "num_layers": len(denoiser.transformer_blocks) - (len(gone) - single),
        "num_single_layers": len(denoiser.single_transformer_blocks) - single,
    }


@register_shrinker("UNet2DConditionModel")
def unet(denoiser: Any, gone: Collection[str]) -> dict[str, Any]:
    """`transformer_layers_per_block`, a number for each attention, and the same for the way up.

    The middle has no entry of its own: it takes the first number of the last block on the way down.
    """

    def counts(path: str, block: Any) -> list[int]:
        attentions = getattr(block, "attentions", None) or ()
        return [
            sum(f"{path}.attentions.{i}.transformer_blocks.{j}" not in gone for j in range(len(a.transformer_blocks)))
            for i, a in enumerate(attentions)
        ]

    down = [counts(f"down_blocks.{i}", block) or [1] for i, block in enumerate(denoiser.down_blocks)]
    up = [counts(f"up_blocks.{i}", block) or [1] for i, block in enumerate(denoiser.up_blocks)]
    middle = counts("mid_block", denoiser.mid_block) if denoiser.mid_block is not None else []
    if middle and not getattr(denoiser.down_blocks[-1], "attentions", None):
        down[-1] = middle
    if middle and middle[0] != down[-1][0]:
        raise ExportError(
            f"the level leaves {middle[0]} transformer blocks in the middle and {down[-1][0]} in the first attention "
            "of the last block before it; a UNet2DConditionModel has one number for both. Enable the bundle, or prune "
            "with another method."
        )
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}
