"""Speed and memory: dense and pruned forwards interleaved, medians, beside what the MACs promise."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .. import progress
from ..environment import device_name
from ..groups import family_of
from ..host import InputSize, TauReader
from ..pruning import Bank
from ..runtime import StagePruner, resident_bytes, uniform_on
from ..schedule import StageSchedule


@dataclass(frozen=True)
class LevelTiming:
    """One level, measured.

    Args:
        sparsity: the level.
        milliseconds: median time of a forward, in the noisiest stage of a bank that distinguishes stages.
        speedup: median over rounds of dense time / this level's time in the same round.
        ideal: dense MACs / this level's MACs.
        efficiency: speedup / ideal.
        macs: MACs of one sample's forward.
        bytes: device memory of a denoiser that runs this level alone, measured.
    """

    sparsity: float
    milliseconds: float
    speedup: float
    ideal: float
    efficiency: float
    macs: int
    bytes: int


@dataclass(frozen=True)
class Benchmark:
    """Timings of a bank's levels and of its switches.

    Args:
        levels: one entry a level, dense first.
        switch_milliseconds: median time to switch between two levels.
        dense_bytes: memory of the dense denoiser.
        all_bytes: memory with every timed level resident.
        rounds: measured rounds; each runs every level once.
        batch: samples of a forward.
        environment: machine and versions.
    """

    levels: tuple[LevelTiming, ...]
    switch_milliseconds: float
    dense_bytes: int
    all_bytes: int
    rounds: int
    batch: int
    environment: Mapping[str, Any]

    def switch_share(self, calls: int = 20, switches: int = 5) -> float:
        """Share of an image of so many dense denoiser calls that so many switches take."""
        return switches * self.switch_milliseconds / (calls * self.levels[0].milliseconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "switch_share_of_a_20_step_image": self.switch_share()}

    def __str__(self) -> str:
        machine = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        lines = [f"batch {self.batch}, {self.rounds} interleaved rounds, medians; {machine}"]
        lines.append("sparsity        ms  speed-up  MAC-ideal  measured/ideal  memory MiB  x dense")
        for row in self.levels:
            lines.append(
                f"{row.sparsity:>8.3f}  {row.milliseconds:>8.2f}  {row.speedup:>8.3f}  {row.ideal:>9.3f}  "
                f"{row.efficiency:>14.3f}  {row.bytes / 2**20:>10.1f}  {row.bytes / self.dense_bytes:>7.3f}"
            )
        lines.append(
            f"all levels resident: {self.all_bytes / 2**20:.1f} MiB = {self.all_bytes / self.dense_bytes:.3f} x "
            f"dense; a switch takes {self.switch_milliseconds:.3f} ms, 5 of them {self.switch_share():.3%} of a "
            "20-step image"
        )
        return "\n".join(lines)


@torch.no_grad()
def benchmark(
    denoiser: nn.Module,
    bank: Bank,
    read_tau: TauReader,
    *,
    sparsities: Sequence[float] | None = None,
    batch: int = 4,
    rounds: int = 5,
    warmup: int = 1,
    size: InputSize | None = None,
) -> Benchmark:
    """Time the forwards of a bank's levels, each round running all of them in turn.

    Args:
        denoiser: the dense denoiser; restored at the end.
        bank: made for it.
        read_tau: the host's reader.
        sparsities: levels to time; all of the bank by default. Dense is always among them.
        batch: samples of a forward.
        rounds: measured rounds.
        warmup: rounds that are not counted.
        size: of the calls; the family's default by default.
    """
    chosen = sorted({0.0, *(sparsities if sparsities is not None else bank.sparsities)})
    inputs = family_of(denoiser).example_inputs(denoiser, batch=batch, size=size)
    dense_bytes = resident_bytes(denoiser)
    alone = {sparsity: _bytes_alone(denoiser, bank, read_tau, sparsity) for sparsity in chosen}
    variants = [(bank.level_of(sparsity), stage) for sparsity in chosen for stage in range(bank.stages)]
    pruner = StagePruner(denoiser, bank, uniform_on(bank, 0.0), read_tau, variants, size=size)
    try:
        all_bytes = resident_bytes(denoiser)
        macs = bank.macs(pruner.cost)
        times: dict[float, list[float]] = {sparsity: [] for sparsity in chosen}
        with progress.bar((rounds + warmup) * len(chosen), "timing forwards", "forward") as bar:
            for index in range(rounds + warmup):
                for sparsity in chosen:
                    pruner.schedule = uniform_on(bank, sparsity)
                    pruner.switch(0)
                    seconds = timed(lambda: denoiser(**inputs), denoiser)
                    if index >= warmup:
                        times[sparsity].append(seconds)
                    bar.update(1)
        switch = _switch_seconds(pruner, chosen[-1], denoiser)
    finally:
        pruner.detach()
    rows = tuple(
        _row(sparsity, times[0.0], times[sparsity], macs[0.0], macs[sparsity], alone[sparsity]) for sparsity in chosen
    )
    return Benchmark(rows, switch * 1e3, dense_bytes, all_bytes, rounds, batch, environment(denoiser))


def timed(run: Callable[[], Any], denoiser: nn.Module) -> float:
    """Seconds that `run` takes, the device's queue emptied before and after."""
    device = next(denoiser.parameters()).device
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait for the device's queue, where it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(denoiser: nn.Module) -> dict[str, Any]:
    """Device, threads, dtype and versions that a figure needs beside it."""
    weight = next(denoiser.parameters())
    facts: dict[str, Any] = {"device": device_name(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
    if weight.device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    return {**facts, "torch": torch.__version__, "python": platform.python_version()}


def _bytes_alone(denoiser: nn.Module, bank: Bank, read_tau: TauReader, sparsity: float) -> int:
    pruner = StagePruner(denoiser, bank, uniform_on(bank, sparsity), read_tau, trim=True)
    try:
        return resident_bytes(denoiser)
    finally:
        pruner.detach()


def _switch_seconds(pruner: StagePruner, sparsity: float, denoiser: nn.Module, repeats: int = 50) -> float:
    """Median time of one switch, dense to `sparsity` and back, within the noisiest of the bank's stages."""
    stages, edges = pruner.bank.stages, pruner.bank.edges
    boundaries = [(1 + edges[1]) / 2, *edges[1:-1]]
    pruner.schedule = StageSchedule.from_levels([0.0, *[sparsity] * stages], boundaries)
    times = []
    for index in range(2 * repeats):
        times.append(timed(lambda stage=index % 2: pruner.switch(stage), denoiser))  # type: ignore[misc]
    return statistics.median(times)


def _row(
    sparsity: float, dense: Sequence[float], times: Sequence[float], dense_macs: int, macs: int, bytes_alone: int
) -> LevelTiming:
    speedup = statistics.median(d / t for d, t in zip(dense, times, strict=True))
    ideal = dense_macs / macs
    return LevelTiming(sparsity, statistics.median(times) * 1e3, speedup, ideal, speedup / ideal, macs, bytes_alone)
