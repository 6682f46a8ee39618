"""The parts that families share: diffusers' `Attention` over one stream, its `FeedForward`, and what both may hide."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import GroupError
from ..group import Attribute, Cols, Group, Rows, UnitCost


def attention_heads(name: str, path: str, attention: Any, queries: str, keys: str) -> Group:
    """The heads of one attention: rows of q, k and v; columns of the output.

    Args:
        name: of the group.
        path: of the attention.
        attention: diffusers' `Attention`, its projections apart.
        queries: stream of the queries.
        keys: stream of keys and values: the same, or `text` for cross-attention.
    """
    check_processor(path, attention)
    heads, rows, outputs = attention.heads, attention.to_q.out_features, attention.to_out[0].out_features
    width = rows // heads
    return Group(
        name=name,
        kind="head",
        size=heads,
        width=width,
        producers=tuple(Rows(f"{path}.{part}") for part in ("to_q", "to_k", "to_v")),
        consumers=(Cols(f"{path}.to_out.0"),),
        # Every one of these is read by some attention processor; setting `heads` alone is silently wrong in a few.
        attributes=(
            Attribute(path, "heads"),
            Attribute(path, "sliceable_head_dim"),
            Attribute(path, "inner_dim", width),
            Attribute(path, "inner_kv_dim", width),
        ),
        cost=UnitCost.of(
            (width * (attention.to_q.in_features + outputs), queries),
            (width * (attention.to_k.in_features + attention.to_v.in_features), keys),
            (2 * width, queries, keys),
        ),
    )


def neurons(name: str, path: str, feed_forward: Any, stream: str) -> Group:
    """The neurons of one feed-forward: rows of the first Linear (GEGLU: value and gate packed), columns of the last.

    Args:
        name: of the group.
        path: of the feed-forward.
        feed_forward: diffusers' `FeedForward`.
        stream: whose tokens it sees.
    """
    up, down = feed_forward.net[0].proj, feed_forward.net[2]
    packed = up.out_features // down.in_features
    return Group(
        name=name,
        kind="neuron",
        size=down.in_features,
        width=1,
        producers=(Rows(f"{path}.net.0.proj", packed),),
        consumers=(Cols(f"{path}.net.2"),),
        cost=UnitCost.of((up.in_features * packed + down.out_features, stream)),
    )


def check_processor(path: str, attention: Any) -> None:
    """Refuse a processor with weights of its own (IP-Adapter): it has rows for each head, which a group would miss."""
    processor = attention.processor
    if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
        raise GroupError(
            f"`{path}` has a {type(processor).__name__} with weights of its own (IP-Adapter), which slicing would "
            "miss: call unload_ip_adapter() first."
        )
