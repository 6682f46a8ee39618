"""Blocks that can be left out: a skipped one returns what it was given, and nothing in it runs.

As with layers, the block stays where it is and only its class is swapped, for one made from its own class; a switch
sets an integer, which the forward reads and compiled graphs guard on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..groups.passing import Place, passed, places_of
from .swapped import Swapped, swap_class


class SkippableBlock(Swapped):
    """A block of any class that runs, or passes its streams on. Joined with that class by `to_skippable`."""

    stage_skipped: int  # 1 where it is left out
    stage_passes: tuple[Place, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own output, or its streams as they came."""
        if self.stage_skipped:
            return passed(self.stage_passes, args, kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def restore(self) -> None:
        """Become again what this was."""
        del self.stage_skipped, self.stage_passes
        self.swap_back()


def to_skippable(block: nn.Module, passes: Sequence[str]) -> SkippableBlock:
    """Make `block` skippable, running at first.

    Args:
        block: any module.
        passes: see `Group.passes`.
    """
    places = places_of(block.forward, passes)
    swap_class(block, _skippable_class(type(block)))
    skippable: SkippableBlock = block  # type: ignore[assignment]
    skippable.stage_skipped, skippable.stage_passes = 0, places
    return skippable


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _skippable_class(base: type[nn.Module]) -> type[nn.Module]:
    """One class a kind of block, so that blocks of a kind share their compiled graphs."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Skippable{base.__name__}", (SkippableBlock, base), {"stage_base": base})
    return _CLASSES[base]
