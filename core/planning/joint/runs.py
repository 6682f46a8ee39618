"""Schedules as they really run: by the sampler's own solver, beside the dense model on a fine grid."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ...host import Host, sample
from ...runtime import StagePruner
from ...schedule import StageSchedule
from ..fitness import Fitness, Outcome
from ..sampling import Sampling, check_dense


class Runs:
    """Reference samples of some probes, if the fitness looks at them, and how good others are beside them.

    Args:
        sampling: the pipeline with the probes.
        pruner: the bank on its denoiser, dense; left so.
        points: steps of the reference.
        fitness: what is less the better a schedule is.
        on_run: called after every run (for progress).

    Raises:
        AllocationError: the reference samples are not finite.
    """

    def __init__(
        self,
        sampling: Sampling,
        pruner: StagePruner,
        points: int,
        fitness: Fitness,
        on_run: Callable[[], object] = lambda: None,
    ) -> None:
        self.sampling, self.pruner, self.fitness, self.on_run = sampling, pruner, fitness, on_run
        self.conditions = sampling.host.encode(sampling.prompts)
        self.reference = self._outcome(sampling.host, points) if fitness.paired else None
        if self.reference:
            check_dense(self.reference.latents, sampling.guidance)
        self._known: dict[StageSchedule, float] = {}

    def value(self, schedule: StageSchedule) -> float:
        """The fitness of a schedule, which is run once however often it is asked for; infinite if it is no number."""
        if schedule not in self._known:
            found = self.fitness.reduce(self.statistics(schedule))
            self._known[schedule] = found if math.isfinite(found) else math.inf
        return self._known[schedule]

    def statistics(self, schedule: StageSchedule | None, steps: int | None = None) -> Tensor:
        """What the fitness keeps of each probe, shape (probes, numbers).

        Args:
            schedule: None is dense.
            steps: by default those that the schedule lists, or else the sampling's.
        """
        host, dense = self.sampling.host, self.pruner.schedule
        if schedule is not None:
            self.pruner.schedule = schedule
            if schedule.taus is not None:
                host, steps = host.visiting(schedule.taus), len(schedule.taus)
        try:
            made = self._outcome(host, steps or self.sampling.steps)
        finally:
            self.pruner.schedule = dense
        self.on_run()
        return self.fitness.statistics(made, self.reference or made)

    def _outcome(self, host: Host, steps: int) -> Outcome:
        sampling = self.sampling
        seeds = range(sampling.seed, sampling.seed + len(sampling.prompts))
        latents = sample(host, self.conditions, seeds, steps, sampling.guidance, sampling.batch_size)
        return Outcome(latents, sampling.prompts, self.conditions, sampling.decode)
