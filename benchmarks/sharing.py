"""Orders and consumers: shared by all stages, or one per stage. Error, memory, switch time; also with few prompts.

python benchmarks/sharing.py                  # all three demos, into results/sharing-<demo>.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from common import DEMOS, TARGETS, Subject, mean_and_spread, write_results
from stageprune.core.calibration import Calibration
from stageprune.core.pruning import Bank, prune
from stageprune.core.runtime import StagePruner, applied, resident_bytes
from stageprune.core.schedule import StageSchedule

SHARINGS = (("shared", "shared"), ("shared", "stage"), ("stage", "stage"))
STEPS, COUNT, SETS = 20, 20, 3
MANY, FEW = 100, {"flux-shapes": 15}
"""Prompts to calibrate on; few are 5, or as many as a pipeline's short texts need for the rank of a Hessian."""


def main() -> None:
    """Compare the three at uniform levels and with their own measured schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        rows = list(compare(Subject(name)))
        facts = {"demo": name, "images": COUNT, "sets": SETS, "steps": STEPS, "targets": TARGETS}
        write_results(f"sharing-{name}", {**facts, "rows": rows})


def compare(demo: Subject) -> Iterator[dict[str, Any]]:
    """The three with many and few calibration prompts."""
    seeds = [list(range(200_000 + i * COUNT, 200_000 + (i + 1) * COUNT)) for i in range(SETS)]
    dense = [demo.sample(part, STEPS) for part in seeds]
    for prompts in (MANY, FEW.get(demo.name, 5)):
        calibration = demo.calibrate(prompts, STEPS, stages=5)
        kept = demo.prune(calibration).kept  # what each layer gives up does not depend on the sharing
        for order, consumers in SHARINGS:
            row = measure(demo, calibration, kept, order, consumers, seeds, dense, schedule=prompts == MANY)
            print(demo.name, describe({"prompts": prompts, **row}), flush=True)
            yield {"prompts": prompts, **row}


def measure(
    demo: Subject,
    calibration: Calibration,
    kept: Mapping[str, tuple[int, ...]],
    order: Any,
    consumers: Any,
    seeds: list[list[int]],
    dense: list[Tensor],
    schedule: bool,
) -> dict[str, Any]:
    """One sharing: errors at uniform levels, its measured schedule, memory and switch time of that schedule."""
    started = time.perf_counter()
    recipe = demo.recipe
    bank = prune(
        demo.host, calibration, levels=recipe.levels, kinds=recipe.kinds, order=order, consumers=consumers, kept=kept
    )
    row: dict[str, Any] = {"order": order, "consumers": consumers, "prune_seconds": time.perf_counter() - started}
    schedules = {}
    for target in TARGETS:
        uniform = demo.allocate(bank, target, strategy="uniform", steps=STEPS)
        schedules[f"uniform {target}"] = StageSchedule.from_levels([uniform.schedule.levels[0]] * 5)
    if schedule:
        allocation = demo.allocate(bank, 0.67, steps=STEPS, prompts=demo.demo.prompts(20))
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


def footprint(demo: Subject, bank: Bank, schedule: StageSchedule) -> dict[str, float]:
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
