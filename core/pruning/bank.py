"""The bank: orders, kept counts per level and compensated consumers; all that the run time needs beside the dense
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BankError, ScheduleError
from ..fingerprint import Fingerprint
from ..groups import DenoiserCost, Group, consumer_sites, find_groups
from ..groups.layer import layer_at
from ..schedule import StageSchedule

Sharing = Literal["shared", "stage"]


class ConsumerKey(NamedTuple):
    """Which consumer: its path, the level, and the bank's stage (0 where one serves all stages)."""

    path: str
    level: int
    stage: int


class Consumer(NamedTuple):
    """A consumer at one level: weight (out, kept channels), or (out, kept channels, kh, kw) of a convolution, with the
    channels in the order's prefix; and bias (out,).
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Bank:
    """What pruning yields.

    Args:
        denoiser: class name of the denoiser.
        component: its name in the pipeline.
        groups: the pruned groups.
        sparsities: level -> sparsity; the first is 0 (dense).
        kept: group name -> kept units per level.
        orders: group name -> units, most important first: shape (size,), or (stages, size) for an order per stage.
        consumers: consumer weights and biases of levels 1 and up.
        edges: stage boundaries in tau from 1 to 0 that per-stage orders or consumers belong to; (1, 0) if all is
            shared.
        method: what made it.
        fingerprint: of the dense denoiser.
        consumer_shapes: consumer path -> shape of its dense weight, (out, in) or (out, in, kh, kw).
        provenance: plain data on how it was made.
    """

    denoiser: str
    component: str
    groups: tuple[Group, ...]
    sparsities: tuple[float, ...]
    kept: Mapping[str, tuple[int, ...]]
    orders: Mapping[str, Tensor]
    consumers: Mapping[ConsumerKey, Consumer]
    edges: tuple[float, ...]
    method: str
    fingerprint: Fingerprint
    consumer_shapes: Mapping[str, tuple[int, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order_sharing(self) -> Sharing:
        """`shared` if one order serves all stages (prefix views), `stage` if each stage has its own (gathered rows)."""
        return "stage" if any(order.ndim == 2 for order in self.orders.values()) else "shared"

    @property
    def stages(self) -> int:
        """Number of stages that the bank distinguishes (1 if all is shared)."""
        return len(self.edges) - 1

    @property
    def consumer_sharing(self) -> Sharing:
        """`shared` if a level's consumers serve all stages, `stage` if each stage has its own."""
        return "stage" if any(key.stage > 0 for key in self.consumers) else "shared"

    def order(self, group: str, stage: int) -> Tensor:
        """Order of a group in one of the bank's stages, shape (size,)."""
        order = self.orders[group]
        return order[stage] if order.ndim == 2 else order

    def consumer(self, path: str, level: int, stage: int) -> Consumer:
        """The consumer at `path` for a level above 0 in one of the bank's stages."""
        return self.consumers[ConsumerKey(path, level, stage if self.consumer_sharing == "stage" else 0)]

    def skipped(self, level: int, stage: int) -> tuple[int, ...]:
        """Indices of the whole blocks that a level leaves out in one of the bank's stages."""
        gone = [self.order(g.name, stage)[self.kept[g.name][level] :] for g in self.groups if g.kind == "block"]
        return tuple(sorted(torch.cat(gone).tolist())) if gone else ()

    def at_stage(self, stage: int) -> Bank:
        """What the bank holds for one of its stages, for the whole trajectory. BankError if there is no such stage."""
        if not 0 <= stage < self.stages:
            raise BankError(f"`stage` must be from 0 (noisiest) to {self.stages - 1}, got {stage}.")
        keys = [key for key in self.consumers if key.stage == 0]
        return replace(
            self,
            orders={group.name: self.order(group.name, stage) for group in self.groups},
            consumers={key: self.consumer(key.path, key.level, stage) for key in keys},
            edges=(1.0, 0.0),
        )

    def level_of(self, sparsity: float) -> int:
        """Index of the level with this sparsity. ScheduleError lists the levels that there are."""
        for level, value in enumerate(self.sparsities):
            if abs(value - sparsity) < 1e-6:
                return level
        have = ", ".join(f"{value:g}" for value in self.sparsities)
        raise ScheduleError(f"the bank has no level of sparsity {sparsity:g}; its levels are {have}.")

    def bind(self, schedule: StageSchedule) -> list[tuple[int, int]]:
        """(level, bank stage) of each stage of `schedule`. ScheduleError if a stage straddles two of the bank's
        stages.
        """
        bound = []
        for index, stage in enumerate(schedule.stages):
            inside = [i for i in range(self.stages) if self.edges[i + 1] <= stage.low and stage.high <= self.edges[i]]
            if not inside:
                raise ScheduleError(
                    f"stage {index} (tau {stage.high:g} to {stage.low:g}) crosses a boundary of the bank, whose "
                    f"orders or consumers are made for the stages {', '.join(f'{edge:g}' for edge in self.edges)}. "
                    "Split the stage there, or prune with shared orders and consumers."
                )
            bound.append((self.level_of(stage.sparsity), inside[0]))
        return bound

    def macs(self, cost: DenoiserCost) -> dict[float, int]:
        """Sparsity -> MACs of one forward of one sample.

        Blocks that a level leaves out can differ from stage to stage and so can what they cost; the dearest counts.
        """
        return {
            sparsity: max(
                cost.macs({name: counts[level] for name, counts in self.kept.items()}, self.skipped(level, stage))
                for stage in range(self.stages)
            )
            for level, sparsity in enumerate(self.sparsities)
        }

    def realised(self, cost: DenoiserCost) -> list[float]:
        """Share of the MACs of its groups that each level really removes."""
        prunable = sum(
            sum(cost.block_macs) if group.kind == "block" else cost.units[group.name] * group.size
            for group in self.groups
        )
        return [(cost.dense - macs) / prunable for macs in self.macs(cost).values()]

    def check_class(self, denoiser: nn.Module) -> None:
        """BankError if `denoiser` is not even of the class that the bank was made for."""
        if type(denoiser).__name__ != self.denoiser:
            made = self.provenance.get("model") or f"a model with a {self.denoiser}"
            raise BankError(
                f"the bank is for a {self.denoiser}, got a {type(denoiser).__name__}. Load what it was made from: "
                f"{made}."
            )

    def check_denoiser(self, denoiser: nn.Module) -> None:
        """BankError if `denoiser` is not the one that the bank was made for."""
        self.check_class(denoiser)
        # Paths and attribute names of a loaded bank are used only if the family itself gives the same ones.
        found = {group.name: group for group in find_groups(denoiser)}
        for group in self.groups:
            if found.get(group.name) != group:
                raise BankError(
                    f"the bank's group `{group.name}` is not a group of this {self.denoiser} (widths or paths differ)."
                )
        for path, shape in self.consumer_shapes.items():
            if tuple(layer_at(denoiser, path).weight.shape) != tuple(shape):
                stated = " x ".join(map(str, shape))
                raise BankError(f"the bank's consumer `{path}` is {stated}, this denoiser's differs.")
        why = self.fingerprint.mismatch(fingerprint_of(denoiser))
        if why:
            raise BankError(
                f"the bank is for another {self.denoiser}: {why}. Load the model it was made from, or prune anew."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        return self  # never changed after it is made, and large

    def __str__(self) -> str:
        kinds = {kind: sum(g.kind == kind for g in self.groups) for kind in ("head", "neuron", "channel", "block")}
        groups = ", ".join(f"{count} of {kind}s" for kind, count in kinds.items() if count)
        lines = [
            f"Bank of {self.denoiser} ({self.component}): method {self.method}, groups: {groups}",
            f"  orders {self.order_sharing}, consumers {self.consumer_sharing}, stage edges {list(self.edges)}",
        ]
        errors = self.provenance.get("layer_errors")
        if errors:
            lines.append(f"  layers: {self.provenance['layer_allocation']}; mean squared error of the samples")
            lines += [
                f"    {name}: {', '.join(f'{float(error):.2g}' for error in each)}"  # a bundle tells inf as text
                for name, each in sorted(errors.items())
            ]
        for level, sparsity in enumerate(self.sparsities):
            shown = [self._shown(kind, level) for kind, count in kinds.items() if count]
            lines.append(f"  level {level}: sparsity {sparsity:.3f}, keeps {', '.join(shown)}")
        return "\n".join(lines)

    def _shown(self, kind: str, level: int) -> str:
        """Kept units of a kind: of all, and the least and the most of a group, as shares."""
        groups = [group for group in self.groups if group.kind == kind]
        counts = [self.kept[group.name][level] for group in groups]
        shares = [count / group.size for count, group in zip(counts, groups, strict=True)]
        spread = f" ({min(shares):.0%} to {max(shares):.0%} a layer)" if min(shares) < max(shares) else ""
        return f"{sum(counts)}/{sum(group.size for group in groups)} {kind}s{spread}"


def fingerprint_of(denoiser: nn.Module, groups: Sequence[Group] | None = None) -> Fingerprint:
    """Fingerprint of a dense denoiser, its values sampled from all consumers that its family finds."""
    groups = find_groups(denoiser) if groups is None else groups
    return Fingerprint.of(denoiser, list(consumer_sites([g for g in groups if g.kind != "block"])))
