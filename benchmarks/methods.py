"""Every pruning method at the same ratios, one level at all steps: error, accuracy, Frechet distance, time.

    python benchmarks/methods.py                  # all three demos
    python benchmarks/methods.py dit-digits --sets 3 --count 40

Writes results/methods-<demo>.json after every row, from which it resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

import stageprune
from common import DEMOS, RESULTS, Subject, mean_and_spread, write_results
from provenance import needed, stamped
from stageprune.core.calibration import Calibration
from stageprune.core.evaluation.metrics import frechet, mse
from stageprune.core.groups import measure_cost
from stageprune.core.pruning import Bank
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule

RATIOS = (0.2, 0.35, 0.5)
STEPS = 20
FIRST_SEED = 400_000

UNITS: dict[str, dict[str, Any]] = {
    "obs": {},
    "obs, one share for all layers": {"method": "obs", "layer_allocation": "uniform"},
    **{name: {"method": name} for name in ("wanda", "activation", "taylor", "magnitude", "random")},
}
"""Methods that remove heads, neurons and channels, by the share of their MACs."""

BLOCKS = ("depth", "depth-output")
"""Methods that remove whole blocks, by the share of the blocks' MACs."""

WEIGHTS = ("obs", "wanda", "magnitude")
"""Methods that zero single weights, by the share of weights; nothing runs faster."""


def main() -> None:
    """All rows that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--sets", type=int, default=3, help="seed sets")
    parser.add_argument("--count", type=int, default=40, help="images a seed set")
    parser.add_argument("--again", action="store_true", help="measure rows of another engine again, and say if equal")
    parser.add_argument("--only", nargs="+", help="methods, as the rows are named")
    options = parser.parse_args()
    for name in options.demos:
        path = RESULTS / f"methods-{name}.json"
        fresh = {"demo": name, "sets": options.sets, "count": options.count, "steps": STEPS, "rows": {}}
        done = json.loads(path.read_text()) if path.exists() else {}
        same = all(done.get(key) == value for key, value in fresh.items() if key != "rows")
        Runner(Subject(name), done if same else fresh, options.again).run(options.only)


class Runner:
    """One calibration that serves every method, and the dense images."""

    def __init__(self, demo: Subject, data: dict[str, Any], again: bool = False) -> None:
        self.demo, self.data, self.again = demo, data, again
        started = time.perf_counter()
        self.calibration: Calibration = stageprune.calibrate(
            demo.pipe,
            demo.demo.prompts(demo.recipe.calibration_prompts),
            steps=STEPS,
            guidance=demo.recipe.guidance,
            kinds=(*demo.recipe.kinds, "block"),
            layers="all",
            skip_blocks=True,
            taylor=0.05,
            tokens=1.0,
        )
        data["calibrate_seconds"] = time.perf_counter() - started
        self.cost = measure_cost(demo.host.denoiser, size=demo.host.input_size)
        self.dense = [self.sample(index) for index in range(data["sets"])]

    def run(self, only: Sequence[str] | None = None) -> None:
        """All methods at all ratios, or some."""
        if self.needed("dense"):
            self.row("dense", 1.0, 0.0, _nothing)
        jobs: dict[str, Callable[[], None]] = {
            **{name: lambda name=name: self.bank(name, {"method": name, **UNITS[name]}) for name in UNITS},
            **{name: lambda name=name: self.bank(name, {"method": name, "kinds": ["block"]}) for name in BLOCKS},
            **{f"{name} of single weights": lambda name=name: self.weights(name) for name in WEIGHTS},
        }
        for name in only or jobs:
            jobs[name]()

    def needed(self, key: str) -> bool:
        """Whether this row is still to be measured."""
        return needed(self.data["rows"], key, self.again)

    def weights(self, name: str) -> None:
        """One method that zeroes single weights, at all ratios and in a pattern."""
        for pattern in (*RATIOS, "2:4"):
            self.static(name, pattern)

    def bank(self, name: str, options: dict[str, Any]) -> None:
        """One method that makes a bank."""
        keys = {ratio: f"{name}/{ratio}" for ratio in RATIOS}
        if not any(self.needed(key) for key in keys.values()):
            return
        recipe = self.demo.recipe
        given = {"kinds": recipe.kinds, "levels": RATIOS, "multiple": recipe.multiple, **options}
        bank: Bank = stageprune.prune(self.demo.pipe, self.calibration, **given)
        for ratio, key in keys.items():
            share = bank.macs(self.cost)[ratio] / self.cost.dense
            self.row(key, share, bank.provenance["seconds"], lambda ratio=ratio: self.running(bank, ratio))

    def static(self, name: str, pattern: float | str) -> None:
        """One method that zeroes single weights."""
        key = f"{name} of single weights/{pattern}"
        if not self.needed(key):
            return
        started = time.perf_counter()
        model = stageprune.sparsify(
            self.demo.pipe, self.calibration, pattern=pattern, method=name, kinds=self.demo.recipe.kinds
        )
        self.row(key, 1.0, time.perf_counter() - started, lambda: model.apply(self.demo.pipe))

    @contextmanager
    def running(self, bank: Bank, ratio: float) -> Iterator[None]:
        """One level at all steps."""
        with applied(self.demo.host, bank) as pruner:
            pruner.schedule = StageSchedule.uniform(ratio)
            yield

    def row(self, key: str, macs: float, seconds: float, run: Callable[[], AbstractContextManager[Any]]) -> None:
        """Measure whatever `run` sets the denoiser to."""
        with run():
            found = [self.sample(index) for index in range(self.data["sets"])]
        sets = [self.scores(index, latents) for index, latents in enumerate(found)]
        features = torch.cat([self.demo.judge.features(self.demo.images(latents)).double() for latents in found])
        row = {
            "macs": macs,
            "seconds": seconds,
            "frechet_pooled": frechet(self.demo.judge, features),
            **{metric: mean_and_spread([each[metric] for each in sets]) for metric in sets[0]},
        }
        self.data["rows"][key] = row = stamped(row, self.data["rows"].get(key))
        write_results(f"methods-{self.demo.name}", self.data)
        told = {metric: round(value["mean"], 4) for metric, value in _means(self.data, key)}
        print(self.demo.name, key, told, f"same again: {row.get('same_again')}", flush=True)

    def scores(self, index: int, latents: Tensor) -> dict[str, float]:
        """Metrics of one seed set."""
        prompts = self.demo.prompts(self.data["count"], index * self.data["count"])
        wanted = self.demo.judge.wanted(prompts, self.demo.host.encode(prompts)) or []
        hits = self.demo.judge.hits(self.demo.images(latents), wanted)
        return {"latent_mse": float(mse(latents, self.dense[index]).mean()), "accuracy": float(hits.double().mean())}

    @torch.no_grad()
    def sample(self, index: int) -> Tensor:
        """Latents of a seed set, by whatever the denoiser is set to."""
        begin, count = index * self.data["count"], self.data["count"]
        return self.demo.sample(range(FIRST_SEED + begin, FIRST_SEED + begin + count), STEPS, begin)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _means(data: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, float]]]:
    return ((name, value) for name, value in data["rows"][key].items() if isinstance(value, dict))


if __name__ == "__main__":
    main()
