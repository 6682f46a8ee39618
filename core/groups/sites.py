"""Which layers read the same tensor: q, k and v of an attention, and every k and v over the text.

A second moment of a shared input is summed once, for the first layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..host import InputSize
from .group import Group
from .layer import inputs_of, layer_at
from .meta import run_on_meta


@dataclass(frozen=True)
class InputSite:
    """What a layer reads.

    Args:
        leader: path of the first layer that reads the very same tensor; its own if there is none before it.
        rows: rows of its design matrix for one sample: tokens, or the input's places of a convolution.
    """

    leader: str
    rows: int


def layer_paths(groups: Iterable[Group]) -> list[str]:
    """Every producer and consumer of these groups once, producers of a group before its consumers."""
    paths = []
    for group in groups:
        paths += [producer.path for producer in group.producers] + [consumer.path for consumer in group.consumers]
    return list(dict.fromkeys(paths))


def input_sites(denoiser: nn.Module, paths: Sequence[str], size: InputSize | None = None) -> dict[str, InputSite]:
    """Layer path -> what it reads, from one forward on the meta device.

    Linears share what they read if they are given the same tensor object; a convolution makes patches of its own.

    Args:
        denoiser: the dense denoiser.
        paths: of Linears and convolutions. A layer that the forward does not call is left out.
        size: what a call is given; the family's default by default.

    Example:
        >>> sites = input_sites(pipe.transformer, layer_paths(find_groups(pipe.transformer)))
        >>> sites["transformer_blocks.0.attn1.to_v"].leader
        'transformer_blocks.0.attn1.to_q'
    """
    leaders: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no later tensor takes the identity of an earlier one
    sites: dict[str, InputSite] = {}

    def see(path: str, inputs: Tensor) -> None:
        layer = layer_at(denoiser, path)
        alive.append(inputs)
        leader = leaders.setdefault(id(inputs), path) if isinstance(layer, nn.Linear) else path
        sites.setdefault(path, InputSite(leader, inputs.numel() // inputs_of(layer)))

    run_on_meta(denoiser, size, dict.fromkeys(paths, see))
    return sites
