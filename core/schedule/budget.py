"""Cost of a schedule over the steps that a sampler really executes. A stage that no step visits costs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import AllocationError
from .schedule import StageSchedule

_SHARES: dict[str, Callable[[float], float]] = {
    "macs": lambda share: share,
    "latency": lambda share: share,
    "speedup": lambda factor: 1 / factor if factor else math.inf,
    "sparsity": lambda sparsity: 1 - sparsity,
}
"""Kind of target -> its share of the dense cost."""


@dataclass(frozen=True)
class Target:
    """What a schedule may cost over the steps that the sampler executes.

    Args:
        kind: `macs`, a share of the dense MACs; `latency`, a share of the dense time; `speedup`, the dense time over
            it; `sparsity`, the mean over the executed steps of the levels' sparsities, as papers count it.
        value: what was asked for, in the kind's own terms.

    Example:
        >>> Target.parse("macs:0.67"), Target.parse("speedup:1.25").share
        (Target(kind='macs', value=0.67), 0.8)
    """

    kind: str
    value: float

    @property
    def share(self) -> float:
        """Of the dense cost: of MACs, of time, or of units."""
        return _SHARES[self.kind](self.value)

    @classmethod
    def parse(cls, text: str | float | Target) -> Target:
        """Read `macs:0.67`, a bare number that means the same, `latency:0.77`, `speedup:1.3` or `sparsity:0.3`."""
        if isinstance(text, Target):
            return text
        match = re.fullmatch(rf"(?:({'|'.join(_SHARES)}):)?([0-9]*\.?[0-9]+)", str(text).strip())
        found = cls(match.group(1) or "macs", float(match.group(2))) if match else None
        if found is None or not 0 < found.share <= 1:
            raise AllocationError(
                f"`target` must look like 'macs:0.67' with a share in (0, 1], got {text!r}. Others are 'latency:0.77' "
                "(a share of the time), 'speedup:1.3' (at least 1) and 'sparsity:0.3' (in [0, 1))."
            )
        return found

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"


@dataclass(frozen=True)
class ExecutedCost:
    """Denoiser calls and MACs of each stage, for one sample of one image.

    Args:
        calls: denoiser calls that fall in each stage.
        macs: MACs executed in each stage.
        dense: MACs of the dense run that it is compared with.
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


def executed_calls(schedule: StageSchedule, taus: Sequence[float]) -> tuple[int, ...]:
    """How many denoiser calls, at noise levels `taus`, fall in each stage."""
    calls = [0] * len(schedule.stages)
    for tau in taus:
        calls[schedule.stage_of(tau)] += 1
    return tuple(calls)


def executed_cost(
    schedule: StageSchedule, taus: Sequence[float], macs: Mapping[float, int], dense_calls: int | None = None
) -> ExecutedCost:
    """Cost of `schedule` for denoiser calls at noise levels `taus`.

    Args:
        schedule: the schedule.
        taus: the noise level of each denoiser call that the sampler makes.
        macs: sparsity -> MACs of one forward of one sample; must hold 0 and every level of the schedule.
        dense_calls: calls that the dense model would make; as many by default.
    """
    calls = executed_calls(schedule, taus)
    spent = tuple(n * macs[level] for n, level in zip(calls, schedule.levels, strict=True))
    return ExecutedCost(calls, spent, (dense_calls or len(taus)) * macs[0.0])
