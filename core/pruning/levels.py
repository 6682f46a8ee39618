"""How many units each group keeps at each level."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import BankError
from ..groups import DenoiserCost, Group

DEFAULT_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Widths:
    """Which widths groups may have.

    Args:
        multiple: neurons are kept in multiples of this (what matrix hardware likes).
        minimum: share of each group's units that stays at every level; one unit, or one multiple of neurons, always
            does.
        shares: unit kind -> how much of a level it takes, relative to the other kinds: `{"head": 0.5}` takes half as
            large a share of the heads as of the rest. 1 for kinds that are not named, 0 leaves a kind alone.

    Raises:
        BankError: a value is out of range.
    """

    multiple: int = 64
    minimum: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise BankError(f"`multiple` must be at least 1, got {self.multiple}.")
        if not 0 <= self.minimum <= 1:
            raise BankError(f"`minimum` must be a share of each group's units in [0, 1], got {self.minimum}.")
        wrong = {kind: share for kind, share in self.shares.items() if not (math.isfinite(share) and share >= 0)}
        if wrong:
            raise BankError(f"`shares` must be finite numbers of at least 0, got {wrong}.")

    def check_kinds(self, kinds: Collection[str]) -> None:
        """BankError if `shares` names a kind that is not pruned."""
        for kind in self.shares:
            if kind not in kinds:
                raise BankError(f"`shares` names {kind!r}, but the kinds that are pruned are {sorted(kinds)}.")

    def unit(self, group: Group) -> int:
        """Units of a group that go together."""
        return self.multiple if group.kind == "neuron" else 1

    def least(self, group: Group) -> int:
        """Units that stay in any case."""
        unit = self.unit(group)
        return min(max(math.ceil(self.minimum * group.size / unit), 1) * unit, group.size)


DEFAULT_WIDTHS = Widths()


def check_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    """Sorted levels with dense first. BankError names a value outside [0, 1) or given twice."""
    values = [round(float(value), 6) for value in sparsities]
    wrong = [value for value in values if not (math.isfinite(value) and 0 <= value < 1)]
    if wrong:
        raise BankError(f"`levels` must be sparsities in [0, 1), got {wrong[0]}.")
    if len(set(values)) != len(values):
        raise BankError(f"`levels` must differ from each other, got {values}.")
    return tuple(sorted({0.0, *values}))


def kept_counts(
    groups: Sequence[Group], cost: DenoiserCost, sparsities: Sequence[float], widths: Widths = DEFAULT_WIDTHS
) -> dict[str, tuple[int, ...]]:
    """Kept units of each group at each level.

    Heads, and channels by whole norm groups, are coarse: they are rounded to the nearest count, at least one. Neurons,
    whose counts are fine, then take up what that rounding left over, so that the level removes the asked share of the
    groups' MACs; they are rounded to `multiple`. At the default levels that comes within 0.003 of the asked share on
    SD 1.5 and SDXL, and within 0.05 on SD 2.1, whose dearest attention has five heads and whose neurons have too few
    MACs to make up for it. Without neurons a level is as near as the coarse counts come.

    Args:
        groups: heads, neurons and channels to prune (whole blocks are kept).
        cost: MACs of the denoiser.
        sparsities: level sparsities, rising, the first 0.
        widths: which are allowed.
    """
    coarse = [group for group in groups if group.kind in ("head", "channel")]
    neurons = [group for group in groups if group.kind == "neuron"]
    kept: dict[str, list[int]] = {group.name: [] for group in (*coarse, *neurons)}
    neuron_macs = sum(cost.units[group.name] * group.size for group in neurons)
    total = neuron_macs + sum(cost.units[group.name] * group.size for group in coarse)
    weights = {group.name: widths.shares.get(group.kind, 1.0) for group in (*coarse, *neurons)}
    weighted = sum(weights[group.name] * cost.units[group.name] * group.size for group in (*coarse, *neurons))
    if weights and weighted == 0:
        raise BankError(f"`shares` leaves every kind alone: {dict(widths.shares)}.")
    for sparsity in sparsities:
        removed = 0
        for group in coarse:
            gone = sparsity * weights[group.name] * total / weighted
            count = _clamp(round(group.size * (1 - gone)), widths.least(group), group.size)
            kept[group.name].append(count)
            removed += cost.units[group.name] * (group.size - count)
        share = min(max((sparsity * total - removed) / neuron_macs, 0.0), 1.0) if neurons and sparsity else 0.0
        for group in neurons:
            count = round(group.size * (1 - share) / widths.multiple) * widths.multiple
            count = _clamp(count, widths.least(group), group.size)
            free = share and weights[group.name]
            kept[group.name].append(count if free else group.size)  # a width need not be a multiple itself
    # A higher level never keeps more, whatever the rounding of coarse counts asked of the neurons.
    return {name: tuple(min(counts[: i + 1]) for i in range(len(counts))) for name, counts in kept.items()}


def kept_blocks(order: Tensor, cost: DenoiserCost, sparsities: Sequence[float]) -> tuple[int, ...]:
    """Whole blocks kept at each level: the count that comes nearest to the asked share of all blocks' MACs, at least 1.

    Args:
        order: block indices, most important first, shape (blocks,), or (stages, blocks): then stages are averaged.
        cost: MACs of the denoiser.
        sparsities: level sparsities, rising, the first 0.
    """
    shares = torch.tensor(cost.block_macs, dtype=torch.float64)
    shares = (shares / shares.sum())[order.reshape(-1, len(shares))].mean(0)  # by place in the order
    removed = 1 - shares.cumsum(0)  # with 1, 2, ... blocks kept
    return tuple(int((removed - sparsity).abs().argmin()) + 1 if sparsity else len(shares) for sparsity in sparsities)


def realised_sparsity(kept: dict[str, tuple[int, ...]], cost: DenoiserCost, level: int) -> float:
    """Share of the MACs of the groups in `kept` that a level really removes."""
    counts = {name: values[level] for name, values in kept.items()}
    return (cost.dense - cost.macs(counts)) / sum(cost.units[name] * cost.sizes[name] for name in kept)


def select_groups(groups: Sequence[Group], kinds: Collection[str]) -> list[Group]:
    """Groups of the asked kinds. BankError if a kind is unknown or the denoiser has none."""
    present = {group.kind for group in groups if group.kind != "block" or set(kinds) == {"block"}}
    unknown = set(kinds) - present
    if unknown or not kinds:
        raise BankError(f"`kinds` must be some of {sorted(present)}, got {sorted(kinds)}.")
    return [group for group in groups if group.kind in kinds]


def leave_out(groups: Sequence[Group], keep_dense: Sequence[str]) -> list[Group]:
    """The groups whose names match none of these.

    Args:
        groups: heads, neurons, channels or whole blocks.
        keep_dense: names, or wildcards such as `blocks.0.*`.

    Raises:
        BankError: one matches no group, or nothing is left.
    """
    names = [group.name for group in groups]
    useless = [pattern for pattern in keep_dense if not any(fnmatchcase(name, pattern) for name in names)]
    if useless:
        raise BankError(f"`keep_dense` {useless[0]!r} matches none of the groups, which are {', '.join(names)}.")
    left = [group for group in groups if not any(fnmatchcase(group.name, pattern) for pattern in keep_dense)]
    if not left:
        raise BankError(f"`keep_dense` {list(keep_dense)} leaves nothing to prune.")
    return left


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
