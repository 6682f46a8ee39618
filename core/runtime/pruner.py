"""The switch: attaches a bank to a denoiser, follows the noise level, and sets what each stage needs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import StagePruneError
from ..groups import Group, consumer_sites, measure_cost
from ..groups.group import kept_columns
from ..groups.hooked import ALLOWED, refuse_hooked
from ..groups.layer import inputs_of, layer_at, norm_at
from ..host import InputSize, TauReader
from ..pruning import Bank
from ..schedule import StageSchedule
from .blocks import SkippableBlock, to_skippable
from .memory import resident_bytes
from .roles import GatheredRows, LevelColumns, OffloadedColumns, OffloadedRows, PrefixRows, StagedLayer
from .swap import Producer, to_gathered, to_levels, to_offloaded, to_offloaded_rows, to_prefix
from .swapped import Swapped

logger = logging.getLogger(__name__)

_PRUNER = "_stage_pruner"
_BANK = "_stage_bank"  # set by `remember_bank` alone: a pruner may run a rival's bank to measure it

Variant = tuple[int, int]
"""(level, stage of the bank); (0, 0) is dense."""

DENSE: Variant = (0, 0)

Resident = Literal["all", "active"]


@dataclass
class _Setting:
    """An integer on a module that each variant sets to a value of its own."""

    module: nn.Module
    name: str
    values: list[int]  # per variant


class StagePruner:
    """Stage pruning of one denoiser. All state is on the denoiser, so every pipeline that shares it sees it.

    Args:
        denoiser: the dense denoiser.
        bank: made for it.
        schedule: what runs where.
        read_tau: reads the noise level from a call.
        variants: what must be resident; the variants of `schedule` by default.
        resident: `all` keeps the consumers of every level on the device; `active` only those of the running one, and of
            gathered rows (packed, or ordered per stage) only the kept ones: the others wait in (pinned) host memory and
            are copied at a switch. The device never holds more than the dense model then.
        trim: move the dense weights that no stage of the schedule uses to host memory until the pruner is detached. By
            default only on an accelerator: on the CPU it would save nothing.
        size: what the denoiser is called with, for counting MACs; the family's default by default.

    Raises:
        BankError, ScheduleError: bank or schedule do not fit. Nothing has been changed then.
        StagePruneError: the denoiser is in a state that cannot be pruned (already enabled, offloaded, wrapped).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        bank: Bank,
        schedule: StageSchedule,
        read_tau: TauReader,
        variants: Sequence[Variant] | None = None,
        resident: Resident = "all",
        trim: bool | None = None,
        size: InputSize | None = None,
    ) -> None:
        if resident not in ("all", "active"):
            raise StagePruneError(f"`resident` must be 'all' or 'active', got {resident!r}.")
        bound = bank.bind(schedule)
        bank.check_class(denoiser)
        _check_state(denoiser, bank)
        bank.check_denoiser(denoiser)
        _check_companions(denoiser, bank)
        self.denoiser = denoiser
        self.bank = bank
        self.read_tau = read_tau
        self.size = size
        self.cost = measure_cost(denoiser, size=size)
        self.dense_bytes = resident_bytes(denoiser)
        self.dense_parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        self.switches = 0
        wanted = {self._variant(*variant) for variant in (variants or bound)}
        self.variants = [DENSE, *sorted(wanted - {DENSE})]
        on_device = next(denoiser.parameters()).device.type != "cpu"
        self.resident = resident
        self.trimmed = DENSE not in wanted and (on_device or resident == "active" if trim is None else trim)
        self._settings: list[_Setting] = []
        self._gathers: list[tuple[GatheredRows | OffloadedRows, list[Tensor | None]]] = []
        self._offloaded: list[OffloadedColumns] = []
        self._staged: list[StagedLayer | SkippableBlock] = []
        self._active: int | None = None  # nothing has been set yet
        self._schedule = schedule
        self._bound: list[int] = []
        try:
            self._attach()
            self._name_swapped()
            _make_room_for_graphs(len(self.variants), _shapes(bank))
            self.schedule = schedule
            self.switch(0)
            if self.trimmed:
                self._trim()
        except BaseException:
            self._restore()
            raise
        self.switches = 0
        self._hooks = [
            denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True),
            denoiser.register_load_state_dict_pre_hook(_refuse_load),  # type: ignore[no-untyped-call]
        ]
        denoiser.__dict__[_PRUNER] = self

    @property
    def schedule(self) -> StageSchedule:
        """The running schedule. Another one of the same bank can be set; its variants must be resident."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: StageSchedule) -> None:
        wanted = [self._variant(*variant) for variant in self.bank.bind(schedule)]
        resident = self.variants[1:] if self.trimmed else self.variants
        missing = [variant for variant in wanted if variant not in resident]
        if missing:
            have = sorted({self.bank.sparsities[level] for level, _ in resident})
            raise StagePruneError(
                f"level {missing[0][0]} of the schedule is not resident (resident sparsities: {have}). Disable stage "
                "pruning and enable it with this schedule."
            )
        self._schedule = schedule
        self._bound = [self.variants.index(variant) for variant in wanted]

    @property
    def level(self) -> int:
        """The level that is set now."""
        return self.variants[self._active or 0][0]

    def switch(self, stage: int) -> None:
        """Set what a stage of the schedule needs. Free if it is set already."""
        variant = self._bound[stage]
        if variant != self._active:
            self._set(variant)

    def detach(self) -> None:
        """Restore the denoiser, bit for bit."""
        self._check_weights()
        for hook in self._hooks:
            hook.remove()
        self._restore()
        del self.denoiser.__dict__[_PRUNER]

    def _variant(self, level: int, stage: int) -> Variant:
        """Variants that hold the same tensors are one."""
        shared = self.bank.order_sharing == "shared" and self.bank.consumer_sharing == "shared"
        return (level, 0 if shared or level == 0 else stage)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Outside of any graph: it reads a Python float and sets integers that the blocks' graphs guard on.
        self._check_weights()
        self.switch(self._schedule.stage_of(self.read_tau(args, kwargs)))

    def _check_weights(self) -> None:
        """Hooks on the staged layers refuse themselves (see `Swapped`); those on a module around them, which takes the
        layers' weights away too, show in that there are none.
        """
        for staged in self._staged:
            weight = staged._parameters.get("weight")
            if weight is not None and weight.is_meta:
                raise StagePruneError(
                    f"the weight of `{staged.stage_path}` has been taken to the meta device since stage pruning was "
                    f"enabled: a hook around it would bring back the dense one. {ALLOWED} Load the pipeline anew and "
                    "offload it so."
                )

    def _set(self, variant: int) -> None:
        self._set_integers(variant)
        for gathered, rows in self._gathers:
            gathered.gather(rows[variant])
        for offloaded in self._offloaded:
            offloaded.load(variant)
        self._active = variant
        self.switches += 1

    def _set_integers(self, variant: int) -> None:
        for setting in self._settings:
            setattr(setting.module, setting.name, setting.values[variant])

    def _attach(self) -> None:
        for group in self.bank.groups:
            self._attach_group(group)
        sites = consumer_sites(self.bank.groups)
        prefix = self.bank.order_sharing == "shared"
        for path, entries in sites.items():
            layer = layer_at(self.denoiser, path)
            every = {group.name: self.bank.order(group.name, 0) for group, _ in entries}
            order = _full_order(entries, every, inputs_of(layer)) if prefix else None
            consumers = [self.bank.consumer(path, level, stage) for level, stage in self.variants[1:]]
            if self.resident == "active":
                self._offloaded.append(to_offloaded(layer, consumers, order))
                self._staged.append(self._offloaded[-1])
                continue
            self._staged.append(to_levels(layer, consumers, order))
            self._settings.append(_Setting(self._staged[-1], "stage_variant", list(range(len(self.variants)))))

    def _name_swapped(self) -> None:
        """Let each swapped module say where it is when it refuses something."""
        for path, module in self.denoiser.named_modules():
            if isinstance(module, Swapped):
                module.stage_path = path

    def _trim(self) -> None:
        """Only from here on may the denoiser not be run dense; the first stage has been set."""
        for setting in self._settings:
            # A norm has further settings of its own, its number of groups.
            if isinstance(setting.module, PrefixRows) and setting.name == "stage_rows":
                setting.module.trim_rows(max(setting.values[1:]))
            elif isinstance(setting.module, LevelColumns):
                setting.module.trim_dense()

    def _attach_group(self, group: Group) -> None:
        kept = [self.bank.kept[group.name][level] for level, _ in self.variants]
        for layer, blocks in self._layers_with_rows(group):
            self._attach_rows(layer, group, blocks, kept)
        for attribute in group.attributes:
            module = self.denoiser.get_submodule(attribute.path)
            self._settings.append(_Setting(module, attribute.name, [attribute.per_unit * count for count in kept]))

        self._attach_blocks(group)

    def _attach_blocks(self, group: Group) -> None:
        skipped = [self.bank.skipped(level, stage) for level, stage in self.variants]
        for index, path in enumerate(group.blocks):
            block = to_skippable(self.denoiser.get_submodule(path), group.passes)
            self._staged.append(block)
            self._settings.append(_Setting(block, "stage_skipped", [int(index in gone) for gone in skipped]))

    def _attach_rows(self, layer: Producer, group: Group, blocks: int, kept: Sequence[int]) -> None:
        rows = [count * group.width * blocks for count in kept]
        shared = self.bank.order_sharing == "shared"
        order = group.rows(self.bank.order(group.name, 0), blocks) if shared else None
        if order is not None and blocks == 1:
            self._staged.append(to_prefix(layer, order))
            self._settings.append(_Setting(self._staged[-1], "stage_rows", rows))
            return
        chosen = self._rows_to_gather(group, blocks, kept)
        if self.resident == "active":
            offloaded = to_offloaded_rows(layer, order)
            self._gathers.append((offloaded, chosen))
            self._staged.append(offloaded)
            return
        gathered = to_gathered(layer, max(rows[1:], default=1), order)
        self._gathers.append((gathered, chosen))
        self._staged.append(gathered)
        self._settings.append(_Setting(gathered, "stage_rows", [0, *rows[1:]]))

    def _layers_with_rows(self, group: Group) -> list[tuple[Producer, int]]:
        """Producers and companions with their packed blocks; a norm without weights has nothing to slice."""
        layers: list[tuple[Producer, int]] = [(layer_at(self.denoiser, p.path), p.blocks) for p in group.producers]
        norms = [norm_at(self.denoiser, path) for path in group.companions]
        return layers + [(norm, 1) for norm in norms if norm.affine]

    def _rows_to_gather(self, group: Group, blocks: int, kept: Sequence[int]) -> list[Tensor | None]:
        rows: list[Tensor | None] = [None]
        for (_, stage), count in zip(self.variants[1:], kept[1:], strict=True):
            # With a shared order the rows have been permuted already: each packed copy keeps its first ones.
            permuted = self.bank.order_sharing == "shared"
            units = torch.arange(count) if permuted else self.bank.order(group.name, stage)[:count]
            rows.append(group.rows(units, blocks))
        return rows

    def _restore(self) -> None:
        self._set_integers(0)
        for staged in self._staged:
            staged.restore()
        self._staged, self._settings, self._gathers, self._offloaded = [], [], [], []


def _make_room_for_graphs(variants: int, shapes: int) -> None:
    """Each variant takes a graph for each shape that a kind of block has in the model (a UNet's grow with every
    resolution, and layers that were measured keep different widths) and each memory layout of its input; dynamo gives
    up after 8 by default.

    The limits are the process's: they are only ever raised.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        config, room = dynamo.config, 8 + 4 * variants * shapes
        config.recompile_limit = max(config.recompile_limit, room)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * room)


def _shapes(bank: Bank) -> int:
    """How many shapes a kind of block may have at one level: those of the dense model if layers of one shape keep as
    much as each other, one a layer if not.
    """
    dense = set(bank.consumer_shapes.values())
    kept = {
        (key.level, bank.consumer_shapes[key.path], tuple(made.weight.shape)) for key, made in bank.consumers.items()
    }
    alike = len(kept) == len({(level, shape) for level, shape, _ in kept})
    return max(1, len(dense) if alike else len(bank.consumer_shapes))


def pruner_of(denoiser: nn.Module) -> StagePruner | None:
    """The pruner that is enabled on `denoiser`, if any."""
    return denoiser.__dict__.get(_PRUNER)


def known_bank(denoiser: nn.Module) -> Bank | None:
    """The bank that a user last enabled on `denoiser` or made from it, if any."""
    return denoiser.__dict__.get(_BANK)


def remember_bank(denoiser: nn.Module, bank: Bank) -> None:
    """Let a bare schedule be enabled on `denoiser` later."""
    denoiser.__dict__[_BANK] = bank


def _refuse_load(module: nn.Module, *_: Any) -> None:
    """Before any weight of the denoiser is loaded, so that a refusal leaves it whole."""
    raise StagePruneError(
        f"stage pruning is enabled on this {type(module).__name__}: its bank would not fit new weights. Call "
        "disable_stage_pruning() first, load, and enable again."
    )


def _check_state(denoiser: nn.Module, bank: Bank) -> None:
    """Refuse states in which swapping layers would be wrong or silently ignored, each with its remedy."""
    if pruner_of(denoiser) is not None:
        raise StagePruneError(
            "stage pruning is already enabled on this denoiser. Call disable_stage_pruning() first; to change levels "
            "only, disable and enable with the new schedule."
        )
    paths = {part.path for group in bank.groups for part in group.producers}
    paths |= {part.path for group in bank.groups for part in group.consumers}
    for path in sorted(paths):
        layer = layer_at(denoiser, path)
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise StagePruneError(
                f"`{path}` is a {type(layer).__name__}, not a plain torch.nn.Linear or torch.nn.Conv2d. Fuse and "
                "unload LoRA, and load the unquantised model, before enabling stage pruning."
            )
    for path in (path for group in bank.groups for path in group.blocks):
        refuse_hooked(path, denoiser.get_submodule(path))


def _check_companions(denoiser: nn.Module, bank: Bank) -> None:
    """Only norms that can be swapped. To be called once the groups are known to be the family's own."""
    for path in (path for group in bank.groups for path in group.companions):
        norm = norm_at(denoiser, path)
        if type(norm) is not nn.GroupNorm:
            raise StagePruneError(
                f"`{path}` is a {type(norm).__name__}, not a plain torch.nn.GroupNorm; prune with `kinds` that leave "
                "its group out."
            )


def _full_order(entries: Sequence[tuple[Group, int]], units: Mapping[str, Tensor], columns: int) -> Tensor:
    """Permutation of a consumer's input channels when the rows of its producers are permuted; other columns stay."""
    order = torch.arange(columns)
    for entry in entries:
        group, offset = entry
        order[offset : offset + group.channels] = kept_columns([entry], units)
    return order
