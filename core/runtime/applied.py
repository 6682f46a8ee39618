"""A bank on a host's denoiser for the length of a block, every level resident: for planning and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..host import Host
from ..pruning import Bank
from ..schedule import StageSchedule
from .pruner import StagePruner


def uniform_on(bank: Bank, sparsity: float) -> StageSchedule:
    """The same sparsity at every noise level, in the stages that the bank's orders or consumers are made for."""
    return StageSchedule.from_levels([sparsity] * bank.stages, bank.edges[1:-1])


@contextmanager
def applied(host: Host, bank: Bank) -> Iterator[StagePruner]:
    """Attach `bank`, dense at first; set `pruner.schedule` to run schedules; restored at the end, whatever happens."""
    stages = range(bank.stages)
    every = [(level, stage) for level in range(len(bank.sparsities)) for stage in stages]
    dense = uniform_on(bank, 0.0)
    pruner = StagePruner(host.denoiser, bank, dense, host.tau_reader, variants=every, size=host.input_size)
    try:
        yield pruner
    finally:
        pruner.detach()
