"""What a denoiser costs, in MACs (multiply-accumulates; half of what FLOP counters print) of one sample's forward.

The total is counted by torch's own FlopCounterMode on the meta device, so it includes what cannot be pruned and needs
no memory; the groups' share follows exactly from their shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..host import InputSize
from .group import Group, width_groups
from .meta import run_on_meta
from .registry import family_of, find_groups


@dataclass(frozen=True)
class DenoiserCost:
    """MACs of one forward of one sample, at any kept counts.

    Args:
        dense: MACs of the dense forward.
        units: group name -> MACs of one unit (heads, neurons, norm groups).
        sizes: group name -> number of units.
        blocks: per whole block: MACs that only go when the block goes (its modulation, say).
        members: per whole block: names of the groups inside it.
    """

    dense: int
    units: Mapping[str, int]
    sizes: Mapping[str, int]
    blocks: tuple[int, ...] = ()
    members: tuple[tuple[str, ...], ...] = ()

    @property
    def prunable(self) -> int:
        """MACs of all heads, neurons and norm groups."""
        return sum(self.units[name] * size for name, size in self.sizes.items())

    @property
    def block_macs(self) -> tuple[int, ...]:
        """MACs of each whole block, with all that is in it."""
        inside = [sum(self.units[name] * self.sizes[name] for name in names) for names in self.members]
        return tuple(own + units for own, units in zip(self.blocks, inside, strict=True))

    def macs(self, kept: Mapping[str, int], skipped_blocks: Collection[int] = ()) -> int:
        """MACs of one forward with `kept[name]` units in each group and the blocks of these indices skipped."""
        gone = {name for index in skipped_blocks for name in self.members[index]}
        total = self.dense - sum(self.blocks[index] for index in skipped_blocks)
        for name, unit in self.units.items():
            stays = 0 if name in gone else kept.get(name, self.sizes[name])
            total -= unit * (self.sizes[name] - stays)
        return total


def measure_cost(
    denoiser: nn.Module, groups: Sequence[Group] | None = None, size: InputSize | None = None
) -> DenoiserCost:
    """Count the MACs of a dense denoiser and split them over its groups.

    Args:
        denoiser: the dense denoiser; it may live on the meta device, no weight is read.
        groups: its groups; found by its family if not given.
        size: what a call is given; by default the model's own size, or that of its pipeline. `Host.input_size` is what
            a host gives it.

    Raises:
        GroupError: the model cannot run at `size`.

    Example:
        >>> measure_cost(pipe.transformer, size=InputSize(64, 64)).dense
    """
    groups = find_groups(denoiser) if groups is None else groups
    tokens = family_of(denoiser).tokens(denoiser, size)
    widths = width_groups(groups)
    units = {group.name: group.cost.macs(tokens) for group in widths}
    sizes = {group.name: group.size for group in widths}
    paths = next((group.blocks for group in groups if group.kind == "block"), ())
    counts = _count_flops(denoiser, size)
    members = tuple(
        tuple(group.name for group in widths if group.consumers[0].path.startswith(f"{path}.")) for path in paths
    )
    overhead = tuple(
        counts[f"{type(denoiser).__name__}.{path}"] // 2 - sum(units[name] * sizes[name] for name in inside)
        for path, inside in zip(paths, members, strict=True)
    )
    return DenoiserCost(counts["Global"] // 2, units, sizes, overhead, members)


def _count_flops(denoiser: nn.Module, size: InputSize | None) -> dict[str, int]:
    """FLOPs of one forward of one sample by module name, run on the meta device."""
    # Attention takes its decomposed path on meta tensors, whose two matmuls the counter sees.
    with FlopCounterMode(display=False) as counter:
        run_on_meta(denoiser, size)
    return {module: sum(by_op.values()) for module, by_op in counter.get_flop_counts().items()}
