"""Each role joined with each layer that it is used on. A role says which weights run, a kernel what they do."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from .roles import GatheredRows, LevelColumns, OffloadedColumns, OffloadedRows, PrefixRows, StagedLayer

R = TypeVar("R", bound=StagedLayer)


class LinearKernel(StagedLayer, nn.Linear):
    """x W^T + b."""

    stage_base = nn.Linear

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (..., in) to (..., out)."""
        return F.linear(input, weight, bias)


class Conv2dKernel(StagedLayer, nn.Conv2d):
    """Convolution with the layer's own stride, padding and dilation."""

    stage_base = nn.Conv2d

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (batch, in, height, width) to (batch, out, ...)."""
        result: Tensor = self._conv_forward(input, weight, bias)
        return result


class GroupNormKernel(StagedLayer, nn.GroupNorm):
    """Group norm; `num_groups` is an attribute of the group and follows the kept count by itself."""

    stage_base = nn.GroupNorm

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (batch, channels, ...) to the same."""
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class PrefixLinear(PrefixRows, LinearKernel):
    """A Linear producer, as a prefix of its rows."""


class PrefixConv2d(PrefixRows, Conv2dKernel):
    """A convolution as producer, as a prefix of its output channels."""


class PrefixGroupNorm(PrefixRows, GroupNormKernel):
    """A norm behind a producer, as a prefix of its channels."""


class GatheredLinear(GatheredRows, LinearKernel):
    """A Linear producer with gathered rows."""


class GatheredConv2d(GatheredRows, Conv2dKernel):
    """A convolution as producer with gathered output channels."""


class GatheredGroupNorm(GatheredRows, GroupNormKernel):
    """A norm behind a producer with gathered channels."""


class OffloadedRowsLinear(OffloadedRows, LinearKernel):
    """A Linear producer, the active rows on the device."""


class OffloadedRowsConv2d(OffloadedRows, Conv2dKernel):
    """A convolution as producer, the active output channels on the device."""


class OffloadedRowsGroupNorm(OffloadedRows, GroupNormKernel):
    """A norm behind a producer, the active channels on the device."""


class LevelLinear(LevelColumns, LinearKernel):
    """A Linear consumer, every variant on the device."""


class LevelConv2d(LevelColumns, Conv2dKernel):
    """A convolution as consumer, every variant on the device."""


class OffloadedColumnsLinear(OffloadedColumns, LinearKernel):
    """A Linear consumer, the active variant on the device."""


class OffloadedColumnsConv2d(OffloadedColumns, Conv2dKernel):
    """A convolution as consumer, the active variant on the device."""


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[StagedLayer]] = {
    (cls.__bases__[0], cls.stage_base): cls
    for cls in (
        *(PrefixLinear, PrefixConv2d, PrefixGroupNorm),
        *(GatheredLinear, GatheredConv2d, GatheredGroupNorm),
        *(OffloadedRowsLinear, OffloadedRowsConv2d, OffloadedRowsGroupNorm),
        *(LevelLinear, LevelConv2d),
        *(OffloadedColumnsLinear, OffloadedColumnsConv2d),
    )
}


def staged_class(role: type[R], layer: nn.Module) -> type[R]:
    """The class that plays `role` for this layer. KeyError if there is none (a norm has no columns)."""
    return _CLASSES[role, type(layer)]  # type: ignore[return-value]
