"""Processes that share work. Each holds a whole pipeline, and ends with the same result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Processes(Protocol):
    """What sharing work needs of them."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes results."""

    @property
    def device(self) -> str:
        """Where this process's pipeline belongs: a torch device, or `auto`."""

    @property
    def place(self) -> tuple[int, int]:
        """Which of how many it is, counted from 0."""

    def part(self, count: int) -> range:
        """Which of `count` pieces of work are this process's."""

    def gather(self, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The results of all processes, by piece of work."""

    def agree(self, value: T) -> T:
        """The first process's value, in all of them."""

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Make each of these tensors the sum of all processes', in place."""


class Single:
    """One process, which does all."""

    first = True
    device = "auto"
    place = (0, 1)

    def part(self, count: int) -> range:
        """All."""
        return range(count)

    def gather(self, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """They are here."""
        return dict(made)

    def agree(self, value: T) -> T:
        """It is the only one."""
        return value

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """They are the sums."""


def own_file(path: Path, processes: Processes) -> Path:
    """A name of this process's own for a file that each writes; `path` itself if there is but one."""
    rank, size = processes.place
    return path if size == 1 else path.with_name(f"{path.name}.{rank + 1}-of-{size}")
