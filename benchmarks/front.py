"""Error against cost, from two dense calls to twenty: fewer or better steps, pruning, and steps and levels together.

    python benchmarks/front.py                            # all three demos, with both solvers
    python benchmarks/front.py dit-digits --solver first

Cost is in dense denoiser calls; the dense run of 20 steps is 20. Errors are of latents, to a dense run of the same
solver with 40 steps (`fine`) and with 20 (`dense20`). `first` is the demo's own solver (DDIM, Euler), `second`
DPM-Solver++(2M). Plans are made on prompts and seeds of their own. Those of steps and levels are told what all other
ways chose at their budget, and what they chose themselves at smaller ones (`rivals`). Writes
results/front-<demo>-<solver>.json after every row, from which it resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from common import DEMOS, RESULTS, Subject, mean_and_spread, write_results
from provenance import needed, stamped
from stageprune.core.errors import AllocationError
from stageprune.core.evaluation.metrics import frechet, mse
from stageprune.core.groups import measure_cost
from stageprune.core.host import Prompt, sample
from stageprune.core.planning import Allocation, ErrorTable, JumpTable
from stageprune.core.planning.costs import TOLERANCE
from stageprune.core.planning.joint import grid_points, measure_jumps
from stageprune.core.planning.sampling import Sampling
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule

STEPS, FINE = 20, 40
DEAR = (2, 4, 8, 12, 16)
CALLS = {"dit-digits": (2, 4, 6, 8, 12, 16, 20), "sdxl-shapes": DEAR, "flux-shapes": DEAR}
"""Budgets, in dense calls; fewer where a call is dear."""

ALONE = ("uniform", "measured")
"""Strategies of pruning alone."""

PRUNED_STEPS = (20, 8, 4)
"""Step counts at which pruning alone is tried."""

TOGETHER: dict[str, tuple[str, str]] = {
    "steps": ("steps", "latent_mse"),
    "joint": ("joint", "latent_mse"),
    "steps by Frechet": ("steps", "frechet"),
    "joint by Frechet": ("joint", "frechet"),
}
"""Ways that choose steps: their strategy, and by what it chooses; each knows what those before it chose."""

ONE_LEVEL = "one level, any steps"
"""The best of one level at all steps with as many as the budget pays for: what `joint` tries beside its plans."""

PROBES = {"dit-digits": 40, "sdxl-shapes": 32, "flux-shapes": 64}
"""Prompts to plan with by error: more where errors of single images differ more."""

SET_PROBES = 128
"""Prompts to plan with by a set metric: half of them choose. In sets of 64 the Frechet distance ranks schedules nearly
as in sets twice as large; in sets of 32 it does less well."""

SOLVERS = ("first", "second")
COUNT, SETS = 40, 3
FIRST_SEED = 700_000


def main() -> None:
    """All rows that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--solver", nargs="+", default=[*SOLVERS], choices=SOLVERS, help="of the sampler")
    parser.add_argument("--calls", nargs="+", type=int, help="budgets, in dense calls")
    parser.add_argument("--without", nargs="*", default=[], choices=TOGETHER, help="ways to leave out")
    parser.add_argument("--again", action="store_true", help="measure rows of another state of the code again")
    options = parser.parse_args()
    for name in options.demos:
        for solver in options.solver:
            Runner(name, solver, options.again).run(options.calls or CALLS[name], options.without)


class Runner:
    """One demo with one solver: its bank, dense images and rows."""

    def __init__(self, name: str, solver: str, again: bool = False) -> None:
        self.demo, self.again = Subject(name), again
        self.bank = self.demo.bank()  # whichever solver runs it, it was calibrated with the demo's own
        if solver == "second":
            self.demo.pipe.scheduler = second_order(self.demo.pipe.scheduler)
        self.file = f"front-{name}-{solver}"
        fresh = {"demo": name, "solver": solver, "steps": STEPS, "fine": FINE, "sets": SETS, "count": COUNT}
        path = RESULTS / f"{self.file}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        same = all(done.get(key) == value for key, value in fresh.items())
        self.data = done if same else {**fresh, "rows": {}}
        cost = measure_cost(self.demo.host.denoiser, size=self.demo.host.input_size)
        self.costs = {level: macs / cost.dense for level, macs in self.bank.macs(cost).items()}
        self.fine = [self.sample(index, FINE) for index in range(SETS)]
        self.dense = [self.sample(index, STEPS) for index in range(SETS)]
        self.tables: dict[int, ErrorTable | None] = {}
        self.told: dict[str, Any] = {}

    def run(self, budgets: Sequence[int], without: Sequence[str] = ()) -> None:
        """All ways at all budgets but those left out."""
        self.row("fine", lambda: (None, FINE))
        for calls in budgets:
            self.row(f"{calls}/fewer steps", lambda calls=calls: (None, calls))
            for steps in PRUNED_STEPS:
                if calls >= steps or calls < steps * min(self.costs.values()):
                    continue
                for strategy in ALONE:
                    self.row(
                        f"{calls}/{strategy}, {steps} steps",
                        lambda calls=calls, strategy=strategy, steps=steps: self.pruned(calls, strategy, steps),
                    )
            for way in (each for each in TOGETHER if each not in without):
                self.row(f"{calls}/{way}", lambda calls=calls, way=way: self.together(calls, way))
            if "corner" in self.data["rows"].get(f"{calls}/joint", {}):
                self.row(f"{calls}/{ONE_LEVEL}", lambda calls=calls: self.one_level(calls))

    def together(self, calls: int, way: str) -> tuple[StageSchedule, int]:
        """Steps and levels, or steps alone."""
        strategy, fitness = TOGETHER[way]
        found = self.allocate(
            target=calls / STEPS,
            strategy=strategy,
            steps=STEPS,
            jumps=self.jumps,
            fitness=fitness,
            judge=self.demo.judge,
            rivals=self.rivals(calls, way),
        )
        best = found.candidates[0]
        self.told = {"predicted": best.predicted, "held_out": best.measured, "probes": len(self.probes(fitness))}
        corners = [each for each in found.candidates if each.name.startswith("one level")]
        if way == "joint" and corners:
            corner = min(corners, key=lambda each: each.measured)
            self.told["corner"] = {"level": corner.levels[0], "steps": len(corner.levels)}
        return found.schedule, len(found.schedule.taus or ())

    def rivals(self, calls: int, way: str) -> list[StageSchedule]:
        """What the ways before it chose at this budget, and it itself at smaller ones."""
        names = [*TOGETHER][: [*TOGETHER].index(way)]
        found = {}
        for key, row in self.data["rows"].items():
            budget, _, other = key.partition("/")
            if not other or "refused" in row:
                continue
            beside = other in names or other.startswith(("fewer steps", *ALONE))
            if (beside and int(budget) == calls) or (other == way and int(budget) < calls):
                schedule = StageSchedule.from_dict(row["schedule"]) if row["schedule"] else StageSchedule.uniform(0.0)
                found[key] = schedule if schedule.taus else schedule.planned_for(row["steps"])
        most = calls + TOLERANCE * STEPS
        return [each for each in found.values() if self.calls_of(each, each.planned_steps or 0) <= most]

    def one_level(self, calls: int) -> tuple[StageSchedule, int]:
        """The best corner of `joint`, by its held-out probes."""
        corner = self.data["rows"][f"{calls}/joint"]["corner"]
        return StageSchedule.uniform(corner["level"]).planned_for(corner["steps"]), corner["steps"]

    @cached_property
    def jumps(self) -> JumpTable:
        """Prices, on the prompts that plans by error are made on, whichever row is the first to need them."""
        prompts = self.probes("latent_mse")
        sampling = Sampling(self.demo.host, prompts[: len(prompts) // 2], STEPS, self.demo.recipe.guidance)
        with applied(self.demo.host, self.bank) as pruner, torch.no_grad():
            return measure_jumps(sampling, pruner, grid_points(STEPS))

    def pruned(self, calls: int, strategy: str, steps: int) -> tuple[StageSchedule, int]:
        """Levels at the sampler's own steps."""
        table = self.tables.get(steps) if strategy == "measured" else None
        found = self.allocate(target=calls / steps, strategy=strategy, steps=steps, table=table)
        if strategy == "measured":
            self.tables[steps] = found.table
        return found.schedule, steps

    def allocate(self, **options: Any) -> Allocation:
        """With the demo's guidance, on probes for what it is chosen by."""
        prompts = self.probes(options.get("fitness", "latent_mse"))
        found: Allocation = self.demo.allocate(self.bank, prompts=prompts, **options)
        return found

    def probes(self, fitness: str) -> list[Prompt]:
        """Of calibration; by a set metric, prompts of the law of the judge's real images."""
        if fitness == "frechet":
            return self.demo.prompts(SET_PROBES, begin=SETS * COUNT)
        return self.demo.demo.prompts(PROBES[self.demo.name])

    def row(self, key: str, choose: Callable[[], tuple[StageSchedule | None, int]]) -> None:
        """Choose and judge, on images that no choice has seen."""
        if not needed(self.data["rows"], key, self.again, "planner"):
            return
        started = time.perf_counter()
        self.told = {}
        try:
            schedule, steps = choose()
        except AllocationError as error:
            self.keep(key, {"refused": str(error)})
            return
        seconds = time.perf_counter() - started
        latents = self.run_schedule(schedule, steps)
        images = [self.demo.images(each) for each in latents]
        features = torch.cat([self.demo.judge.features(each).double() for each in images])
        row: dict[str, Any] = {
            "calls": self.calls_of(schedule, steps),
            "steps": steps,
            "schedule": None if schedule is None else schedule.to_dict(),
            "seconds": seconds,
            **self.told,
            "fine": self.errors(latents, self.fine),
            "images": [
                float(f"{error:.4g}")
                for mine, fine in zip(latents, self.fine, strict=True)
                for error in mse(mine, fine)
            ],
            "dense20": self.errors(latents, self.dense),
            "accuracy": mean_and_spread([self.accuracy(index, each) for index, each in enumerate(images)]),
            "frechet": frechet(self.demo.judge, features),
        }
        self.keep(key, row)
        print(
            self.file,
            key,
            f"{row['calls']:.2f} calls in {steps} steps,",
            f"error {row['fine']['mean']:.4f}, to dense {row['dense20']['mean']:.4f},",
            f"accuracy {row['accuracy']['mean']:.3f}, Frechet {row['frechet']:.2f}, {seconds:.0f} s",
            flush=True,
        )

    def keep(self, key: str, row: dict[str, Any]) -> None:
        """Write a row to the file."""
        self.data["rows"][key] = stamped(row, self.data["rows"].get(key), "planner")
        write_results(self.file, self.data)

    def calls_of(self, schedule: StageSchedule | None, steps: int) -> float:
        """Cost in dense calls."""
        if schedule is None:
            return float(steps)
        taus = schedule.taus or self.demo.host.taus(steps)
        return sum(self.costs[schedule.levels[schedule.stage_of(tau)]] for tau in taus)

    def run_schedule(self, schedule: StageSchedule | None, steps: int) -> list[Tensor]:
        """Latents of all seed sets."""
        if schedule is None:
            return [self.sample(index, steps) for index in range(SETS)]
        with applied(self.demo.host, self.bank) as pruner:
            pruner.schedule = schedule
            return [self.sample(index, steps, schedule.taus) for index in range(SETS)]

    @torch.no_grad()
    def sample(self, index: int, steps: int, taus: tuple[float, ...] | None = None) -> Tensor:
        """Latents of a seed set, by whatever the denoiser is set to."""
        begin, host = index * COUNT, self.demo.host
        conditions = host.encode(self.demo.prompts(COUNT, begin))
        seeds = range(FIRST_SEED + begin, FIRST_SEED + begin + COUNT)
        way = host if taus is None else host.visiting(taus)
        return sample(way, conditions, seeds, steps, self.demo.recipe.guidance, COUNT)

    def errors(self, latents: list[Tensor], dense: list[Tensor]) -> dict[str, float]:
        """Squared error to dense latents, with its spread over seed sets."""
        return mean_and_spread([float(mse(mine, theirs).mean()) for mine, theirs in zip(latents, dense, strict=True)])

    def accuracy(self, index: int, images: Tensor) -> float:
        """Share of the images that show what was asked for."""
        prompts = self.demo.prompts(COUNT, index * COUNT)
        wanted = self.demo.judge.wanted(prompts, self.demo.host.encode(prompts)) or []
        return float(self.demo.judge.hits(images, wanted).double().mean())


def second_order(scheduler: Any) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) for the same model."""
    config = dict(scheduler.config)
    if "FlowMatch" in type(scheduler).__name__:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
        return DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True, time_shift_type="exponential")
    return DPMSolverMultistepScheduler.from_config(config)


if __name__ == "__main__":
    main()
