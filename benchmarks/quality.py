"""A demo pipeline at several budgets and step counts: the measured schedule beside everything that costs the same.

    python benchmarks/quality.py                  # all three demos
    python benchmarks/quality.py flux-shapes --print

Writes results/quality-<demo>.json after every cell, from which it resumes; write_docs.py makes the tables of
docs/results.md of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import DEMOS, RESULTS, TARGETS, Subject, mean_and_spread, write_results
from stageprune.core.evaluation.metrics import frechet, mse
from stageprune.core.planning.allocate import TOLERANCE
from stageprune.core.pruning import Bank
from stageprune.core.runtime import StagePruner, applied
from stageprune.core.schedule import StageSchedule

STEPS = (20, 8, 4)
REFERENCE_STEPS = 40
SETS = {"dit-digits": 5}
FIRST_SEED = 100_000
VARIANTS = ("dense", "measured", "uniform", "magnitude", "fewer steps")


def main() -> None:
    """Run all cells that are not done yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--sets", type=int, help="seed sets; by default 3, and 5 of the small dit-digits")
    parser.add_argument("--count", type=int, default=50, help="images a seed set")
    parser.add_argument("--print", action="store_true", help="only print the tables of earlier results")
    options = parser.parse_args()
    for name in options.demos:
        path = result_path(name)
        done = json.loads(path.read_text()) if path.exists() else {}
        if not options.print:
            subject = Subject(name)
            levels = list(subject.recipe.levels)
            sets = options.sets or SETS.get(name, 3)
            fresh = {"demo": name, "sets": sets, "count": options.count, "levels": levels, "cells": {}}
            same = all(done.get(key) == fresh[key] for key in ("sets", "count", "levels"))
            done = done if same else fresh
            Runner(subject, done).run()
        print(tables(done))


def result_path(name: str) -> Path:
    """Where the results of a demo lie."""
    return RESULTS / f"quality-{name}.json"


class Runner:
    """Banks are made once; every cell (steps, target, variant, seed set) is sampled and measured once."""

    def __init__(self, demo: Subject, data: dict[str, Any]) -> None:
        self.demo, self.data = demo, data
        self.obs = demo.prune(demo.calibrate(100))
        self.magnitude = demo.prune(None, method="magnitude")
        self.references: dict[tuple[int, int], Tensor] = {}

    def run(self) -> None:
        """All steps and targets."""
        for steps in STEPS:
            self.cell(steps, 1.0, "dense", 1.0, steps, None, None)
            table = None
            for target in TARGETS:
                uniform = self.demo.allocate(self.obs, target, strategy="uniform", steps=steps)
                share = uniform.executed.share
                key = f"{steps}/{target}"
                if key not in self.data.setdefault("allocations", {}):
                    probes = self.demo.demo.prompts(self.demo.recipe.probes)
                    allocation = self.demo.allocate(
                        self.obs, share - TOLERANCE, steps=steps, prompts=probes, table=table
                    )
                    table = allocation.table
                    self.data["allocations"][key] = allocation.to_dict()
                schedule = StageSchedule.from_dict(self.data["allocations"][key]["schedule"])
                fewer = max(1, round(steps * share))
                spent = self.data["allocations"][key]["macs_share"]
                self.cell(steps, target, "measured", spent, steps, self.obs, schedule)
                self.cell(steps, target, "uniform", share, steps, self.obs, uniform.schedule)
                rival = self.demo.allocate(self.magnitude, target, strategy="uniform", steps=steps)
                self.cell(steps, target, "magnitude", rival.executed.share, steps, self.magnitude, rival.schedule)
                self.cell(steps, target, "fewer steps", fewer / steps, fewer, None, None)

    def cell(
        self, steps: int, target: float, name: str, share: float, run: int, bank: Bank | None, schedule: Any
    ) -> None:
        """One variant over all seed sets."""
        key = f"{steps}/{target}/{name}"
        if key in self.data["cells"]:
            return
        sets = [self.measure(index, steps, run, bank, schedule) for index in range(self.data["sets"])]
        pooled = torch.cat([features for _, features in sets])
        rows = [metrics for metrics, _ in sets]
        self.data["cells"][key] = {
            "share": share,
            "steps_run": run,
            "schedule": schedule.levels if schedule is not None else None,
            "sets": rows,
            "frechet_pooled": frechet(self.demo.judge, pooled),
            **{metric: mean_and_spread([row[metric] for row in rows]) for metric in rows[0]},
        }
        self.data["cells"] = dict(sorted(self.data["cells"].items(), key=lambda item: place(item[0])))
        write_results(result_path(self.demo.name).stem, self.data)
        means = {metric: round(sum(row[metric] for row in rows) / len(rows), 5) for metric in rows[0]}
        print(key, means, flush=True)

    def measure(
        self, index: int, steps: int, run: int, bank: Bank | None, schedule: StageSchedule | None
    ) -> tuple[dict[str, float], Tensor]:
        """One seed set: metrics, and the judge's features."""
        demo, count = self.demo, self.data["count"]
        with pruned(demo, bank, schedule):
            latents = self.sample(index, run) if bank is not None or run != steps else self.reference(index, steps)
        images = demo.images(latents)
        dense, fine = self.reference(index, steps), self.reference(index, REFERENCE_STEPS)
        with torch.no_grad():
            features = demo.judge.features(images).double()
        prompts = demo.prompts(count, index * count)
        hits = demo.judge.hits(images, demo.judge.wanted(prompts, demo.host.encode(prompts)) or [])
        metrics = {
            "latent_mse": float(mse(latents, dense).mean()),
            "image_mse": float(mse(images, demo.images(dense)).mean()),
            "latent_mse_to_40_steps": float(mse(latents, fine).mean()),
            "accuracy": float(hits.double().mean()),
            "frechet": frechet(demo.judge, features),
        }
        return metrics, features

    def sample(self, index: int, steps: int) -> Tensor:
        """Latents of a seed set, by whatever the denoiser is set to."""
        count = self.data["count"]
        seeds = range(FIRST_SEED + index * count, FIRST_SEED + (index + 1) * count)
        return self.demo.sample(seeds, steps, index * count)

    def reference(self, index: int, steps: int) -> Tensor:
        """Dense latents of a seed set, sampled once."""
        if (index, steps) not in self.references:
            self.references[index, steps] = self.sample(index, steps)
        return self.references[index, steps]


def place(key: str) -> tuple[int, float, int]:
    """Where a cell stands in the tables, whenever it was made."""
    steps, target, name = key.split("/")
    return -int(steps), -float(target), VARIANTS.index(name)


@contextmanager
def pruned(demo: Subject, bank: Bank | None, schedule: StageSchedule | None) -> Iterator[StagePruner | None]:
    """Run the block with a schedule, or dense."""
    if bank is None or schedule is None:
        yield None
        return
    with applied(demo.host, bank) as pruner:
        pruner.schedule = schedule
        yield pruner


def tables(data: dict[str, Any]) -> str:
    """The results as Markdown, one table a step count."""
    lines = []
    cells = data["cells"]
    for steps in STEPS:
        lines += [
            f"\n**{steps} steps** ({data['sets']} seed sets of {data['count']} images; mean ± deviation over sets)\n",
            "| budget | variant | MACs run | MSE to dense | MSE to 40 steps | accuracy | Frechet | pooled |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for key, cell in cells.items():
            run, target, name = key.split("/")
            if int(run) != steps:
                continue
            label = f"{name} ({cell['steps_run']})" if name == "fewer steps" else name
            if cell["schedule"] and name == "measured":
                label += " [" + ", ".join(f"{level:g}" for level in cell["schedule"]) + "]"
            lines.append(
                f"| {target} | {label} | {cell['share']:.3f} | {show(cell['latent_mse'])} | "
                f"{show(cell['latent_mse_to_40_steps'])} | {show(cell['accuracy'], 3)} | "
                f"{show(cell['frechet'], 2)} | {cell['frechet_pooled']:.2f} |"
            )
    return "\n".join(lines)


def show(value: dict[str, float], digits: int = 4) -> str:
    """Mean ± spread."""
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"


if __name__ == "__main__":
    main()
