"""Which Hessians are summed in one run over the prompts, and where they are held meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import CalibrationError

GIB = 2**30


def hessian_bytes(columns: int, stages: int) -> int:
    """Size of one layer's sums: float32, with the constant-1 input."""
    return 4 * stages * (columns + 1) ** 2


def packages(widths: Mapping[str, int], stages: int, budget: float | None) -> list[list[str]]:
    """Layers in packages, in the order of the model, none of which needs more than the budget.

    Args:
        widths: layer path -> columns of its matrix.
        stages: number of stages that are kept apart.
        budget: GiB of Hessians; None is without limit.

    Raises:
        CalibrationError: a single layer needs more.
    """
    if budget is None:
        return [[*widths]]
    sizes = {path: hessian_bytes(columns, stages) / GIB for path, columns in widths.items()}
    largest = max(sizes, key=sizes.__getitem__, default="")
    if not budget > 0 or (sizes and sizes[largest] > budget):
        least = f"; the Hessian of `{largest}` alone takes {sizes[largest]:.2g}" if sizes else ""
        raise CalibrationError(f"`hessian_budget` is too small: got {budget:g} GiB{least}. Give more, or None.")
    parts: list[list[str]] = []
    room = 0.0
    for path, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = budget
        parts[-1].append(path)
        room -= size
    return parts or [[]]


def device_for(paths: Sequence[str], widths: Mapping[str, int], stages: int, device: torch.device) -> torch.device:
    """Where the sums of a package are held: with the denoiser on a GPU if they take at most half of what is free there
    (sums that have to travel at every call are slow), else in the host's memory.
    """
    if device.type != "cuda":
        return torch.device("cpu")
    needed = sum(hessian_bytes(widths[path], stages) for path in paths)
    free, _ = torch.cuda.mem_get_info(device)
    return device if needed <= free / 2 else torch.device("cpu")
