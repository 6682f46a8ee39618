"""Which layers of a 2:4 model run through torch's semi-structured kernels: those where they are there and faster.

`torch.sparse.to_sparse_semi_structured` needs an NVIDIA GPU from Ampere on, float16 or bfloat16, and shapes that its
kernels take. Whether it is faster depends on the shape too, so each shape is timed; no speed is taken for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups.layer import layer_at
from ..pruning import NM

if TYPE_CHECKING:
    from .model import StaticModel

Kernels = Literal["auto", "dense"]

WORTH = 0.97
"""A layer runs sparse if it takes at most this share of the dense time: less is within the spread of a quick timing."""

ROWS = 4096
"""Rows that a layer is timed on if nothing is known of its input: the tokens of an image of 1024 x 1024 pixels."""


@dataclass(frozen=True)
class KernelChoice:
    """How one layer runs, and why.

    Args:
        path: of the layer.
        sparse: whether by semi-structured kernels.
        why: in words.
        dense_ms: measured time of the dense layer, None if it was not timed.
        sparse_ms: and of the sparse one.
    """

    path: str
    sparse: bool
    why: str
    dense_ms: float | None = None
    sparse_ms: float | None = None


class Backend(Protocol):
    """Semi-structured kernels of some device."""

    def refusal(self, weight: Tensor) -> str | None:
        """Why a weight (out, in) cannot run here at all, or None."""

    def compress(self, weight: Tensor) -> Tensor:
        """The weight in the kernels' own form, to be used in its place. RuntimeError if they do not take its shape."""

    def milliseconds(self, weight: Tensor, bias: Tensor | None, rows: int) -> float:
        """Time of the Linear on so many rows, whichever form its weight has."""


class TorchBackend:
    """torch's own kernels, timed by CUDA events."""

    def refusal(self, weight: Tensor) -> str | None:
        """Device and dtype; the shape shows when it is compressed."""
        if weight.device.type != "cuda":
            return f"semi-structured kernels need an NVIDIA GPU, the layer is on {weight.device.type}"
        major, minor = torch.cuda.get_device_capability(weight.device)
        if major < 8:
            return f"semi-structured kernels need compute capability 8.0 (Ampere), this GPU has {major}.{minor}"
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return f"semi-structured kernels take float16 and bfloat16, the layer is {_name(weight.dtype)}"
        return None

    def compress(self, weight: Tensor) -> Tensor:
        """A `SparseSemiStructuredTensor`."""
        result: Tensor = torch.sparse.to_sparse_semi_structured(weight)
        return result

    def milliseconds(self, weight: Tensor, bias: Tensor | None, rows: int, calls: int = 20, repeats: int = 3) -> float:
        """Least mean of `repeats` runs of `calls` calls, after a run to warm up."""
        inputs = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        times: list[float] = []
        for _ in range(repeats + 1):
            begin.record()
            for _ in range(calls):
                F.linear(inputs, weight, bias)
            end.record()
            torch.cuda.synchronize(weight.device)
            times.append(begin.elapsed_time(end) / calls)
        return min(times[1:])


def choose_kernels(
    model: StaticModel, denoiser: nn.Module, rows: Mapping[str, int], backend: Backend
) -> list[KernelChoice]:
    """A choice for every layer of `model`, by its shape: layers of one shape and as many rows are timed once.

    Args:
        model: the static model.
        denoiser: where it will run; its device and dtype count.
        rows: layer path -> rows of one call.
        backend: the kernels.
    """
    timed: dict[tuple[object, ...], tuple[float, float] | str] = {}
    choices = []
    for path, sparse in model.layers.items():
        layer = layer_at(denoiser, path)
        weight = sparse.weight.to(layer.weight.device, layer.weight.dtype)
        why = _refusal(layer, sparse.matrix()) or backend.refusal(weight)
        if why is not None:
            choices.append(KernelChoice(path, False, why))
            continue
        count = rows.get(path, ROWS)
        key = (tuple(weight.shape), layer.bias is None, count)
        if key not in timed:
            timed[key] = _time(backend, weight, layer.bias, count)
        choices.append(_choice(path, timed[key], count))
    return choices


def _refusal(layer: nn.Module, matrix: Tensor) -> str | None:
    """What no device changes."""
    if not isinstance(layer, nn.Linear):
        return "torch has no semi-structured kernel for convolutions"
    return None if NM(2, 4).holds(matrix) else "semi-structured kernels are for 2:4, its zeros are not"


def _time(backend: Backend, weight: Tensor, bias: Tensor | None, rows: int) -> tuple[float, float] | str:
    """Milliseconds dense and sparse, or why the kernels do not take the layer."""
    try:
        compressed = backend.compress(weight)
        return backend.milliseconds(weight, bias, rows), backend.milliseconds(compressed, bias, rows)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"the semi-structured kernels do not take it: {str(error).partition(chr(10))[0]}"


def _choice(path: str, result: tuple[float, float] | str, rows: int) -> KernelChoice:
    if isinstance(result, str):
        return KernelChoice(path, False, result)
    dense, sparse = result
    faster = sparse <= WORTH * dense
    word = "faster" if faster else "not faster"
    why = f"{word} here: {sparse:.3f} ms against {dense:.3f} ms dense for {rows} rows"
    return KernelChoice(path, faster, why, dense, sparse)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
