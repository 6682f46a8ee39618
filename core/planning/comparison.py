"""What a comparison of strategies found."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AllocationError
from ..schedule import StageSchedule


@dataclass(frozen=True)
class Point:
    """One strategy under one budget.

    Args:
        strategy: its name.
        target: the budget's share of the dense cost.
        spent: cost over that of the dense run, in the target's unit.
        steps: sampling steps that it makes.
        error: the fitness against dense samples on a fine grid, on seeds that no strategy has seen.
        standard_error: of it, over seeds.
        schedule: what it chose; None is dense.
    """

    strategy: str
    target: float
    spent: float
    steps: int
    error: float
    standard_error: float
    schedule: StageSchedule | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Args:
        points: by budget, then strategy.
        steps: of the dense run that budgets are shares of.
        reference_steps: of the dense run that errors are to.
        dense: error of the dense run of `steps` itself.
        probes: samples that errors are means over.
        unit: what budgets count in.
        fitness: what `error` is.

    Example:
        >>> print(stageprune.compare(pipe, bank, targets=[0.8, 0.5]))
    """

    points: tuple[Point, ...]
    steps: int
    reference_steps: int
    dense: float
    probes: int
    unit: str
    fitness: str = "latent_mse"

    def best(self, target: float) -> Point:
        """The point of least error under a budget. KeyError if none was measured that is a finite number."""
        points = [point for point in self.points if point.target == target and math.isfinite(point.error)]
        if not points:
            raise KeyError(target)
        return min(points, key=lambda point: point.error)

    def is_best(self, point: Point) -> bool:
        """Whether it is the best of its budget, which has none if no error there is a finite number."""
        return math.isfinite(point.error) and point is self.best(point.target)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        points = [
            {**asdict(point), "schedule": None if point.schedule is None else point.schedule.to_dict()}
            for point in self.points
        ]
        return {**self.__dict__, "points": points}

    @classmethod
    def from_dict(cls, data: Any) -> Comparison:
        """Inverse of `to_dict`. AllocationError if it is something else."""
        try:
            points = [
                Point(
                    **{
                        **point,
                        "schedule": None if point["schedule"] is None else StageSchedule.from_dict(point["schedule"]),
                    }
                )
                for point in data["points"]
            ]
            return cls(**{**data, "points": tuple(points)})
        except (KeyError, TypeError) as error:
            raise AllocationError(f"the data are no comparison, or one of another version: {error}.") from None

    def to_json(self) -> str:
        """Text that `from_dict(json.loads(...))` reads back."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def __str__(self) -> str:
        lines = [
            f"{self.fitness} against {self.reference_steps} dense steps, {self.probes} probes; budgets are shares of "
            f"the {self.unit} of {self.steps} dense steps, which by themselves have {self.dense:.2e}",
            "  target  strategy       spent  steps      error",
        ]
        for point in self.points:
            mark = "  best" if self.is_best(point) else ""
            error = f"{point.error:.2e} ± {point.standard_error:.0e}" if math.isfinite(point.error) else "not finite"
            lines.append(
                f"  {point.target:>6.3f}  {point.strategy:<13}  {point.spent:.3f}  {point.steps:>5}  {error}{mark}"
            )
        return "\n".join(lines)
