"""A level of a bank as a state dictionary of its own: smaller, or as large as the dense one with zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..groups import consumer_sites, find_groups, width_groups
from ..groups.check import sliced
from ..groups.layer import layer_at, outputs_of
from .bank import Bank, Consumer
from .solver import widened


@torch.no_grad()
def small_state(denoiser: nn.Module, bank: Bank, level: int) -> dict[str, Tensor]:
    """The level's tensors under the dense model's names: without the removed units and without the removed blocks.

    Args:
        denoiser: the dense denoiser; as it was afterwards.
        bank: of one stage (see `Bank.at_stage`).
        level: which.

    Raises:
        ExportError: a compensated bias has no place in a layer without one.
    """
    widths = width_groups(bank.groups) if level else []
    keep = {group.name: bank.order(group.name, 0)[: bank.kept[group.name][level]] for group in widths}
    with sliced(denoiser, bank.groups, keep):
        state = {name: tensor.detach() for name, tensor in denoiser.state_dict().items()}
    for path in bank.consumer_shapes if level else ():
        _put(state, path, bank.consumer(path, level, 0))
    gone = tuple(f"{path}." for path in removed_blocks(bank, level))
    return {name: tensor for name, tensor in state.items() if not name.startswith(gone)}


@torch.no_grad()
def zero_filled_state(denoiser: nn.Module, bank: Bank, level: int) -> dict[str, Tensor]:
    """The level's tensors in the dense model's shapes: removed units are zeros, removed blocks add nothing.

    Equal to the level wherever slicing equals masking, which `check_slice_equals_mask` checks. Arguments as above.
    """
    state = {name: tensor.detach().clone() for name, tensor in denoiser.state_dict().items()}
    for group in bank.groups:
        gone = bank.order(group.name, 0)[bank.kept[group.name][level] :]
        for producer in group.producers:
            _zero(state, producer.path, group.rows(gone, producer.blocks))
    for path, entries in consumer_sites(bank.groups).items() if level else ():
        units = {group.name: bank.order(group.name, 0) for group, _ in entries}
        layer = layer_at(denoiser, path)
        _put(state, path, widened(bank.consumer(path, level, 0), layer, entries, units, bank.kept, level))
    for block in removed_blocks(bank, level):
        for path in consumer_sites(width_groups(find_groups(denoiser))):
            if path.startswith(f"{block}."):
                _zero(state, path, torch.arange(outputs_of(layer_at(denoiser, path))))
    return state


def removed_blocks(bank: Bank, level: int) -> list[str]:
    """Paths of the whole blocks that a level of a one-stage bank leaves out."""
    return [group.blocks[i] for group in bank.groups if group.kind == "block" for i in bank.skipped(level, 0)]


def _put(state: dict[str, Tensor], path: str, consumer: Consumer) -> None:
    """Put a consumer's tensors in their places, in the dtype and on the device that these have."""
    weight = state[f"{path}.weight"]
    state[f"{path}.weight"] = consumer.weight.to(weight)
    if f"{path}.bias" in state:
        state[f"{path}.bias"] = consumer.bias.to(weight)
    elif bool(consumer.bias.any()):
        raise ExportError(
            f"the compensated bias of `{path}` has no place in a plain model, whose layer has none. Enable the bundle "
            "instead."
        )


def _zero(state: dict[str, Tensor], path: str, rows: Tensor) -> None:
    """Zero these rows of a layer, and their bias."""
    for name in (f"{path}.weight", f"{path}.bias"):
        if name in state:
            state[name][rows.to(state[name].device)] = 0
