"""What is running: stages, levels, parameters, MACs and memory, requested and realised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ..groups import DenoiserCost
from ..groups.layer import inputs_of, layer_at, norm_at, outputs_of, taps_of
from ..host import InputSize
from ..pruning import Bank
from ..schedule import ExecutedCost, executed_cost
from .memory import resident_bytes
from .pruner import StagePruner


@dataclass(frozen=True)
class StageRow:
    """One stage: what was asked and what it comes to; units as `kept/all`, channels counted in norm groups, whole
    blocks as such.
    """

    high: float
    low: float
    level: int
    requested: float
    realised: float
    heads: str
    neurons: str
    channels: str
    blocks: str
    macs: int
    parameters: int


NONE = "0/0"
"""A cell of a kind of unit that the bank does not prune."""

_COLUMNS: tuple[tuple[str, int, Callable[[int, StageRow], str]], ...] = (
    ("stage", 5, lambda index, row: str(index)),
    ("tau", 13, lambda index, row: f"{row.high:>5.3f} - {row.low:<5.3f}"),
    ("level", 5, lambda index, row: str(row.level)),
    ("asked", 6, lambda index, row: f"{row.requested:.3f}"),
    ("MACs cut", 8, lambda index, row: f"{row.realised:.3f}"),
    ("heads", 9, lambda index, row: row.heads),
    ("neurons", 13, lambda index, row: row.neurons),
    ("channels", 9, lambda index, row: row.channels),
    ("blocks", 7, lambda index, row: row.blocks),
    ("GMACs", 8, lambda index, row: f"{row.macs / 1e9:.3f}"),
    ("M params", 8, lambda index, row: f"{row.parameters / 1e6:.2f}"),
)
"""Heading, width and cell of each column of the printed table."""


@dataclass(frozen=True)
class StageSummary:
    """Everything that `stage_pruning_summary()` shows; `str()` prints it as a table.

    Args:
        stages: a row a stage.
        dense_macs: MACs of a dense forward of one sample.
        dense_parameters: parameters of the dense denoiser.
        dense_bytes: measured bytes of the dense denoiser's parameters and buffers.
        resident_bytes: measured bytes that the pruned denoiser holds on its device.
        added_bytes: the part of those that stage pruning added (consumers of the levels, gather buffers, orders).
        executed: cost over a sampler's steps, if the summary was asked for some.
        steps: those steps.
        size: what the denoiser is called with in these figures; None is the family's default.
    """

    stages: tuple[StageRow, ...]
    dense_macs: int
    dense_parameters: int
    dense_bytes: int
    resident_bytes: int
    added_bytes: int
    executed: ExecutedCost | None = None
    steps: int | None = None
    size: InputSize | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the columns of `stages` that count units of the bank: `heads`, `neurons`, `channels`, `blocks`."""
        every = ("heads", "neurons", "channels", "blocks")
        return tuple(kind for kind in every if any(getattr(row, kind) != NONE for row in self.stages))

    def __str__(self) -> str:
        size = self.size or "the model's default size"
        lines = [f"Stage pruning (noisiest stage first; MACs of one sample's forward at {size})"]
        shown = [column for column in _COLUMNS if any(column[2](0, row) != NONE for row in self.stages)]
        lines.append("  ".join(f"{name:>{width}}" for name, width, _ in shown))
        for index, row in enumerate(self.stages):
            lines.append("  ".join(f"{cell(index, row):>{width}}" for _, width, cell in shown))
        lines.append(f"dense: {self.dense_macs / 1e9:.3f} GMACs, {self.dense_parameters / 1e6:.2f} M parameters")
        lines.append(
            f"memory: {self.resident_bytes / 2**20:.1f} MiB resident = {self.resident_bytes / self.dense_bytes:.2f} x "
            f"the dense {self.dense_bytes / 2**20:.1f} MiB (levels: {self.added_bytes / 2**20:.1f} MiB)"
        )
        if self.executed is not None:
            calls = " + ".join(str(count) for count in self.executed.calls)
            lines.append(
                f"at {self.steps} steps: {calls} denoiser calls a stage, {self.executed.share:.3f} of the dense MACs"
            )
        return "\n".join(lines)


def summarise(
    pruner: StagePruner,
    taus: Sequence[float] | None = None,
    steps: int | None = None,
    at: tuple[DenoiserCost, InputSize | None] | None = None,
) -> StageSummary:
    """Summary of an enabled pruner.

    Args:
        pruner: the pruner.
        taus: noise levels of a sampler's calls, to add the executed cost.
        steps: the steps that `taus` belongs to.
        at: the dense cost at another size, and that size; those that the pruner was given by default.
    """
    bank, schedule = pruner.bank, pruner.schedule
    cost, size = at or (pruner.cost, pruner.size)
    macs = bank.macs(cost)
    dense = pruner.dense_parameters
    rows, realised = [], bank.realised(cost)
    for stage, (level, at_stage) in zip(schedule.stages, bank.bind(schedule), strict=True):
        rows.append(
            StageRow(
                high=stage.high,
                low=stage.low,
                level=level,
                requested=stage.sparsity,
                realised=realised[level],
                heads=_kept(bank, level, "head"),
                neurons=_kept(bank, level, "neuron"),
                channels=_kept(bank, level, "channel"),
                blocks=_kept(bank, level, "block"),
                macs=macs[bank.sparsities[level]],
                parameters=dense - _removed_parameters(pruner.denoiser, bank, level, at_stage),
            )
        )
    return StageSummary(
        stages=tuple(rows),
        dense_macs=cost.dense,
        dense_parameters=dense,
        dense_bytes=pruner.dense_bytes,
        resident_bytes=resident_bytes(pruner.denoiser),
        added_bytes=resident_bytes(pruner.denoiser, added_only=True),
        executed=executed_cost(schedule, taus, macs) if taus is not None else None,
        steps=steps,
        size=size,
    )


def _kept(bank: Bank, level: int, kind: str) -> str:
    """`kept/size` of a kind of unit, summed over its groups."""
    groups = [group for group in bank.groups if group.kind == kind]
    return f"{sum(bank.kept[g.name][level] for g in groups)}/{sum(g.size for g in groups)}"


def _removed_parameters(denoiser: nn.Module, bank: Bank, level: int, stage: int) -> int:
    """Parameters that a level does not use in one of the bank's stages."""
    skipped = bank.skipped(level, stage)
    blocks = [group.blocks[index] for group in bank.groups if group.kind == "block" for index in skipped]
    removed = sum(parameter.numel() for path in blocks for parameter in denoiser.get_submodule(path).parameters())
    for group in bank.groups:
        channels = (group.size - bank.kept[group.name][level]) * group.width
        for producer in group.producers:
            layer = layer_at(denoiser, producer.path)
            removed += channels * producer.blocks * (inputs_of(layer) * taps_of(layer) + (layer.bias is not None))
        for path in group.companions:
            removed += channels * sum(1 for _ in norm_at(denoiser, path).parameters())
        for consumer in group.consumers:
            layer = layer_at(denoiser, consumer.path)
            removed += channels * outputs_of(layer) * taps_of(layer)
    return removed
