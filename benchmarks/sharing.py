"""Orders and consumers: shared by all stages, or one per stage. Error, memory, switch time; also with few prompts."""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import Tensor

import stageprune
from common import GUIDANCE, LEVELS, MULTIPLE, Demo, mean_and_spread, write_results
from stageprune.core.calibration import Calibration
from stageprune.core.pruning import Bank
from stageprune.core.runtime import StagePruner, applied, resident_bytes
from stageprune.core.schedule import StageSchedule

SHARINGS = (("shared", "shared"), ("shared", "stage"), ("stage", "stage"))
TESTED = (0.205, 0.335, 0.51)
STEPS, COUNT, SETS = 20, 20, 3


def main() -> None:
    """Compare the three at uniform levels and with their own measured schedule; write `results/sharing.json`."""
    demo = Demo()
    seeds = [list(range(200_000 + i * COUNT, 200_000 + (i + 1) * COUNT)) for i in range(SETS)]
    dense = [demo.sample(part, STEPS) for part in seeds]
    rows = []
    for prompts in (100, 20, 5):
        calibration = stageprune.calibrate(demo.pipe, demo.labels(prompts), steps=STEPS, guidance=GUIDANCE, stages=5)
        for order, consumers in SHARINGS:
            row = measure(demo, calibration, order, consumers, seeds, dense, schedule=prompts == 100)
            rows.append({"prompts": prompts, **row})
            print(describe(rows[-1]), flush=True)
    write_results("sharing", {"levels": LEVELS, "images": COUNT, "sets": SETS, "steps": STEPS, "rows": rows})


def measure(
    demo: Demo,
    calibration: Calibration,
    order: Any,
    consumers: Any,
    seeds: list[list[int]],
    dense: list[Tensor],
    schedule: bool,
) -> dict[str, Any]:
    """One sharing: errors at uniform levels, its measured schedule, memory and switch time of that schedule."""
    started = time.perf_counter()
    bank = stageprune.prune(demo.pipe, calibration, levels=LEVELS, multiple=MULTIPLE, order=order, consumers=consumers)
    row: dict[str, Any] = {"order": order, "consumers": consumers, "prune_seconds": time.perf_counter() - started}
    schedules = {str(level): StageSchedule.from_levels([level] * 5) for level in TESTED}
    if schedule:
        allocation = stageprune.allocate(demo.pipe, bank, target=0.67, steps=STEPS, prompts=demo.labels(20))
        schedules["measured 0.67"] = allocation.schedule
        row |= {"schedule": allocation.schedule.levels, **footprint(demo, bank, allocation.schedule)}
    with applied(demo.host, bank) as pruner:
        for name, chosen in schedules.items():
            pruner.schedule = chosen
            errors = [
                float((demo.sample(part, STEPS) - reference).square().mean())
                for part, reference in zip(seeds, dense, strict=True)
            ]
            row[name] = mean_and_spread(errors)
    return row


def footprint(demo: Demo, bank: Bank, schedule: StageSchedule) -> dict[str, float]:
    """Memory over dense, and the median time of a switch, with only this schedule resident."""
    dense_bytes = resident_bytes(demo.host.denoiser)
    pruner = StagePruner(demo.host.denoiser, bank, schedule, demo.host.tau_reader)
    try:
        resident = resident_bytes(demo.host.denoiser)
        distinct = [i for i, level in enumerate(schedule.levels) if i == 0 or level != schedule.levels[i - 1]]
        times = []
        for index in range(100):
            started = time.perf_counter()
            pruner.switch(distinct[index % len(distinct)])
            times.append((time.perf_counter() - started) * 1e3)
    finally:
        pruner.detach()
    size = sum(c.weight.nbytes + c.bias.nbytes for c in bank.consumers.values())
    return {
        "resident_over_dense": resident / dense_bytes,
        "switch_ms": statistics.median(times),
        "bank_mib": size / 2**20,
    }


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"{name}: {row[name]['mean']:.4f} ± {row[name]['std']:.4f}" for name in row if isinstance(row[name], dict)]
    facts = [f"{name} {row[name]:.3f}" for name in ("resident_over_dense", "switch_ms", "bank_mib") if name in row]
    return f"{row['prompts']} prompts, order {row['order']}, consumers {row['consumers']}: " + "; ".join(cells + facts)


if __name__ == "__main__":
    main()
