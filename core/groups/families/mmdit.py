"""What the multimodal transformers (SD3, FLUX) share: attention over image and text tokens at once.

The streams are `image`, `text`, and `joint`, which is both. One head is one unit in both streams: queries of either
attend to keys of both, so its rows and columns go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..group import Attribute, Cols, Group, Rows, UnitCost
from .parts import check_processor

PROJECTIONS = {
    "image": {False: ("to_q", "to_k", "to_v"), True: ("to_qkv",)},
    "text": {False: ("add_q_proj", "add_k_proj", "add_v_proj"), True: ("to_added_qkv",)},
}
"""Stream -> whether they are fused -> the Linears of an attention that give queries, keys and values."""


@dataclass(frozen=True)
class Side:
    """What an attention does for one stream of tokens.

    Args:
        stream: the stream.
        projections: Linears for queries, keys and values, or one for all three; paths within the block.
        output: the Linear that reads the heads, from its first column on; None if nothing does.
    """

    stream: str
    projections: Sequence[str]
    output: str | None


def side(stream: str, attention: str, fused: bool, output: str | None) -> Side:
    """A side by the names that diffusers gives to an attention's Linears.

    Args:
        stream: `image` or `text`.
        attention: path of the attention within its block.
        fused: whether its projections are (`fuse_qkv_projections`); the separate ones are there still, unused.
        output: name of the output within the attention, None if nobody reads this stream's heads.
    """
    names = PROJECTIONS[stream][fused]
    return Side(stream, [f"{attention}.{name}" for name in names], output and f"{attention}.{output}")


def heads(
    name: str,
    path: str,
    block: nn.Module,
    attention: str,
    sides: Sequence[Side],
    counts: Sequence[str],
    widths: Sequence[str],
) -> Group:
    """The heads of one attention.

    Args:
        name: of the group.
        path: of the block.
        block: the block.
        attention: path of the attention within the block.
        sides: its streams. With both, scores are between all tokens.
        counts: attributes of the attention that hold its number of heads.
        widths: attributes of the attention that hold the channels of all heads.
    """
    module: Any = block.get_submodule(attention)
    where = f"{path}.{attention}"
    check_processor(where, module)
    width = module.to_q.out_features // module.heads
    attributes = [Attribute(where, attribute) for attribute in counts]
    attributes += [Attribute(where, attribute, width) for attribute in widths]
    producers, consumers, cost = [], [], []
    for part in sides:
        packed = 3 // len(part.projections)
        producers += [Rows(f"{path}.{projection}", packed) for projection in part.projections]
        first: Any = block.get_submodule(part.projections[0])
        macs = 3 * first.in_features
        if part.output is not None:
            output: Any = block.get_submodule(part.output)
            consumers.append(Cols(f"{path}.{part.output}"))
            macs += output.out_features
        cost.append((width * macs, part.stream))
    scored = "joint" if len(sides) > 1 else sides[0].stream
    return Group(
        name=name,
        kind="head",
        size=module.heads,
        width=width,
        producers=tuple(producers),
        consumers=tuple(consumers),
        attributes=tuple(attributes),
        cost=UnitCost.of(*cost, (2 * width, scored, scored)),
    )


def whole_blocks(paths: Sequence[str]) -> Group:
    """The blocks themselves. A removed one returns both streams as they came."""
    passes = ("encoder_hidden_states", "hidden_states")
    return Group(name="blocks", kind="block", size=len(paths), width=0, blocks=tuple(paths), passes=passes)


def token_streams(image: int, text: int) -> Mapping[str, int]:
    """Tokens of each stream."""
    return {"image": image, "text": text, "joint": image + text}
