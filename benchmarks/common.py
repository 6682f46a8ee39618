"""What the benchmark scripts share: a demo pipeline with its judge, and results as JSON beside their machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stageprune
from provenance import ROOT, code
from stageprune.core.api import host_for
from stageprune.core.bundle import MANIFEST, Bundle
from stageprune.core.calibration import Calibration
from stageprune.core.demo import RECIPES, load_demo
from stageprune.core.environment import describe_environment
from stageprune.core.evaluation.judge import Judge
from stageprune.core.files import atomic_file
from stageprune.core.host import Host, Prompt, sample
from stageprune.core.pruning import Bank

RESULTS = ROOT / "benchmarks" / "results"
DEMOS = tuple(RECIPES)
TARGETS = (0.8, 0.67, 0.5)
"""Budgets: executed MACs over dense."""


class Subject:
    """A trained demo pipeline with its judge and a fixed assignment of prompts to seeds.

    Args:
        name: of the demo.
    """

    def __init__(self, name: str) -> None:
        self.demo = load_demo(name)
        self.name, self.recipe, self.pipe = name, self.demo.recipe, self.demo.pipe
        self.host: Host = host_for(self.pipe)
        self.judge = Judge.load(self.demo.folder / "judge").eval()

    def calibrate(self, prompts: int, steps: int = 20, stages: int = 1) -> Calibration:
        """On captions that training has seen (or on all classes), all tokens: no row shall depend on a draw of them."""
        recipe = self.recipe
        chosen = self.demo.prompts(prompts)
        return stageprune.calibrate(
            self.pipe, chosen, steps=steps, guidance=recipe.guidance, stages=stages, kinds=recipe.kinds, tokens=1.0
        )

    def bank(self) -> Bank:
        """At the demo's levels, made once for each state of the engine's sources and kept in `out/banks`."""
        folder = ROOT / "out" / "banks" / f"{self.name}-{code()}"
        if not (folder / MANIFEST).is_file():
            Bundle(self.prune(self.calibrate(self.recipe.calibration_prompts))).save(folder)
        return Bundle.load(folder).bank

    def prune(self, calibration: Calibration | None, **options: Any) -> Bank:
        """At the demo's levels."""
        recipe = self.recipe
        return stageprune.prune(
            self.pipe, calibration, levels=recipe.levels, kinds=recipe.kinds, multiple=recipe.multiple, **options
        )

    def allocate(self, bank: Bank, target: float, **options: Any) -> Any:
        """With the demo's guidance."""
        return stageprune.allocate(self.pipe, bank, target=target, guidance=self.recipe.guidance, **options)

    def prompts(self, count: int, begin: int = 0) -> list[Prompt]:
        """Prompts to judge with: held-out captions (or all classes), from number `begin` on."""
        return self.demo.prompts(begin + count, held_out=True)[begin:]

    def sample(self, seeds: Sequence[int], steps: int, begin: int = 0, batch_size: int = 50) -> Tensor:
        """Final latents, one a seed, of the prompts from number `begin` on."""
        conditions = self.host.encode(self.prompts(len(seeds), begin))
        return sample(self.host, conditions, seeds, steps, self.recipe.guidance, batch_size)

    def images(self, latents: Tensor, batch_size: int = 100) -> Tensor:
        """Decoded images."""
        return torch.cat([self.host.decode(part) for part in latents.split(batch_size)])


def write_results(name: str, data: dict[str, Any]) -> Path:
    """Write `results/<name>.json` with the environment."""
    path = RESULTS / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps({**data, "environment": describe_environment()}, indent=1) + "\n", "utf-8")
    return path


def with_peak(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result, seconds, and bytes by which the process's peak memory rose above what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before, started = status("VmRSS"), time.perf_counter()
    result = work()
    return result, time.perf_counter() - started, status("VmHWM") - before


def status(field: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over seed sets."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "std": float(tensor.std()) if len(values) > 1 else 0.0}
