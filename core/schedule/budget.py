"""Cost of a schedule over the steps that a sampler really executes. A stage that no step visits costs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import AllocationError
from .schedule import StageSchedule


@dataclass(frozen=True)
class Target:
    """What a schedule may cost: `macs:0.67` is 0.67 of the MACs that the dense model would execute."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str | float | Target) -> Target:
        """Read `macs:0.67`, or a bare number that means the same."""
        if isinstance(text, Target):
            return text
        match = re.fullmatch(r"(?:(macs):)?([0-9]*\.?[0-9]+)", str(text).strip())
        value = float(match.group(2)) if match else -1.0
        if not 0 < value <= 1:
            raise AllocationError(f"`target` must look like 'macs:0.67' with a share in (0, 1], got {text!r}.")
        return cls("macs", value)


@dataclass(frozen=True)
class ExecutedCost:
    """Denoiser calls and MACs of each stage, for one sample of one image.

    Args:
        calls: denoiser calls that fall in each stage.
        macs: MACs executed in each stage.
        dense: MACs of the same calls run dense.
    """

    calls: tuple[int, ...]
    macs: tuple[int, ...]
    dense: int

    @property
    def total(self) -> int:
        """MACs of all stages."""
        return sum(self.macs)

    @property
    def share(self) -> float:
        """Executed MACs over dense MACs."""
        return self.total / self.dense


def executed_cost(schedule: StageSchedule, taus: Sequence[float], macs: Mapping[float, int]) -> ExecutedCost:
    """Cost of `schedule` for denoiser calls at noise levels `taus`.

    Args:
        schedule: the schedule.
        taus: the noise level of each denoiser call that the sampler makes.
        macs: sparsity -> MACs of one forward of one sample; must hold 0 and every level of the schedule.
    """
    calls = [0] * len(schedule.stages)
    for tau in taus:
        calls[schedule.stage_of(tau)] += 1
    spent = tuple(n * macs[level] for n, level in zip(calls, schedule.levels, strict=True))
    return ExecutedCost(tuple(calls), spent, len(taus) * macs[0.0])
