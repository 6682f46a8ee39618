"""Schedules as they really run: by the sampler's own solver, against the dense model on a fine grid."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...host import Host, sample
from ...runtime import StagePruner
from ...schedule import StageSchedule
from ..sampling import Sampling


class Runs:
    """Reference samples of some probes, and how far others end from them.

    Args:
        sampling: the pipeline with the probes.
        pruner: the bank on its denoiser, dense; left so.
        points: steps of the reference.
        on_run: called after every run (for progress).
    """

    def __init__(
        self, sampling: Sampling, pruner: StagePruner, points: int, on_run: Callable[[], object] = lambda: None
    ) -> None:
        self.sampling, self.pruner, self.on_run = sampling, pruner, on_run
        self.conditions = sampling.host.encode(sampling.prompts)
        self.reference = self._finals(sampling.host, points)
        self._known: dict[StageSchedule, float] = {}

    def error(self, schedule: StageSchedule) -> float:
        """Mean over probes, of a schedule that is run once however often it is asked for; may not be finite."""
        if schedule not in self._known:
            self._known[schedule] = float(self.errors(schedule).mean())
        return self._known[schedule]

    def errors(self, schedule: StageSchedule | None, steps: int | None = None) -> Tensor:
        """Squared error of each probe's final latents, shape (probes,).

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
            made = self._finals(host, steps or self.sampling.steps)
        finally:
            self.pruner.schedule = dense
        self.on_run()
        return (made - self.reference).square().flatten(1).mean(1)

    def _finals(self, host: Host, steps: int) -> Tensor:
        sampling = self.sampling
        seeds = range(sampling.seed, sampling.seed + len(sampling.prompts))
        return sample(host, self.conditions, seeds, steps, sampling.guidance, sampling.batch_size).double()
