"""Layers that run a level. The host's layer stays where it is with its Parameters; only its class is swapped.

What a layer does in a group is its role: `PrefixRows`, `GatheredRows` and `OffloadedRows` are producers (and the norms
behind them), `LevelColumns` and `OffloadedColumns` are consumers. `staged.py` joins each role with Linear, Conv2d and
GroupNorm. A switch sets integers; the forward reads them. All added tensors are non-persistent buffers: they follow
`.to()` and `deepcopy` and stay out of `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import StagePruneError
from .swapped import Swapped


class StagedLayer(Swapped):
    """What the roles have in common: state dictionaries that show the dense weights, and a way back to what it was."""

    weight: Any  # a Parameter; torch's own classes disagree on how to say so
    bias: Any  # a Parameter or None
    stage_names: tuple[str, ...]  # what the swap added, so that restoring removes exactly that
    # Host memory, so plain attributes rather than buffers: `.to()` must not move them.
    stage_host: dict[str, Tensor]  # whole parameters in host memory while trimmed

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes, on these weights instead of its own."""
        raise NotImplementedError

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights as they were before the swap, by parameter name."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        return weights | {name: whole.to(weights[name]) for name, whole in self.stage_host.items()}

    def trim(self, kept: Mapping[str, Tensor]) -> None:
        """Keep only these parts of the parameters on the device; the whole ones wait in host memory for `restore`."""
        for name, part in kept.items():
            parameter = getattr(self, name)
            self.stage_host[name] = parameter.data.to("cpu")
            parameter.data = part.detach().clone()

    def restore(self) -> None:
        """Become again what this was, bit for bit."""
        for name, dense in self.dense_weights().items():
            parameter = getattr(self, name)
            if name in self.stage_host:
                parameter.data = dense.clone()
            else:
                parameter.data.copy_(dense.clone())
        for name in self.stage_names:
            delattr(self, name)
        del self.stage_names, self.stage_host
        self.swap_back()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.dense_weights().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        raise StagePruneError(
            f"`{prefix}weight` belongs to a denoiser with stage pruning enabled: its bank would not fit new weights. "
            "Call disable_stage_pruning() first, load, and enable again."
        )


class RowsInOrder(StagedLayer):
    """Rows that may have been permuted; `stage_order` None: they were not."""

    stage_order: Tensor | None

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights with their rows back in the dense order."""
        weights = super().dense_weights()
        if self.stage_order is None:
            return weights
        return {name: _unordered(tensor, self.stage_order, 0) for name, tensor in weights.items()}


class ColumnsInOrder(StagedLayer):
    """Columns that may have been permuted; `stage_order` None: they were not."""

    stage_order: Tensor | None

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights with their columns back in the dense order."""
        weights = dict(super().dense_weights())
        if self.stage_order is not None:
            weights["weight"] = _unordered(weights["weight"], self.stage_order, 1)
        return weights


class PrefixRows(RowsInOrder):
    """Rows that are permuted once, most important unit first: every level is a view of the first ones."""

    stage_rows: int

    def forward(self, input: Tensor) -> Tensor:
        """The first `stage_rows` outputs."""
        bias = None if self.bias is None else self.bias[: self.stage_rows]
        return self.run(input, self.weight[: self.stage_rows], bias)

    def trim_rows(self, rows: int) -> None:
        """Keep the first `rows` rows on the device: all that any stage of the schedule uses."""
        self.trim({name: parameter[:rows] for name, parameter in self.named_parameters(recurse=False)})


class GatheredRows(RowsInOrder):
    """Rows of which the kept ones are copied into a buffer when the stage changes.

    For an order per stage, and for packed rows (GEGLU, fused qkv), whose kept rows are no prefix.
    """

    stage_rows: int  # 0 while dense
    stage_indices: dict[Tensor, Tensor]  # rows, told apart by identity -> the same on the weight's device
    stage_weight: Tensor
    stage_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The gathered outputs, or all of them while dense."""
        if self.stage_rows == 0:
            return self.run(input, self.weight, self.bias)
        bias = None if self.stage_bias is None else self.stage_bias[: self.stage_rows]
        return self.run(input, self.stage_weight[: self.stage_rows], bias)

    @torch.no_grad()
    def gather(self, rows: Tensor | None) -> None:
        """Copy these rows into the buffer; nothing is allocated, but for their index the first time. None, for dense,
        needs no copy.
        """
        if rows is None:
            return
        index = self._index(rows)
        torch.index_select(self.weight.detach(), 0, index, out=self.stage_weight[: len(index)])
        if self.stage_bias is not None:
            torch.index_select(self.bias.detach(), 0, index, out=self.stage_bias[: len(index)])

    def _index(self, rows: Tensor) -> Tensor:
        """These rows on the weight's device: put there the first time, and again when the weight has moved."""
        index = self.stage_indices.get(rows)
        if index is None or index.device != self.weight.device:
            index = self.stage_indices[rows] = rows.to(self.weight.device)
        return index


class OffloadedRows(RowsInOrder):
    """Rows of which only the active ones are on the device; all of them wait in host memory.

    What `GatheredRows` is for, without a buffer beside the dense rows.
    """

    stage_weight: Tensor
    stage_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The active outputs."""
        return self.run(input, self.stage_weight, self.stage_bias)

    @torch.no_grad()
    def gather(self, rows: Tensor | None) -> None:
        """Copy these rows to the device, or all of them for None; the ones before are freed."""
        active = {name: whole if rows is None else whole[rows] for name, whole in self.stage_host.items()}
        like = self.weight
        on_device = {name: part.to(like.device, like.dtype, non_blocking=True) for name, part in active.items()}
        self.stage_weight, self.stage_bias = on_device["weight"], on_device.get("bias")


class LevelColumns(ColumnsInOrder):
    """Columns with a weight and bias of their own for every variant (a level, or a level in a stage) but the dense
    one.
    """

    stage_variant: int
    stage_weights: tuple[str, ...]
    stage_biases: tuple[str, ...]

    def forward(self, input: Tensor) -> Tensor:
        """The active variant; 0 is dense."""
        if self.stage_variant == 0:
            return self.run(input, self.weight, self.bias)
        weight: Tensor = getattr(self, self.stage_weights[self.stage_variant - 1])
        return self.run(input, weight, getattr(self, self.stage_biases[self.stage_variant - 1]))

    def trim_dense(self) -> None:
        """Keep no dense weight on the device: every stage of the schedule has a variant of its own."""
        self.trim({"weight": self.weight[:, :0]})


class OffloadedColumns(ColumnsInOrder):
    """Columns of which only the active variant is on the device; the others wait in host memory.

    The dense weight is a variant like the others, so the device never holds more than the dense model does.
    """

    stage_held: tuple[tuple[Tensor, Tensor | None], ...]  # plain attributes: `.to()` must not move them
    stage_weight: Tensor
    stage_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The active variant."""
        return self.run(input, self.stage_weight, self.bias if self.stage_bias is None else self.stage_bias)

    @torch.no_grad()
    def load(self, variant: int) -> None:
        """Copy a variant to the device; the one before it is freed. From pinned memory the copy does not block."""
        weight, bias = self.stage_held[variant]
        like = self.weight
        self.stage_weight = weight.to(like.device, like.dtype, non_blocking=True)
        self.stage_bias = None if bias is None else bias.to(like.device, like.dtype, non_blocking=True)


def _unordered(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    """Undo a permutation along `dim`."""
    return tensor.index_select(dim, order.argsort().to(tensor.device))
