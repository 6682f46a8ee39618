"""Plans as they really run: by the sampler's own solver, against the dense model on the fine grid."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...host import Host, sample
from ...runtime import StagePruner
from ...schedule import StageSchedule
from ..sampling import Sampling


class Runs:
    """Reference samples of some probes, and how far schedules that list their steps end from them.

    Args:
        sampling: the pipeline with the probes.
        pruner: the bank on its denoiser, dense; left so.
        points: steps of the reference.
        on_run: called after every run of a schedule (for progress).
    """

    def __init__(
        self, sampling: Sampling, pruner: StagePruner, points: int, on_run: Callable[[], object] = lambda: None
    ) -> None:
        self.sampling, self.pruner, self.on_run = sampling, pruner, on_run
        self.conditions = sampling.host.encode(sampling.prompts)
        self.seeds = range(sampling.seed, sampling.seed + len(sampling.prompts))
        self.reference = self._finals(sampling.host, points)
        self.known: dict[StageSchedule, float] = {}

    def error(self, schedule: StageSchedule) -> float:
        """Mean squared error of the final latents; may not be finite."""
        if schedule not in self.known:
            taus, dense = schedule.taus or (), self.pruner.schedule
            self.pruner.schedule = schedule
            try:
                made = self._finals(self.sampling.host.visiting(taus), len(taus))
            finally:
                self.pruner.schedule = dense
            self.known[schedule] = float((made - self.reference).square().mean())
            self.on_run()
        return self.known[schedule]

    def _finals(self, host: Host, steps: int) -> Tensor:
        sampling = self.sampling
        latents = sample(host, self.conditions, self.seeds, steps, sampling.guidance, sampling.batch_size)
        return latents.double()
