"""Linears that run a level. The host's Linear stays where it is with its Parameters; only its class is swapped.

`PrefixLinear` and `GatheredLinear` are producers (rows), `LevelLinear` is a consumer (columns). A switch sets
integers; the forward reads them. All added tensors are non-persistent buffers: they follow `.to()` and `deepcopy` and
stay out of `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import StagePruneError
from ..pruning import Consumer

S = TypeVar("S", bound="StagedLinear")


class StagedLinear(nn.Linear):
    """What the three have in common: state dictionaries that show the dense weights, and a way back to nn.Linear."""

    stage_names: tuple[str, ...]  # what the swap added, so that restoring removes exactly that
    # Host memory, so plain attributes rather than buffers: `.to()` must not move them.
    stage_host: dict[str, Tensor]  # whole parameters in host memory while trimmed

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
        """Become the nn.Linear again that this was, bit for bit."""
        for name, dense in self.dense_weights().items():
            parameter = getattr(self, name)
            if name in self.stage_host:
                parameter.data = dense.clone()
            else:
                parameter.data.copy_(dense.clone())
        for name in self.stage_names:
            delattr(self, name)
        del self.stage_names, self.stage_host
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.dense_weights().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        raise StagePruneError(
            f"`{prefix}weight` belongs to a denoiser with stage pruning enabled: its bank would not fit new weights. "
            "Call disable_stage_pruning() first, load, and enable again."
        )


class PrefixLinear(StagedLinear):
    """A producer whose rows are permuted once, most important unit first: every level is a view of the first rows."""

    stage_rows: int
    stage_order: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The first `stage_rows` outputs."""
        bias = None if self.bias is None else self.bias[: self.stage_rows]
        return F.linear(input, self.weight[: self.stage_rows], bias)

    def trim_rows(self, rows: int) -> None:
        """Keep the first `rows` rows on the device: all that any stage of the schedule uses."""
        self.trim({name: parameter[:rows] for name, parameter in self.named_parameters(recurse=False)})

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights with their rows back in the dense order."""
        return {name: _unordered(tensor, self.stage_order, 0) for name, tensor in super().dense_weights().items()}


class GatheredLinear(StagedLinear):
    """A producer whose kept rows are copied into a buffer of its own when the stage changes.

    For an order per stage, and for packed rows (GEGLU, fused qkv), whose kept rows are no prefix.
    """

    stage_rows: int  # 0 while dense
    stage_order: Tensor | None
    stage_weight: Tensor
    stage_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The gathered outputs, or all of them while dense."""
        if self.stage_rows == 0:
            return F.linear(input, self.weight, self.bias)
        bias = None if self.stage_bias is None else self.stage_bias[: self.stage_rows]
        return F.linear(input, self.stage_weight[: self.stage_rows], bias)

    @torch.no_grad()
    def gather(self, rows: Tensor) -> None:
        """Copy these rows into the buffer; nothing is allocated."""
        torch.index_select(self.weight.detach(), 0, rows, out=self.stage_weight[: len(rows)])
        if self.stage_bias is not None:
            torch.index_select(self.bias.detach(), 0, rows, out=self.stage_bias[: len(rows)])

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights with their rows back in the dense order."""
        weights = super().dense_weights()
        if self.stage_order is None:
            return weights
        return {name: _unordered(tensor, self.stage_order, 0) for name, tensor in weights.items()}


class LevelLinear(StagedLinear):
    """A consumer with a weight and bias of its own for every variant (a level, or a level in a stage) but the dense
    one.
    """

    stage_variant: int
    stage_order: Tensor | None
    stage_weights: tuple[str, ...]
    stage_biases: tuple[str, ...]

    def forward(self, input: Tensor) -> Tensor:
        """The active variant; 0 is dense."""
        if self.stage_variant == 0:
            return F.linear(input, self.weight, self.bias)
        weight: Tensor = getattr(self, self.stage_weights[self.stage_variant - 1])
        return F.linear(input, weight, getattr(self, self.stage_biases[self.stage_variant - 1]))

    def trim_dense(self) -> None:
        """Keep no dense weight on the device: every stage of the schedule has a variant of its own."""
        self.trim({"weight": self.weight[:, :0]})

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights with their columns back in the dense order."""
        weights = dict(super().dense_weights())
        if self.stage_order is not None:
            weights["weight"] = _unordered(weights["weight"], self.stage_order, 1)
        return weights


class OffloadedLinear(StagedLinear):
    """A consumer of which only the active variant is on the device; the others wait in host memory.

    The dense weight is a variant like the others, so the device never holds more than the dense model does.
    """

    stage_order: Tensor | None
    stage_held: tuple[tuple[Tensor, Tensor | None], ...]  # plain attributes: `.to()` must not move them
    stage_weight: Tensor
    stage_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The active variant."""
        return F.linear(input, self.stage_weight, self.bias if self.stage_bias is None else self.stage_bias)

    @torch.no_grad()
    def load(self, variant: int) -> None:
        """Copy a variant to the device; the one before it is freed. From pinned memory the copy does not block."""
        weight, bias = self.stage_held[variant]
        like = self.weight
        self.stage_weight = weight.to(like.device, like.dtype, non_blocking=True)
        self.stage_bias = None if bias is None else bias.to(like.device, like.dtype, non_blocking=True)

    def dense_weights(self) -> Mapping[str, Tensor]:
        """The weights with their columns back in the dense order."""
        weights = dict(super().dense_weights())
        if self.stage_order is not None:
            weights["weight"] = _unordered(weights["weight"], self.stage_order, 1)
        return weights


# The functions below allocate all they need before they change anything, so that one that fails changes nothing.


@torch.no_grad()
def to_prefix(linear: nn.Linear, order: Tensor) -> PrefixLinear:
    """Permute the rows of `linear` in place and make it a PrefixLinear, dense at first. `order` has shape (out,)."""
    _permute_rows(linear, order)
    staged = _swap(linear, PrefixLinear, {})
    staged.stage_order = order.cpu()
    staged.stage_rows = linear.out_features
    staged.stage_names = ("stage_order", "stage_rows")
    return staged


@torch.no_grad()
def to_gathered(linear: nn.Linear, most_rows: int, order: Tensor | None) -> GatheredLinear:
    """Make `linear` a GatheredLinear with room for `most_rows`, dense at first.

    Args:
        linear: the producer.
        most_rows: rows of the largest level.
        order: rows of the dense weight if the consumer's columns are permuted, shape (out,); permuted in place.
    """
    buffers: dict[str, Tensor | None] = {
        "stage_weight": linear.weight.new_empty(most_rows, linear.in_features),
        "stage_bias": None if linear.bias is None else linear.bias.new_empty(most_rows),
    }
    if order is not None:
        _permute_rows(linear, order)
    staged = _swap(linear, GatheredLinear, buffers)
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_rows = 0
    staged.stage_names = ("stage_weight", "stage_bias", "stage_order", "stage_rows")
    return staged


@torch.no_grad()
def to_levels(linear: nn.Linear, variants: Sequence[Consumer], order: Tensor | None) -> LevelLinear:
    """Make `linear` a LevelLinear with these variants, dense at first.

    Args:
        linear: the consumer.
        variants: weight and bias of variants 1, 2, ...
        order: columns of the dense weight if its producers' rows are permuted, shape (in,); permuted in place.
    """
    weights = tuple(f"stage_weight_{index + 1}" for index in range(len(variants)))
    biases = tuple(f"stage_bias_{index + 1}" for index in range(len(variants)))
    buffers: dict[str, Tensor | None] = {}
    for consumer, weight, bias in zip(variants, weights, biases, strict=True):
        buffers[weight] = consumer.weight.to(linear.weight.device, linear.weight.dtype, copy=True)
        buffers[bias] = consumer.bias.to(linear.weight.device, linear.weight.dtype, copy=True)
    _permute_columns(linear, order)
    staged = _swap(linear, LevelLinear, buffers)
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_weights, staged.stage_biases, staged.stage_variant = weights, biases, 0
    staged.stage_names = (*weights, *biases, "stage_order", "stage_variant", "stage_weights", "stage_biases")
    return staged


@torch.no_grad()
def to_offloaded(linear: nn.Linear, variants: Sequence[Consumer], order: Tensor | None) -> OffloadedLinear:
    """Make `linear` an OffloadedLinear; `load` must choose a variant before it runs. Arguments as in `to_levels`."""
    held = [(_host(consumer.weight, linear), _host(consumer.bias, linear)) for consumer in variants]
    columns = torch.arange(linear.in_features) if order is None else order
    dense = _host(linear.weight[:, columns.to(linear.weight.device)], linear)
    empty = linear.weight.new_empty(linear.out_features, 0)
    staged = _swap(linear, OffloadedLinear, {"stage_weight": None, "stage_bias": None})
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_host["weight"], staged.weight.data = dense, empty
    # The dense bias stays on the device: it is small, and `load(0)` needs none then.
    staged.stage_held = ((dense, None), *held)
    staged.stage_names = ("stage_order", "stage_weight", "stage_bias", "stage_held")
    return staged


def _swap(linear: nn.Linear, cls: type[S], buffers: Mapping[str, Tensor | None]) -> S:
    linear.__class__ = cls
    staged: S = linear  # type: ignore[assignment]
    staged.stage_host = {}
    for name, buffer in buffers.items():
        staged.register_buffer(name, buffer, persistent=False)
    return staged


def _permute_rows(linear: nn.Linear, order: Tensor) -> None:
    permuted = [(parameter, parameter[order.to(parameter.device)]) for parameter in linear.parameters(recurse=False)]
    for parameter, rows in permuted:
        parameter.copy_(rows)


def _permute_columns(linear: nn.Linear, order: Tensor | None) -> None:
    if order is not None:
        linear.weight.copy_(linear.weight[:, order.to(linear.weight.device)])


def _host(tensor: Tensor, linear: nn.Linear) -> Tensor:
    """In host memory, pinned where a GPU will read it."""
    tensor = tensor.detach().to("cpu")
    return tensor.pin_memory() if linear.weight.device.type == "cuda" else tensor


def _unordered(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    """Undo a permutation along `dim`."""
    return tensor.index_select(dim, order.argsort().to(tensor.device))
