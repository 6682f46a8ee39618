"""Linears that run a level. The host's Linear stays where it is with its Parameters; only its class is swapped.

`PrefixLinear` and `GatheredLinear` are producers (rows), `LevelLinear` is a consumer (columns). A switch sets
integers; the forward reads them. All added tensors are non-persistent buffers: they follow `.to()` and `deepcopy` and
stay out of `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import StagePruneError
from ..pruning import Consumer


class StagedLinear(nn.Linear):
    """What the three have in common: state dictionaries that show the dense weights, and a way back to nn.Linear."""

    stage_names: tuple[str, ...]  # what the swap added, so that restoring removes exactly that
    stage_host: dict[str, Tensor]  # whole parameters in host memory while trimmed; not buffers, so `.to()` leaves them

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
        back = self.stage_order.argsort()
        return {name: tensor[back] for name, tensor in super().dense_weights().items()}


class GatheredLinear(StagedLinear):
    """A producer whose kept rows are copied into a buffer of its own when the stage changes (order per stage, packed
    rows).
    """

    stage_rows: int
    stage_weight: Tensor
    stage_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """The gathered outputs, or all of them while dense."""
        if self.stage_rows == self.out_features:
            return F.linear(input, self.weight, self.bias)
        bias = None if self.stage_bias is None else self.stage_bias[: self.stage_rows]
        return F.linear(input, self.stage_weight[: self.stage_rows], bias)

    @torch.no_grad()
    def gather(self, rows: Tensor) -> None:
        """Copy these rows into the buffer; nothing is allocated."""
        torch.index_select(self.weight.detach(), 0, rows, out=self.stage_weight[: len(rows)])
        if self.stage_bias is not None:
            torch.index_select(self.bias.detach(), 0, rows, out=self.stage_bias[: len(rows)])


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
            weights["weight"] = weights["weight"][:, self.stage_order.argsort()]
        return weights


@torch.no_grad()
def to_prefix(linear: nn.Linear, order: Tensor) -> PrefixLinear:
    """Permute the rows of `linear` in place and make it a PrefixLinear, dense at first. `order` has shape (out,)."""
    order = order.to(linear.weight.device)
    for parameter in linear.parameters(recurse=False):
        parameter.copy_(parameter[order])
    linear.__class__ = PrefixLinear
    staged: PrefixLinear = linear  # type: ignore[assignment]
    staged.stage_host = {}
    staged.register_buffer("stage_order", order, persistent=False)
    staged.stage_rows = linear.out_features
    staged.stage_names = ("stage_order", "stage_rows")
    return staged


@torch.no_grad()
def to_gathered(linear: nn.Linear, most_rows: int) -> GatheredLinear:
    """Make `linear` a GatheredLinear with room for `most_rows`, dense at first."""
    weight = linear.weight.new_empty(most_rows, linear.in_features)
    bias = None if linear.bias is None else linear.bias.new_empty(most_rows)
    linear.__class__ = GatheredLinear
    staged: GatheredLinear = linear  # type: ignore[assignment]
    staged.stage_host = {}
    staged.register_buffer("stage_weight", weight, persistent=False)
    staged.register_buffer("stage_bias", bias, persistent=False)
    staged.stage_rows = linear.out_features
    staged.stage_names = ("stage_weight", "stage_bias", "stage_rows")
    return staged


@torch.no_grad()
def to_levels(linear: nn.Linear, variants: Sequence[Consumer], order: Tensor | None) -> LevelLinear:
    """Make `linear` a LevelLinear with these variants, dense at first.

    Args:
        linear: the consumer.
        variants: weight and bias of variants 1, 2, ...
        order: columns of the dense weight if its producers' rows are permuted, shape (in,); permuted in place.
    """
    weight = linear.weight
    if order is not None:
        order = order.to(weight.device)
        weight.copy_(weight[:, order])
    linear.__class__ = LevelLinear
    staged: LevelLinear = linear  # type: ignore[assignment]
    staged.stage_host = {}
    staged.stage_weights = tuple(f"stage_weight_{i + 1}" for i in range(len(variants)))
    staged.stage_biases = tuple(f"stage_bias_{i + 1}" for i in range(len(variants)))
    staged.register_buffer("stage_order", order, persistent=False)
    for consumer, weight_name, bias_name in zip(variants, staged.stage_weights, staged.stage_biases, strict=True):
        staged.register_buffer(
            weight_name, consumer.weight.to(weight.device, weight.dtype, copy=True), persistent=False
        )
        staged.register_buffer(bias_name, consumer.bias.to(weight.device, weight.dtype, copy=True), persistent=False)
    staged.stage_variant = 0
    added = (*staged.stage_weights, *staged.stage_biases)
    staged.stage_names = (*added, "stage_order", "stage_variant", "stage_weights", "stage_biases")
    return staged
