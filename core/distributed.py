"""Processes of `accelerate launch` or `torchrun`, on one machine or several, that share a calibration or a search."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .errors import StagePruneError
from .processes import Processes, Single, T

_PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: as long as they may take to measure an error table."""


class Accelerated:
    """Processes that found each other through accelerate. All run alike hardware, and each holds a whole pipeline.

    Of a calibration each runs its share of the prompts, and their sums are added up at the end. Of a search, each takes
    its share of a round's candidates, those with a common prefix together; all results go to all, so every process
    makes every decision by itself. `accelerate launch` starts one process a GPU, `torchrun --nproc_per_node 2` as many
    as it is told, on CPUs too. Machines need not share a disk: on each of two, `accelerate launch --num_machines 2
    --machine_rank 0 (or 1) --main_process_ip ... -m stageprune calibrate ...`. If one process is killed the launcher
    stops all, and the same command goes on.

    Args:
        state: an `accelerate.PartialState`.
    """

    def __init__(self, state: Any) -> None:
        self.state = state

    @property
    def first(self) -> bool:
        """Whether this is the one that writes results."""
        return bool(self.state.is_main_process)

    @property
    def device(self) -> str:
        """Where this process's pipeline belongs."""
        return str(self.state.device)

    @property
    def place(self) -> tuple[int, int]:
        """Its rank, and the number of processes."""
        return self.state.process_index, self.state.num_processes

    def part(self, count: int) -> range:
        """One of as many runs of neighbours as there are processes."""
        rank, size = self.place
        return range(rank * count // size, (rank + 1) * count // size)

    def gather(self, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The results of all processes."""
        from accelerate.utils import gather_object  # noqa: PLC0415  (an extra)

        return dict(gather_object(list(made.items())))

    def agree(self, value: T) -> T:
        """The first process's value."""
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415  (an extra)

        agreed: T = broadcast_object_list([value])[0]
        return agreed

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up one tensor after the other, where the processes' pipelines are.

        Raises:
            StagePruneError: another process has ended.
        """
        from accelerate.utils import reduce  # noqa: PLC0415  (an extra)

        for tensor in tensors:
            try:
                tensor.copy_(reduce(tensor.to(self.state.device), "sum"))
            except RuntimeError as error:
                raise StagePruneError(
                    f"another process of this run has ended or cannot be reached ({error}). Run the same command "
                    "again: it goes on from the checkpoints."
                ) from error


def processes_here() -> Processes:
    """Those that this process was launched with; this one alone if it was launched by itself.

    Raises:
        StagePruneError: it was launched with others, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Single()
    try:
        from accelerate import PartialState  # noqa: PLC0415  (an extra)
    except ImportError:
        raise StagePruneError("several processes need accelerate: pip install accelerate.") from None
    return Accelerated(PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE))
