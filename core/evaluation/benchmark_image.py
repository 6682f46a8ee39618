"""Whole images, dense and pruned in turn: what each stage and each image takes, beside what the MACs promise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import progress
from ..bundle import Bundle
from ..errors import ScheduleError
from ..host import Host, Prompt
from ..planning.probes import stage_starts
from ..runtime import StagePruner
from ..schedule import StageSchedule, executed_cost
from .benchmark import environment, synchronise


@dataclass(frozen=True)
class StageTiming:
    """One stage, or a whole image: median milliseconds, dense and pruned, and the speed-ups measured and promised.

    Args:
        calls: denoiser calls.
        dense_ms: median time dense.
        pruned_ms: median time pruned.
        speedup: median over rounds of dense time / pruned time of the same round.
        ideal: dense MACs / pruned MACs.
    """

    calls: int
    dense_ms: float
    pruned_ms: float
    speedup: float
    ideal: float


@dataclass(frozen=True)
class ImageBenchmark:
    """Timings of a schedule. `image` is the whole trajectory without decoding; sampler and switches included.

    Args:
        stages: one entry a stage, noisiest first.
        image: all stages together.
        batch: samples that run together.
        rounds: measured rounds.
        steps: sampling steps.
        environment: machine and versions.
    """

    stages: tuple[StageTiming, ...]
    image: StageTiming
    batch: int
    rounds: int
    steps: int
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.steps} steps, batch {self.batch}, {self.rounds} interleaved rounds, medians"]
        lines.append("  stage  calls    dense ms   pruned ms  speed-up  MAC-ideal")
        names = [*map(str, range(len(self.stages))), "image"]
        for name, row in zip(names, (*self.stages, self.image), strict=True):
            lines.append(
                f"{name:>7}  {row.calls:>5}  {row.dense_ms:>10.1f}  {row.pruned_ms:>10.1f}  {row.speedup:>8.3f}  "
                f"{row.ideal:>9.3f}"
            )
        return "\n".join(lines)


@torch.no_grad()
def benchmark_image(
    host: Host, bundle: Bundle, prompts: Sequence[Prompt], *, steps: int, guidance: float, rounds: int = 5
) -> ImageBenchmark:
    """Time the bundle's schedule against dense, stage by stage, each round running both.

    Args:
        host: the pipeline, dense; restored at the end.
        bundle: with a schedule that the steps visit in every stage.
        prompts: one batch.
        steps: sampling steps; those that the schedule lists, if it does, dense and pruned.
        guidance: guidance scale.
        rounds: measured rounds; one more goes before them, uncounted.
    """
    if bundle.schedule is None:
        raise ScheduleError("the bundle has no schedule to time; make one with stageprune.allocate.")
    schedule, bank = bundle.schedule, bundle.bank
    if schedule.taus is not None:
        host, steps = host.visiting(schedule.taus), len(schedule.taus)
    taus = host.taus(steps)
    dense = schedule.with_levels([0.0] * len(schedule.stages))
    ends = [*stage_starts(schedule, taus, steps)[1:], len(taus)]
    conditions, device = host.encode(prompts), next(host.denoiser.parameters()).device
    variants = [*bank.bind(dense), *bank.bind(schedule)]
    pruner = StagePruner(host.denoiser, bank, schedule, host.tau_reader, variants, size=host.input_size)
    times: dict[str, list[list[float]]] = {"dense": [], "pruned": []}

    def run(chosen: StageSchedule) -> list[float]:
        pruner.schedule = chosen
        state, seconds = host.start(range(len(prompts)), steps), []
        for end in ends:
            synchronise(device)
            started = time.perf_counter()
            state = host.advance(state, conditions, guidance, end)
            synchronise(device)
            seconds.append((time.perf_counter() - started) * 1e3)
        return seconds

    try:
        with progress.bar(rounds + 1, "timing images", "round") as bar:
            for index in range(rounds + 1):
                for name, chosen in (("dense", dense), ("pruned", schedule)):
                    measured = run(chosen)
                    if index:
                        times[name].append(measured)
                bar.update(1)
        macs = bank.macs(pruner.cost)
    finally:
        pruner.detach()
    calls = executed_cost(schedule, taus, macs).calls
    ideals = [macs[0.0] / macs[level] for level in schedule.levels]
    stages = [
        _timing(calls[i], [row[i] for row in times["dense"]], [row[i] for row in times["pruned"]], ideals[i])
        for i in range(len(ends))
    ]
    share = executed_cost(schedule, taus, macs).share
    image = _timing(len(taus), [sum(row) for row in times["dense"]], [sum(row) for row in times["pruned"]], 1 / share)
    return ImageBenchmark(tuple(stages), image, len(prompts), rounds, steps, environment(host.denoiser))


def _timing(calls: int, dense: Sequence[float], pruned: Sequence[float], ideal: float) -> StageTiming:
    speedup = statistics.median(d / p for d, p in zip(dense, pruned, strict=True))
    return StageTiming(calls, statistics.median(dense), statistics.median(pruned), speedup, ideal)
