"""Swapping a layer's class for a staged one, in place.

Every function allocates all it needs before it changes anything, so that one that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..groups.layer import Layer, inputs_of
from ..pruning import Consumer
from .roles import GatheredRows, LevelColumns, OffloadedColumns, OffloadedRows, PrefixRows, StagedLayer
from .staged import staged_class
from .swapped import swap_class

S = TypeVar("S", bound=StagedLayer)

Producer = Layer | nn.GroupNorm
"""Whatever has rows: a producer, or the norm behind it."""


@torch.no_grad()
def to_prefix(layer: Producer, order: Tensor) -> PrefixRows:
    """Permute the rows of `layer` in place and make it run a prefix of them, dense at first. `order` is (out,)."""
    _permute_rows(layer, order)
    staged = _swap(layer, PrefixRows, {})
    staged.stage_order = order.cpu()
    staged.stage_rows = len(order)
    staged.stage_names = ("stage_order", "stage_rows")
    return staged


@torch.no_grad()
def to_gathered(layer: Producer, most_rows: int, order: Tensor | None) -> GatheredRows:
    """Make `layer` run gathered rows, with room for `most_rows`, dense at first.

    Args:
        layer: the producer or norm.
        most_rows: rows of the largest level.
        order: rows of the dense weight if the consumer's columns are permuted, shape (out,); permuted in place.
    """
    buffers: dict[str, Tensor | None] = {
        "stage_weight": layer.weight.new_empty(most_rows, *layer.weight.shape[1:]),
        "stage_bias": None if layer.bias is None else layer.bias.new_empty(most_rows),
    }
    if order is not None:
        _permute_rows(layer, order)
    staged = _swap(layer, GatheredRows, buffers)
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_rows, staged.stage_indices = 0, {}
    staged.stage_names = ("stage_weight", "stage_bias", "stage_order", "stage_rows", "stage_indices")
    return staged


@torch.no_grad()
def to_offloaded_rows(layer: Producer, order: Tensor | None) -> OffloadedRows:
    """As `to_gathered`, with only the active rows on the device; `gather` must choose them before the layer runs."""
    permuted = {
        name: parameter if order is None else parameter[order.to(parameter.device)]
        for name, parameter in layer.named_parameters(recurse=False)
    }
    held = {name: _host(tensor, layer) for name, tensor in permuted.items()}
    empty = {name: tensor.new_empty(0, *tensor.shape[1:]) for name, tensor in permuted.items()}
    staged = _swap(layer, OffloadedRows, {"stage_weight": None, "stage_bias": None})
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_host.update(held)
    for name, tensor in empty.items():
        getattr(staged, name).data = tensor
    staged.stage_names = ("stage_weight", "stage_bias", "stage_order")
    return staged


@torch.no_grad()
def to_levels(layer: Layer, variants: Sequence[Consumer], order: Tensor | None) -> LevelColumns:
    """Make `layer` run these variants, dense at first.

    Args:
        layer: the consumer.
        variants: weight and bias of variants 1, 2, ...
        order: input channels of the dense weight if its producers' rows are permuted, shape (in,); permuted in place.
    """
    weights = tuple(f"stage_weight_{index + 1}" for index in range(len(variants)))
    biases = tuple(f"stage_bias_{index + 1}" for index in range(len(variants)))
    buffers: dict[str, Tensor | None] = {}
    for consumer, weight, bias in zip(variants, weights, biases, strict=True):
        buffers[weight] = consumer.weight.to(layer.weight.device, layer.weight.dtype, copy=True)
        buffers[bias] = consumer.bias.to(layer.weight.device, layer.weight.dtype, copy=True)
    _permute_columns(layer, order)
    staged = _swap(layer, LevelColumns, buffers)
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_weights, staged.stage_biases, staged.stage_variant = weights, biases, 0
    staged.stage_names = (*weights, *biases, "stage_order", "stage_variant", "stage_weights", "stage_biases")
    return staged


@torch.no_grad()
def to_offloaded(layer: Layer, variants: Sequence[Consumer], order: Tensor | None) -> OffloadedColumns:
    """As `to_levels`, with only the active variant on the device; `load` must choose one before the layer runs."""
    # In the layer's dtype: in the bank's they could take twice the memory, and twice the time at every switch.
    dtype = layer.weight.dtype
    held = [(_host(made.weight.to(dtype), layer), _host(made.bias.to(dtype), layer)) for made in variants]
    columns = torch.arange(inputs_of(layer)) if order is None else order
    dense = _host(layer.weight[:, columns.to(layer.weight.device)], layer)
    empty = layer.weight.new_empty(len(layer.weight), 0, *layer.weight.shape[2:])
    staged = _swap(layer, OffloadedColumns, {"stage_weight": None, "stage_bias": None})
    staged.stage_order = None if order is None else order.cpu()
    staged.stage_host["weight"], staged.weight.data = dense, empty
    # The dense bias stays on the device: it is small, and `load(0)` needs none then.
    staged.stage_held = ((dense, None), *held)
    staged.stage_names = ("stage_order", "stage_weight", "stage_bias", "stage_held")
    return staged


def _swap(layer: Producer, role: type[S], buffers: Mapping[str, Tensor | None]) -> S:
    swap_class(layer, staged_class(role, layer))
    staged: S = layer  # type: ignore[assignment]
    staged.stage_host = {}
    for name, buffer in buffers.items():
        staged.register_buffer(name, buffer, persistent=False)
    return staged


def _permute_rows(layer: Producer, order: Tensor) -> None:
    permuted = [(parameter, parameter[order.to(parameter.device)]) for parameter in layer.parameters(recurse=False)]
    for parameter, rows in permuted:
        parameter.copy_(rows)


def _permute_columns(layer: Layer, order: Tensor | None) -> None:
    if order is not None:
        layer.weight.copy_(layer.weight[:, order.to(layer.weight.device)])


def _host(tensor: Tensor, layer: Producer) -> Tensor:
    """In host memory, pinned where a GPU will read it."""
    tensor = tensor.detach().to("cpu")
    return tensor.pin_memory() if layer.weight.device.type == "cuda" else tensor
