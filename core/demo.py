"""The main job, end to end, on a small trained pipeline that ships with the repository."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .api import allocate, calibrate, evaluate, prune
from .bundle import Bundle
from .errors import StagePruneError
from .hosts.diffusers.load import load_pipeline

DEMO_FOLDER = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True)
class DemoRecipe:
    """How a demo pipeline is calibrated, pruned and judged. Defaults come from docs/results.md."""

    prompts: tuple[int, ...]
    calibration_prompts: int = 60
    probes: int = 40
    images: int = 60
    steps: int = 20
    guidance: float = 1.5
    levels: tuple[float, ...] = (0.0, 0.1, 0.205, 0.335, 0.42, 0.51, 0.6, 0.7)
    multiple: int = 16


RECIPES = {"dit-digits": DemoRecipe(prompts=tuple(range(10)))}


def run_demo(name: str, out: Path, target: str = "macs:0.67", say: Callable[[str], object] = lambda _: None) -> Path:
    """Calibrate, prune, allocate, compare, report.

    Args:
        name: the demo pipeline, a folder in `demo/`.
        out: where bundle and report go.
        target: the budget.
        say: called with a line about each step.

    Returns:
        The HTML report.
    """
    folder = DEMO_FOLDER / name
    if name not in RECIPES or not (folder / "model_index.json").is_file():
        raise StagePruneError(f"no demo pipeline {name!r} in {DEMO_FOLDER}; there are {', '.join(RECIPES)}.")
    recipe = RECIPES[name]
    started = time.perf_counter()
    pipe = load_pipeline(folder, "cpu")
    say(f"loaded {folder.name}: {type(pipe).__name__}, {torch.get_num_threads()} threads")
    prompts = [recipe.prompts[i % len(recipe.prompts)] for i in range(recipe.calibration_prompts)]
    calibration = calibrate(
        pipe, prompts, steps=recipe.steps, guidance=recipe.guidance, checkpoint=out / "calibration.part"
    )
    (out / "calibration.part").unlink(missing_ok=True)
    say(f"1/4 {calibration} [{time.perf_counter() - started:.0f} s]")
    bank = prune(pipe, calibration, levels=recipe.levels, multiple=recipe.multiple)
    say(f"2/4 {bank} [{time.perf_counter() - started:.0f} s]")
    allocation = allocate(pipe, bank, target=target, prompts=prompts[: recipe.probes])
    say(f"3/4 {allocation.table}\n{allocation} [{time.perf_counter() - started:.0f} s]")
    bundle = Bundle(bank, allocation.schedule)
    saved = bundle.save(out / "bundle")
    report = evaluate(
        pipe,
        bundle,
        prompts=list(recipe.prompts),
        count=recipe.images,
        judge=folder / "judge",
        allocation=allocation,
        command=f"stageprune demo {name} --target {target}",
    )
    page = report.save(out / "report")
    say(f"4/4 {report} [{time.perf_counter() - started:.0f} s]")
    say(f"report  {page}\nbundle  {saved}\nuse it: pipe.enable_stage_pruning({str(saved)!r})")
    return page
