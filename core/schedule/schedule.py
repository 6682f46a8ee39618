"""Stages of the denoising trajectory and the schedule they form.

Stages live on tau, the noise level in [0, 1] (1 = pure noise), not on steps: the same schedule then serves any number
of steps, any sampler, and image-to-image runs that begin in the middle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import ScheduleError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Stage:
    """An interval `low <= tau < high` that runs at one sparsity (tau = 1 belongs to the stage that ends there).

    Args:
        high: the noisier end, in (0, 1].
        low: the cleaner end, in [0, 1).
        sparsity: the level, named by the share of units that it removes, in [0, 1); 0 is dense.
    """

    high: float
    low: float
    sparsity: float

    def __post_init__(self) -> None:
        for name in ("high", "low", "sparsity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise ScheduleError(f"stage `{name}` must be a finite number, got {value!r}.")
            object.__setattr__(self, name, float(value))
        # A sparsity is the name of a level: 0.1 + 0.2 must find the level 0.3.
        object.__setattr__(self, "sparsity", round(self.sparsity, 6))
        if not 0 <= self.low < self.high <= 1:
            raise ScheduleError(f"a stage needs 0 <= low < high <= 1, got low={self.low}, high={self.high}.")
        if not 0 <= self.sparsity < 1:
            raise ScheduleError(f"stage `sparsity` must be in [0, 1), got {self.sparsity}.")


@dataclass(frozen=True)
class StageSchedule:
    """Stages that cover [0, 1], noisiest first: the order in which a sampler meets them.

    Args:
        stages: the stages.
        taus: noise level of each sampling step, falling, where the steps were chosen together with the levels; None
            leaves them to the sampler.
        planned_steps: number of sampling steps that its budget was met for; None if it was for no number. It runs any.
            Schedules that differ in this alone are equal.

    Example:
        >>> schedule = StageSchedule.from_levels([0, 0, 0.5, 0.7, 0.5])
        >>> schedule.stage_of(0.9)
        0
        >>> StageSchedule.from_json(schedule.to_json()) == schedule
        True
    """

    stages: tuple[Stage, ...]
    taus: tuple[float, ...] | None = None
    planned_steps: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.taus is not None:
            object.__setattr__(self, "taus", _falling(self.taus))
        planned = self.planned_steps
        if planned is not None and (not isinstance(planned, int) or isinstance(planned, bool) or planned < 1):
            raise ScheduleError(f"`planned_steps` of a schedule must be a number of steps, got {planned!r}.")
        if not self.stages:
            raise ScheduleError("a schedule needs at least one stage.")
        if self.stages[0].high != 1:
            raise ScheduleError(
                f"the stages must cover [0, 1]: the first one must begin at tau = 1, got {self.stages[0].high}."
            )
        if self.stages[-1].low != 0:
            raise ScheduleError(
                f"the stages must cover [0, 1]: the last one must end at tau = 0, got {self.stages[-1].low}."
            )
        for noisier, cleaner in pairwise(self.stages):
            if noisier.low < cleaner.high:
                raise ScheduleError(
                    f"stages overlap: one ends at tau = {noisier.low}, the next begins at {cleaner.high}. List the "
                    "stages from tau = 1 down to 0, each beginning where the one before it ends."
                )
            if noisier.low > cleaner.high:
                raise ScheduleError(
                    f"the stages must cover [0, 1]: nothing covers tau from {cleaner.high} to {noisier.low}."
                )

    @classmethod
    def from_levels(cls, levels: Iterable[float], boundaries: Sequence[float] | None = None) -> StageSchedule:
        """Stages from their sparsities, noisiest first.

        Args:
            levels: sparsity of each stage, in [0, 1).
            boundaries: the inner boundaries in tau, falling (one fewer than levels); equal stages by default.
        """
        values = list(levels)
        count = len(values)
        if boundaries is None:
            edges = [(count - i) / count for i in range(count + 1)] if count else []
        else:
            if len(boundaries) != count - 1:
                raise ScheduleError(f"{count} levels need {count - 1} inner `boundaries`, got {len(boundaries)}.")
            edges = [1.0, *boundaries, 0.0]
        return cls(tuple(Stage(*pair, value) for pair, value in zip(pairwise(edges), values, strict=True)))

    @classmethod
    def uniform(cls, sparsity: float) -> StageSchedule:
        """One stage: the same sparsity at every noise level."""
        return cls.from_levels([sparsity])

    @property
    def levels(self) -> list[float]:
        """Sparsity of each stage, noisiest first."""
        return [stage.sparsity for stage in self.stages]

    @property
    def edges(self) -> list[float]:
        """All boundaries in tau, from 1 down to 0."""
        return [1.0, *(stage.low for stage in self.stages)]

    def stage_of(self, tau: float) -> int:
        """Index of the stage that `tau` falls in. Values a rounding error outside [0, 1] belong to the end stages."""
        for index, stage in enumerate(self.stages):
            if tau >= stage.low:
                return index
        return len(self.stages) - 1

    def with_levels(self, levels: Sequence[float]) -> StageSchedule:
        """The same stages, and steps, at other sparsities."""
        return replace(StageSchedule.from_levels(levels, self.edges[1:-1]), taus=self.taus)

    def with_taus(self, taus: Sequence[float] | None) -> StageSchedule:
        """The same stages with steps of its own, or with the sampler's."""
        return replace(self, taus=None if taus is None else tuple(taus))

    def planned_for(self, steps: int) -> StageSchedule:
        """The same, with a budget that was met for this number of sampling steps."""
        return replace(self, planned_steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"stages": [{"high": 1.0, "low": 0.8, "sparsity": 0.5}, ...]}`, and `"taus"` and
        `"planned_steps"` if it has them.
        """
        data: dict[str, Any] = {"stages": [{"high": s.high, "low": s.low, "sparsity": s.sparsity} for s in self.stages]}
        if self.taus is not None:
            data["taus"] = list(self.taus)
        if self.planned_steps is not None:
            data["planned_steps"] = self.planned_steps
        return data

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal schedule."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> StageSchedule:
        """Inverse of `to_dict`. ScheduleError names the stage and key that is wrong."""
        stages = data.get("stages") if isinstance(data, dict) else None
        if not isinstance(stages, list):
            raise ScheduleError(f"a schedule must be an object with a list `stages`, got {type(data).__name__}.")
        wanted = {"high", "low", "sparsity"}
        for index, stage in enumerate(stages):
            if not isinstance(stage, dict) or set(stage) != wanted:
                got = sorted(stage) if isinstance(stage, dict) else stage
                raise ScheduleError(f"stages[{index}] must have the keys {sorted(wanted)}, got {got!r}.")
        taus = data.get("taus")
        if taus is not None and not isinstance(taus, list):
            raise ScheduleError(f"`taus` of a schedule must be a list of noise levels, got {type(taus).__name__}.")
        schedule = cls(tuple(Stage(**stage) for stage in stages), planned_steps=data.get("planned_steps"))
        return schedule.with_taus(taus)

    @classmethod
    def from_json(cls, text: str) -> StageSchedule:
        """Inverse of `to_json`."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ScheduleError(f"the schedule is not valid JSON: {error}") from None

    def draw(self, width: int = 60) -> str:
        """The schedule over the noise axis as text: each column's height is the share of units that stays."""
        bars = " ▁▂▃▄▅▆▇█"
        columns = [1 - (i + 0.5) / width for i in range(width)]
        kept = [1 - self.stages[self.stage_of(tau)].sparsity for tau in columns]
        return "".join(bars[max(1, round(share * 8))] for share in kept)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw sparsity over tau with matplotlib (extra `report`); noise falls from left to right, as sampling goes."""
        import matplotlib.pyplot as plt  # noqa: PLC0415  (only pictures need it)

        axes = axes or plt.subplots(figsize=(6, 2.2), layout="constrained")[1]
        for stage in self.stages:
            axes.bar(stage.high, stage.sparsity, stage.low - stage.high, align="edge", alpha=0.75, edgecolor="white")
            middle = (stage.high + stage.low) / 2
            axes.annotate(f"{stage.sparsity:.0%}", (middle, stage.sparsity), ha="center", va="bottom", fontsize=8)
        axes.set(xlim=(1, 0), ylim=(0, 1), xlabel="noise level tau (sampling runs to the right)", ylabel="sparsity")
        return axes

    def __str__(self) -> str:
        lines = [f"StageSchedule of {len(self.stages)} stages (noisiest first; bar height = share of units kept)"]
        lines += [f"  tau 1 |{self.draw()}| 0"]
        for index, stage in enumerate(self.stages):
            lines.append(f"  stage {index}: tau {stage.high:.3f} to {stage.low:.3f}, sparsity {stage.sparsity:.3f}")
        if self.taus is not None:
            lines.append(f"  {len(self.taus)} steps at tau {', '.join(f'{tau:.3f}' for tau in self.taus)}")
        elif self.planned_steps is not None:
            lines.append(f"  planned for {self.planned_steps} steps")
        return "\n".join(lines)


def _falling(taus: Sequence[float]) -> tuple[float, ...]:
    """The noise levels of steps, checked."""
    numbers = [tau for tau in taus if not isinstance(tau, bool) and isinstance(tau, int | float) and 0 <= tau <= 1]
    if not taus or len(numbers) != len(taus) or any(noisier <= cleaner for noisier, cleaner in pairwise(numbers)):
        raise ScheduleError(f"`taus` of a schedule must fall within [0, 1], one a step, got {list(taus)!r:.200}.")
    return tuple(float(tau) for tau in numbers)
