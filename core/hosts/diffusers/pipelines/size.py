"""Sizes of images as users give them, in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....errors import StagePruneError

Size = int | Sequence[int]
"""The side of a square, or (height, width), in pixels."""

Pixels = tuple[int, int]
"""Height and width in pixels."""


def as_pixels(size: Any) -> Pixels:
    """Height and width. StagePruneError if `size` is neither a side nor two of them.

    Example:
        >>> as_pixels(512), as_pixels([512, 768])
        ((512, 512), (512, 768))
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise StagePruneError(f"`size` must be a side in pixels or (height, width), got {size!r}.")
    return sides[0], sides[1]
