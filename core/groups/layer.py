"""The layers that groups are made of: a Linear or a convolution, both seen as one matrix, and the norm between them.

A convolution is a Linear over patches: its weight (out, in, kh, kw), flattened, is a matrix of shape (out, in * taps),
where a *tap* is a place in the kernel. Channel c owns the columns c * taps, ..., c * taps + taps - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import GroupError

Layer = nn.Linear | nn.Conv2d


def layer_at(denoiser: nn.Module, path: str) -> Layer:
    """The Linear or Conv2d at `path`; GroupError if there is none or it is of a kind that cannot be sliced."""
    module = _module_at(denoiser, path)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise GroupError(
            f"`{path}` is a {type(module).__name__}, not a torch.nn.Linear or torch.nn.Conv2d. Quantised layers and "
            "LoRA wrappers are not supported here: fuse and unload LoRA, or load the unquantised model, before "
            "pruning."
        )
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise GroupError(
            f"`{path}` is a Conv2d with groups={module.groups}; only groups=1 can be sliced by channel. Leave its "
            "group out."
        )
    return module


def norm_at(denoiser: nn.Module, path: str) -> nn.GroupNorm:
    """The GroupNorm at `path`; GroupError for other norms, which mix units and cannot be sliced exactly."""
    module = _module_at(denoiser, path)
    if not isinstance(module, nn.GroupNorm):
        raise GroupError(
            f"`{path}` is a norm over the channels of a pruned group, of class {type(module).__name__}; only a "
            "torch.nn.GroupNorm, whose statistics stay within a unit, can be sliced exactly. Leave its group out."
        )
    return module


def inputs_of(layer: Layer) -> int:
    """Input channels of the dense layer, whatever is on the device now."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def outputs_of(layer: Layer) -> int:
    """Output channels of the dense layer, whatever is on the device now."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def taps_of(layer: Layer) -> int:
    """Columns of the matrix that belong to one input channel: the kernel's area, 1 for a Linear."""
    return math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1


def matrix_of(layer: Layer) -> Tensor:
    """The weight as a matrix, a view of shape (out, in * taps)."""
    return layer.weight.flatten(1)


def matrix_columns(channels: Tensor, taps: int) -> Tensor:
    """Columns of the matrix that belong to these input channels, in their order.

    Args:
        channels: channel indices (int64), shape (k,).
        taps: of the layer, see `taps_of`.

    Returns:
        Shape (k * taps,).

    Example:
        >>> matrix_columns(torch.tensor([2, 0]), 3)
        tensor([6, 7, 8, 0, 1, 2])
    """
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).reshape(-1)


def _module_at(denoiser: nn.Module, path: str) -> nn.Module:
    try:
        return denoiser.get_submodule(path)
    except AttributeError:
        raise GroupError(f"`{path}` does not exist in {type(denoiser).__name__}.") from None
