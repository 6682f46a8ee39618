"""Processes that share the work of a search. Each holds all of its state, and makes the same decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Processes(Protocol):
    """What a search needs of them."""

    @property
    def first(self) -> bool:
        """Whether this is the one that reads and writes files."""

    @property
    def device(self) -> str:
        """Where this process's pipeline belongs: a torch device, or `auto`."""

    def part(self, count: int) -> range:
        """Which of `count` pieces of work are this process's."""

    def gather(self, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The results of all processes, by piece of work."""

    def agree(self, value: T) -> T:
        """The first process's value, in all of them."""


class Single:
    """One process, which does all."""

    first = True
    device = "auto"

    def part(self, count: int) -> range:
        """All."""
        return range(count)

    def gather(self, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """They are here."""
        return dict(made)

    def agree(self, value: T) -> T:
        """It is the only one."""
        return value
