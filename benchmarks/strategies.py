"""Every way to choose a level a stage, under the same budgets: error on held-out images, accuracy, Frechet, and what
the choice took.

    python benchmarks/strategies.py               # all three demos
    python benchmarks/strategies.py dit-digits --targets 0.67 --seeds 1

Strategies with a seed (probes, and what a search draws) run with several. Diff-ES's loop runs with its published pool,
generations and selection; fitness, search probes and steps are those of ours, and a switch moves as large a share of
the bank's levels as of its own 16. It shares states here, to be done sooner, which changes nothing that it finds; the
steps that are counted are what its own code would run: candidates and the dense references. Of ours all is counted:
the table and the races of its warm start, the check that states may be shared, held-out and fresh probes. Writes
results/strategies-<demo>.json after every row, from which it resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

import stageprune
from common import DEMOS, RESULTS, TARGETS, Subject, mean_and_spread, write_results
from provenance import needed, stamped
from stageprune.core.evaluation.metrics import frechet, mse
from stageprune.core.planning import PATTERNS, SearchSettings
from stageprune.core.planning.allocate import allocate as plan
from stageprune.core.planning.search.metered import MeteredHost
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule

STEPS, STAGES = 10, 10
PROBES = {"dit-digits": 8, "sdxl-shapes": 8, "flux-shapes": 16}
"""Search probes, and as many held out: more where errors of single images differ more."""

COUNT, SETS = 40, 3
FIRST_SEED = 600_000
PARTITION = f"equal-steps:{STAGES}"
PUBLISHED_LEVELS = 16
"""Levels a stage of Diff-ES."""

FIXED = ("uniform", "mosaic", *(f"pattern:{name}" for name in PATTERNS if name not in ("ramp-down", "ramp-up")))
SEEDED = ("measured", "ours", "Diff-ES as published")
"""What draws at random: probes, and what a search tries."""


def main() -> None:
    """All rows that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="shares of the dense MACs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of `measured` and of the searches")
    parser.add_argument("--without", nargs="*", default=[], choices=SEEDED, help="strategies to leave out")
    parser.add_argument("--again", action="store_true", help="measure rows of another state of the code again")
    options = parser.parse_args()
    for name in options.demos:
        runner = Runner(name, options.again)
        for target in options.targets:
            runner.run(target, options.seeds, [each for each in SEEDED if each not in options.without])


class Runner:
    """One demo: its bank, dense images and rows."""

    def __init__(self, name: str, again: bool = False) -> None:
        self.demo, self.again, self.probes = Subject(name), again, PROBES[name]
        path = RESULTS / f"strategies-{name}.json"
        fresh = {"demo": name, "stages": STAGES, "steps": STEPS, "probes": self.probes, "sets": SETS, "count": COUNT}
        done = json.loads(path.read_text()) if path.exists() else {}
        same = all(done.get(key) == value for key, value in fresh.items())
        self.data = done if same else {**fresh, "rows": {}}
        self.bank = self.demo.bank()
        self.dense = [self.sample(index) for index in range(SETS)]

    def run(self, target: float, seeds: int, seeded: list[str]) -> None:
        """All strategies under one budget."""
        for strategy in FIXED:
            self.row(f"{target}/{strategy}/0", lambda strategy=strategy: self.allocate(strategy, target, 0))
        for seed in range(seeds):
            for name in seeded:
                choose = self.allocate if name == "measured" else self.search
                self.row(
                    f"{target}/{name}/{seed}", lambda choose=choose, name=name, seed=seed: choose(name, target, seed)
                )

    def allocate(self, strategy: str, target: float, seed: int) -> tuple[StageSchedule, dict[str, Any]]:
        """A schedule by formula or by table."""
        prompts = self.demo.demo.prompts(2 * self.probes)
        metered = MeteredHost(self.demo.host)
        allocation = plan(
            metered.host,
            self.bank,
            target=target,
            strategy=strategy,
            steps=STEPS,
            guidance=self.demo.recipe.guidance,
            stages=None if strategy == "mosaic" else PARTITION,  # its closed form makes three stages of its own
            prompts=prompts,
            seed=20_000 * (seed + 1),
        )
        return allocation.schedule, {"macs": allocation.executed.share, "denoiser_steps": metered.steps}

    def search(self, name: str, target: float, seed: int) -> tuple[StageSchedule, dict[str, Any]]:
        """A schedule by evolution, with its cost and its course."""
        ours = name == "ours"
        most = SearchSettings.published("dit").max_levels * len(self.bank.sparsities) / PUBLISHED_LEVELS
        published = SearchSettings.published("dit", seed=seed, memory=1.0, max_levels=max(1, round(most)))
        result = stageprune.search(
            self.demo.pipe,
            self.bank,
            target=target,
            settings=SearchSettings(seed=seed) if ours else published,
            guidance=self.demo.recipe.guidance,
            steps=STEPS,
            stages=PARTITION,
            prompts=self.demo.demo.prompts(2 * self.probes),
            seed=20_000 * (seed + 1),
        )
        facts, cost = result.to_dict(), result.cost
        # Its published code runs every candidate from the start, and neither checks states nor holds probes out.
        share = 1.0 if ours else 1 + cost.shared / max(cost.search, 1)
        before = cost.start + cost.references if ours else STEPS * self.probes
        course = [[before + each["steps"] * share, each["fitness"][0]] for each in facts["history"]]
        return result.schedule, {
            "macs": result.executed.share,
            "fitness": result.best.search,
            "held_out": result.best.held_out,
            "denoiser_steps": cost.total if ours else before + cost.search + cost.shared,
            "cost": facts["cost"],
            "course": course,
        }

    def row(self, key: str, choose: Any) -> None:
        """Choose a schedule and judge it on images that no strategy has seen."""
        if not needed(self.data["rows"], key, self.again, "search"):
            return
        started = time.perf_counter()
        schedule, facts = choose()
        facts |= {"seconds": time.perf_counter() - started, "levels": schedule.levels}
        with applied(self.demo.host, self.bank) as pruner:
            pruner.schedule = schedule
            found = [self.sample(index) for index in range(SETS)]
        errors = [float(mse(latents, dense).mean()) for latents, dense in zip(found, self.dense, strict=True)]
        images = [self.demo.images(latents) for latents in found]
        row = {
            **facts,
            "latent_mse": mean_and_spread(errors),
            "accuracy": mean_and_spread([self.accuracy(index, each) for index, each in enumerate(images)]),
            "frechet_pooled": frechet(
                self.demo.judge, torch.cat([self.demo.judge.features(each).double() for each in images])
            ),
        }
        self.data["rows"][key] = stamped(row, self.data["rows"].get(key), "search")
        write_results(f"strategies-{self.demo.name}", self.data)
        print(
            self.demo.name,
            key,
            f"error {row['latent_mse']['mean']:.5f}, accuracy {row['accuracy']['mean']:.3f}, {row['seconds']:.0f} s",
            list(schedule.levels),
            flush=True,
        )

    def accuracy(self, index: int, images: Tensor) -> float:
        """Share of the images that show what was asked for."""
        prompts = self.demo.prompts(COUNT, index * COUNT)
        wanted = self.demo.judge.wanted(prompts, self.demo.host.encode(prompts)) or []
        return float(self.demo.judge.hits(images, wanted).double().mean())

    @torch.no_grad()
    def sample(self, index: int) -> Tensor:
        """Latents of a seed set, by whatever the denoiser is set to."""
        begin = index * COUNT
        return self.demo.sample(range(FIRST_SEED + begin, FIRST_SEED + begin + COUNT), STEPS, begin)


if __name__ == "__main__":
    main()
