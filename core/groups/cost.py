"""What a denoiser costs, in MACs (multiply-accumulates; half of what FLOP counters print) of one sample's forward.

The total is counted by torch's own FlopCounterMode on the meta device, so it includes what cannot be pruned and needs
no memory; the groups' share follows exactly from their shapes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..host import InputSize
from .group import Group, width_groups
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
    state = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    inputs = {name: _to_meta(value) for name, value in family_of(denoiser).example_inputs(denoiser, size=size).items()}
    # Attention takes its decomposed path on meta tensors, whose two matmuls the counter sees.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), _bare(denoiser):
        torch.func.functional_call(denoiser, meta, kwargs=inputs)
    return {module: sum(by_op.values()) for module, by_op in counter.get_flop_counts().items()}


@contextmanager
def _bare(denoiser: nn.Module) -> Iterator[None]:
    """Without hooks (a user's may read values, which meta tensors lack) and without compiled calls (not countable)."""
    saved = []
    for module in denoiser.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks", "_compiled_call_impl"):
            saved.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = None if name == "_compiled_call_impl" else OrderedDict()
    try:
        yield
    finally:
        for module, name, value in saved:
            if name == "_compiled_call_impl" and value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


def _to_meta(value: Any) -> Any:
    if isinstance(value, Mapping):  # SDXL's added_cond_kwargs
        return {name: _to_meta(part) for name, part in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value
