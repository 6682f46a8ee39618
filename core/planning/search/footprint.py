"""How much memory a sampler state takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def footprint(value: Any) -> int:
    """Bytes of the tensors, arrays and generators in `value`, however deep in containers and plain objects; whatever is
    there twice counts once. The rest of a state is small beside them.

    Args:
        value: a `SamplerState`, whose host's part may be anything.
    """
    return _footprint(value, set())


def _footprint(value: Any, seen: set[int]) -> int:
    if id(value) in seen or isinstance(value, type):
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, torch.Generator):
        return value.get_state().nbytes
    if isinstance(value, Mapping):
        return sum(_footprint(each, seen) for each in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return sum(_footprint(each, seen) for each in value)
    if type(getattr(value, "nbytes", None)) is int:  # an array, of whatever library
        return int(value.nbytes)
    return _footprint(getattr(value, "__dict__", {}), seen)
