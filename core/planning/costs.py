"""What one denoiser call costs at each level, in the unit that a target counts in.

Add a kind of target by its share in `core/schedule/budget.py` and a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import AllocationError
from ..runtime import StagePruner
from ..schedule import StageSchedule, Target, executed_calls
from .latency import relative_times
from .sampling import Sampling

TOLERANCE = 0.005
"""How far, in shares of the dense cost, a schedule may exceed its budget: kept counts are rounded."""

_SCALE = 1_000_000
"""Costs are whole numbers, so that the choice under a budget is exact."""

CallCosts = Callable[[Sampling, StagePruner], Mapping[float, int]]


@dataclass(frozen=True)
class Unit:
    """A unit of cost.

    Args:
        verb: what a schedule does with it, for messages.
        name: of the unit.
        costs: sparsity -> whole cost of one call of one sample.
    """

    verb: str
    name: str
    costs: CallCosts


def macs(_: Sampling, pruner: StagePruner) -> Mapping[float, int]:
    """MACs of one call of one sample."""
    return pruner.bank.macs(pruner.cost)


def nominal(_: Sampling, pruner: StagePruner) -> Mapping[float, int]:
    """1 - sparsity, by the levels' names: how the papers count."""
    return {sparsity: round(_SCALE * (1 - sparsity)) for sparsity in pruner.bank.sparsities}


def time(sampling: Sampling, pruner: StagePruner) -> Mapping[float, int]:
    """Measured time of one call over that of a dense one, on this device and with one image at a time."""
    measured = relative_times(sampling, pruner)
    return {sparsity: round(_SCALE * ratio) for sparsity, ratio in measured.items()}


TIME = Unit("takes", "time", time)
UNITS = {
    "macs": Unit("executes", "MACs", macs),
    "latency": TIME,
    "speedup": TIME,
    "sparsity": Unit("keeps", "units", nominal),
}
"""Kind of target -> its unit."""


@dataclass(frozen=True)
class Budget:
    """A target with the cost of a call at each level.

    Args:
        target: what was asked for.
        costs: sparsity -> cost of one call, in the target's unit; holds 0 and every level.
    """

    target: Target
    costs: Mapping[float, int]

    @classmethod
    def of(cls, target: Target, sampling: Sampling, pruner: StagePruner) -> Budget:
        """Count or measure what each level of the pruner's bank costs."""
        return cls(target, UNITS[target.kind].costs(sampling, pruner))

    @property
    def unit(self) -> Unit:
        """What the target counts in."""
        return UNITS[self.target.kind]

    def limit(self, calls: int) -> int:
        """Largest total cost of a run of `calls` denoiser calls."""
        return int((self.target.share + TOLERANCE) * calls * self.costs[0.0])

    def share(self, schedule: StageSchedule, taus: Sequence[float], dense_calls: int | None = None) -> float:
        """Executed cost of `schedule` over that of so many dense calls; of as many as it makes by default."""
        calls = executed_calls(schedule, taus)
        spent = sum(count * self.costs[level] for count, level in zip(calls, schedule.levels, strict=True))
        return spent / ((dense_calls or len(taus)) * self.costs[0.0])

    def uniform_level(self) -> float:
        """Sparsity of the dearest level that keeps within the budget everywhere. AllocationError if there is none."""
        affordable = [level for level, cost in self.costs.items() if cost <= self.limit(1)]
        if affordable:
            return min(affordable)
        least = min(self.costs.values()) / self.costs[0.0]
        raise AllocationError(
            f"`target` {self.target.value:g} cannot be met: the bank's highest level still {self.unit.verb} "
            f"{least:.3f} of the dense {self.unit.name}. Prune with higher `levels`, or ask for less."
        )
