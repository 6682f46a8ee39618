"""What a group is: the units of one attention or feed-forward that live and die together.

The words are those of tensor parallelism: a *producer* is a layer whose rows (output channels) belong to units
(column-parallel), a *consumer* is one whose columns (input channels) do (row-parallel). Layers are Linears and
convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import GroupError
from .layer import inputs_of, layer_at, norm_at, outputs_of

UnitKind = Literal["head", "neuron", "channel", "block"]


@dataclass(frozen=True)
class Rows:
    """A producer: output channels of the layer at `path`, laid out as `blocks` packed copies (GEGLU 2, fused qkv 3)."""

    path: str
    blocks: int = 1


@dataclass(frozen=True)
class Cols:
    """A consumer: input channels of the layer at `path`, from `offset` on."""

    path: str
    offset: int = 0


@dataclass(frozen=True)
class Attribute:
    """An integer that a forward reads and that follows the kept count: `per_unit * kept`."""

    path: str
    name: str
    per_unit: int = 1


@dataclass(frozen=True)
class Term:
    """`macs` times the token counts of `streams`: none for work done once a sample, one for a Linear or a convolution,
    two (queries, keys) for attention's score matrix.
    """

    macs: int
    streams: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnitCost:
    """MACs that one unit costs for one sample, as a sum of terms over the family's token streams.

    Example:
        >>> UnitCost.of((3072, "image"), (64, "image", "text")).macs({"image": 256, "text": 77})
        2047488
    """

    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, *terms: tuple[int | str, ...]) -> UnitCost:
        """From tuples of MACs followed by stream names."""
        return cls(tuple(Term(int(macs), tuple(str(name) for name in streams)) for macs, *streams in terms))

    def macs(self, tokens: Mapping[str, int]) -> int:
        """MACs of one unit at these token counts per stream."""
        return sum(term.macs * math.prod(tokens[name] for name in term.streams) for term in self.terms)


@dataclass(frozen=True)
class Group:
    """Units that are removed together from producers, consumers, companions and attributes.

    Args:
        name: canonical name, the same in every host (`blocks.3.attn`, `blocks.3.ff`, `blocks`).
        kind: what a unit is.
        size: number of units.
        width: channels of one unit (the head dimension; 1 for a neuron; those of a norm group for kind `channel`; 0 for
            blocks).
        producers: layers that compute the units.
        consumers: layers that read them.
        companions: paths of GroupNorms between the two, one norm group a unit, sliced with the rows.
        attributes: integers that must follow the kept count.
        blocks: for kind `block`: module paths, one a unit.
        passes: for kind `block`: arguments of the blocks' forward that a removed block returns, one as it is, several
            as a tuple; by default its first one.
        cost: MACs of one unit.
    """

    name: str
    kind: UnitKind
    size: int
    width: int
    producers: tuple[Rows, ...] = ()
    consumers: tuple[Cols, ...] = ()
    companions: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    blocks: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    cost: UnitCost = UnitCost()

    @property
    def channels(self) -> int:
        """Columns that the group takes in each consumer."""
        return self.size * self.width

    def columns(self, units: Tensor, offset: int = 0) -> Tensor:
        """Channel indices of `units` (int64, shape (k,)) in their order, shape (k * width,)."""
        within = torch.arange(self.width, device=units.device)
        return (offset + units[:, None] * self.width + within).reshape(-1)

    def rows(self, units: Tensor, blocks: int) -> Tensor:
        """Row indices of `units` in a producer of `blocks` packed copies, block by block."""
        columns = self.columns(units)
        starts = torch.arange(blocks, device=units.device) * self.channels
        return (starts[:, None] + columns).reshape(-1)

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.size} {self.kind}s"]
        if self.width > 1:
            parts[0] += f" x {self.width}"
        parts += [f"  rows of    {p.path}" + (f" ({p.blocks} packed)" if p.blocks > 1 else "") for p in self.producers]
        parts += [f"  columns of {c.path}" + (f" from {c.offset}" if c.offset else "") for c in self.consumers]
        parts += [f"  norm       {path}" for path in self.companions]
        parts += [f"  sets       {a.path}.{a.name}" for a in self.attributes]
        return "\n".join(parts)


def width_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups whose units are made of channels (heads, neurons, norm groups), without whole blocks."""
    return [group for group in groups if group.kind != "block"]


def consumer_sites(groups: Sequence[Group]) -> dict[str, list[tuple[Group, int]]]:
    """Consumer path -> the groups that share its columns, by offset (FLUX's `proj_out` serves two)."""
    sites: dict[str, list[tuple[Group, int]]] = {}
    for group in groups:
        for consumer in group.consumers:
            sites.setdefault(consumer.path, []).append((group, consumer.offset))
    return {path: sorted(entries, key=lambda entry: entry[1]) for path, entries in sites.items()}


def check_groups(denoiser: nn.Module, groups: Sequence[Group]) -> None:
    """Check that every group fits the modules it names. Raises GroupError naming group, path and shapes."""
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise GroupError(f"group names must be unique, got {sorted(n for n in names if names.count(n) > 1)}.")
    for group in width_groups(groups):
        for producer in group.producers:
            rows = outputs_of(layer_at(denoiser, producer.path))
            if rows != producer.blocks * group.channels:
                raise GroupError(
                    f"group `{group.name}`: producer `{producer.path}` has {rows} rows, expected "
                    f"{producer.blocks} x {group.size} x {group.width}."
                )
        for consumer in group.consumers:
            columns = inputs_of(layer_at(denoiser, consumer.path))
            if columns < consumer.offset + group.channels:
                raise GroupError(
                    f"group `{group.name}`: consumer `{consumer.path}` has {columns} columns, expected at least "
                    f"{consumer.offset} + {group.size} x {group.width}."
                )
        for companion in group.companions:
            norm = norm_at(denoiser, companion)
            if (norm.num_groups, norm.num_channels) != (group.size, group.channels):
                raise GroupError(
                    f"group `{group.name}`: companion `{companion}` has {norm.num_groups} norm groups over "
                    f"{norm.num_channels} channels, expected one a unit: {group.size} over {group.channels}."
                )


def kept_columns(entries: Sequence[tuple[Group, int]], units: Mapping[str, Tensor]) -> Tensor:
    """Columns of a consumer that stay, concatenated over its groups in the order the sliced producers give them."""
    return torch.cat([group.columns(units[group.name], offset) for group, offset in entries])
