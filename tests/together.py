"""Several processes, played by threads of this one: each has a rank, and their collective calls meet at a barrier."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from stageprune.core.distributed import Accelerated
from stageprune.core.errors import StagePruneError


class Together:
    """One rank."""

    device = "cpu"

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict[int, Any]) -> None:
        self.place, self.barrier, self.table = (rank, size), barrier, table
        self.first = rank == 0

    part = Accelerated.part

    @property
    def state(self):
        return SimpleNamespace(process_index=self.place[0], num_processes=self.place[1])

    def exchange(self, value):
        self.table[self.place[0]] = value
        self.barrier.wait()
        values = copy.deepcopy([self.table[rank] for rank in range(self.place[1])])
        self.barrier.wait()
        return values

    def gather(self, made):
        return {place: statistics for each in self.exchange(made) for place, statistics in each.items()}

    def agree(self, value):
        return self.exchange(value)[0]

    def sum(self, tensors):
        mine = list(tensors)
        for tensor, parts in zip(mine, zip(*self.exchange(mine), strict=True), strict=True):
            tensor.copy_(sum(parts))


def run_together(size: int, work: Callable[[Together], Any]) -> list[Any]:
    """What each rank's work returned, or the error that stopped it. As a launcher does, all stop if one fails."""
    barrier, table, found = threading.Barrier(size, timeout=120), {}, {}

    def run(rank: int) -> None:
        try:
            found[rank] = work(Together(rank, size, barrier, table))
        except BaseException as error:
            found[rank] = error
            if not isinstance(error, StagePruneError):  # which all of them raise
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]
