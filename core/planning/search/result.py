"""What a search found, how it went, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...errors import SearchError
from ...schedule import ExecutedCost, StageSchedule, Target
from ..costs import UNITS
from .settings import Round, SearchSettings


@dataclass(frozen=True)
class Cost:
    """Denoiser steps: calls of the denoiser for one probe, guidance included. What an interrupted session had run since
    its last checkpoint is not known.

    Args:
        start: for the initial pool: the error table of `measured`, and its runs.
        references: dense trajectories, and the check that states may be shared.
        search: candidates on the search probes.
        held_out: the finalists on the held-out probes, and their dense trajectories.
        repeated: run again by this process, because the search was interrupted or a state was in another process.
        shared: saved, because another candidate had got there.
        stopped: saved, because a candidate was given up.
        seconds: of all sessions.
    """

    start: int = 0
    references: int = 0
    search: int = 0
    held_out: int = 0
    repeated: int = 0
    shared: int = 0
    stopped: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Denoiser steps that were run."""
        return self.start + self.references + self.search + self.held_out + self.repeated

    @property
    def saved(self) -> float:
        """Share of the candidates' steps that did not have to be run."""
        every = self.search + self.shared + self.stopped
        return (self.shared + self.stopped) / every if every else 0.0

    def plus(self, **steps: float) -> Cost:
        """With more of some."""
        return replace(self, **{name: getattr(self, name) + count for name, count in steps.items()})

    def __str__(self) -> str:
        return (
            f"{self.total:,} denoiser steps ({self.start:,} to start from, {self.references:,} dense, {self.search:,} "
            f"searching, {self.held_out:,} on held-out probes, {self.repeated:,} repeated); sharing states saved "
            f"{self.shared:,}, giving up {self.stopped:,} ({self.saved:.0%} of the candidates'); {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Generation:
    """One generation of a search.

    Args:
        evaluated: new candidates.
        survivors: levels of the survivors, best first.
        fitness: theirs, on all search probes.
        steps: denoiser steps of all candidates until then.
    """

    evaluated: int
    survivors: tuple[tuple[float, ...], ...]
    fitness: tuple[float, ...]
    steps: int

    @property
    def best(self) -> float:
        """The best fitness."""
        return self.fitness[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Generation:
        """Inverse of `asdict`, of JSON."""
        survivors = tuple(tuple(levels) for levels in data["survivors"])
        return cls(data["evaluated"], survivors, tuple(data["fitness"]), data["steps"])


@dataclass(frozen=True)
class Finalist:
    """A schedule that was run on held-out probes.

    Args:
        levels: of its stages.
        search: its fitness on the search probes.
        held_out: on the held-out probes.
    """

    levels: tuple[float, ...]
    search: float
    held_out: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finalist:
        """Inverse of `asdict`, of JSON."""
        return cls(tuple(data["levels"]), data["search"], data["held_out"])


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Args:
        schedule: the winner.
        fitness: name of what was minimised.
        target: the budget.
        executed: its MACs over the sampler's steps.
        spent: its cost over the dense one, in the target's unit.
        finalists: what was run on held-out probes, best first; the first is the winner.
        start: fitness on the search probes of the schedule that a warm start began with; None without one.
        dense: fitness of the dense model on the search probes.
        history: its generations.
        reason: why it ended: `generations`, `patience`, or `exhausted` when no schedule was left to try.
        cost: in denoiser steps.
        settings: of the evolution.

    Example:
        >>> result = stageprune.search(pipe, bank, target="macs:0.67")
        >>> print(result)
        >>> stageprune.Bundle(bank, result.schedule).save("out/bundle")
    """

    schedule: StageSchedule
    fitness: str
    target: Target
    executed: ExecutedCost
    spent: float
    finalists: tuple[Finalist, ...]
    start: float | None
    dense: float
    history: tuple[Generation, ...]
    reason: str
    cost: Cost
    settings: SearchSettings = field(default_factory=SearchSettings)

    @property
    def best(self) -> Finalist:
        """The winner."""
        return self.finalists[0]

    @property
    def evaluations(self) -> int:
        """Candidates that were tried."""
        return sum(generation.evaluated for generation in self.history)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and reports."""
        return {
            "schedule": self.schedule.to_dict(),
            "fitness": self.fitness,
            "target": str(self.target),
            "spent": self.spent,
            "executed": asdict(self.executed),
            "macs_share": self.executed.share,
            "finalists": [asdict(finalist) for finalist in self.finalists],
            "start": self.start,
            "dense": self.dense,
            "history": [asdict(generation) for generation in self.history],
            "reason": self.reason,
            "cost": asdict(self.cost),
            "settings": asdict(self.settings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> SearchResult:
        """Inverse of `to_dict`, of JSON. SearchError if it is something else."""
        try:
            executed, settings = data["executed"], data["settings"]
            rounds = tuple(Round(**each) for each in settings["rounds"])
            return cls(
                schedule=StageSchedule.from_dict(data["schedule"]),
                fitness=data["fitness"],
                target=Target.parse(data["target"]),
                executed=ExecutedCost(tuple(executed["calls"]), tuple(executed["macs"]), executed["dense"]),
                spent=data["spent"],
                finalists=tuple(Finalist.from_dict(each) for each in data["finalists"]),
                start=data["start"],
                dense=data["dense"],
                history=tuple(Generation.from_dict(each) for each in data["history"]),
                reason=data["reason"],
                cost=Cost(**data["cost"]),
                settings=SearchSettings(**{**settings, "rounds": rounds}),
            )
        except (KeyError, TypeError) as error:
            raise SearchError(f"the data are no result of a search, or of another version: {error}.") from None

    def __str__(self) -> str:
        unit = UNITS[self.target.kind]
        lines = [
            str(self.schedule),
            f"  target {self.target} ({self.target.share:.3f} of the dense {unit.name}), {unit.verb} {self.spent:.3f}; "
            f"executes {self.executed.share:.3f} of the dense MACs",
            f"  {self.fitness} {self.best.search:.3e} on the search probes, {self.best.held_out:.3e} on held-out ones"
            + ("" if self.start is None else f"; began at {self.start:.3e}"),
        ]
        for finalist in self.finalists[1:]:
            levels = ", ".join(f"{level:g}" for level in finalist.levels)
            lines.append(f"  [{levels}]: {finalist.search:.3e}, held-out {finalist.held_out:.3e}")
        lines.append(
            f"  {len(self.history)} generations, {self.evaluations} candidates (ended: {self.reason}); {self.cost}"
        )
        return "\n".join(lines)
