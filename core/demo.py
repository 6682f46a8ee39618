"""The main job, end to end, on a small trained pipeline that ships with the repository."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .api import allocate, calibrate, evaluate, prune
from .bundle import Bundle, check_bundle_folder
from .errors import StagePruneError
from .host import Prompt
from .hosts.diffusers.load import load_pipeline

DEMO_FOLDER = Path(__file__).parent.parent / "demo"


DIT_LEVELS = (0.0, 0.1, 0.205, 0.335, 0.42, 0.51, 0.6, 0.7)
PROMPTS = "prompts.json"


@dataclass(frozen=True)
class DemoRecipe:
    """How a demo pipeline is calibrated, pruned and judged. Defaults come from docs/results.md.

    Args:
        levels: three of them execute 0.8, 0.67 and 0.5 of the MACs.
        kinds: unit kinds that are pruned.
        labels: class labels, in turn; without any, captions are read from the folder's `prompts.json`.
        guidance: guidance scale.
        latent_side: side of the latents, where the pipeline does not know it from its files.
        calibration_prompts: prompts to calibrate on.
        probes: prompts to measure stages with.
        images: samples in the report.
        steps: sampling steps.
        multiple: neurons are kept in multiples of this.
    """

    levels: tuple[float, ...]
    kinds: tuple[str, ...] = ("head", "neuron")
    labels: tuple[int, ...] = ()
    guidance: float = 1.5
    latent_side: int | None = None
    calibration_prompts: int = 60
    probes: int = 40
    images: int = 60
    steps: int = 20
    multiple: int = 16


RECIPES = {
    "dit-digits": DemoRecipe(levels=DIT_LEVELS, labels=tuple(range(10))),
    "sdxl-shapes": DemoRecipe(
        levels=(0.0, 0.11, 0.235, 0.3, 0.387, 0.48, 0.585, 0.7),
        kinds=("head", "neuron", "channel"),
        guidance=4.0,
        probes=24,
        images=40,
    ),
    "flux-shapes": DemoRecipe(levels=DIT_LEVELS, guidance=2.0, latent_side=16, probes=32, images=40),
}


@dataclass(frozen=True)
class Demo:
    """A demo pipeline that ships with the repository, with what it is called with.

    Args:
        name: a folder in `demo/`.
        recipe: how it is pruned.
        pipe: the loaded pipeline.
    """

    name: str
    recipe: DemoRecipe
    pipe: Any

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return DEMO_FOLDER / self.name

    def prompts(self, count: int, held_out: bool = False) -> list[Prompt]:
        """Prompts in turn: those that training has seen, or held-out ones. Class labels are always the same."""
        if self.recipe.labels:
            known: list[Prompt] = list(self.recipe.labels)
        else:
            kinds = json.loads((self.folder / PROMPTS).read_text(encoding="utf-8"))
            known = list(kinds["held_out" if held_out else "calibration"])
        return [known[i % len(known)] for i in range(count)]


def load_demo(name: str, device: str = "cpu") -> Demo:
    """Load a demo pipeline. StagePruneError if there is none of this name."""
    folder = DEMO_FOLDER / name
    if name not in RECIPES or not (folder / "model_index.json").is_file():
        raise StagePruneError(f"no demo pipeline {name!r} in {DEMO_FOLDER}; there are {', '.join(RECIPES)}.")
    pipe = load_pipeline(folder, device)
    if RECIPES[name].latent_side is not None:
        pipe.default_sample_size = RECIPES[name].latent_side  # FluxPipeline takes all models for 1024 pixels wide
    return Demo(name, RECIPES[name], pipe)


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
    check_bundle_folder(out / "bundle")  # before minutes of work, not after
    started = time.perf_counter()
    demo = load_demo(name)
    pipe, recipe = demo.pipe, demo.recipe
    say(f"loaded {name}: {type(pipe).__name__}, {torch.get_num_threads()} threads")
    prompts = demo.prompts(recipe.calibration_prompts)
    calibration = calibrate(
        pipe,
        prompts,
        steps=recipe.steps,
        guidance=recipe.guidance,
        kinds=recipe.kinds,
        checkpoint=out / "calibration.part",
    )
    (out / "calibration.part").unlink(missing_ok=True)
    say(f"1/4 {calibration} [{time.perf_counter() - started:.0f} s]")
    bank = prune(pipe, calibration, levels=recipe.levels, kinds=recipe.kinds, multiple=recipe.multiple)
    say(f"2/4 {bank} [{time.perf_counter() - started:.0f} s]")
    allocation = allocate(pipe, bank, target=target, prompts=prompts[: recipe.probes])
    say(f"3/4 {allocation.table}\n{allocation} [{time.perf_counter() - started:.0f} s]")
    bundle = Bundle(bank, allocation.schedule)
    saved = bundle.save(out / "bundle")
    report = evaluate(
        pipe,
        bundle,
        prompts=demo.prompts(recipe.images, held_out=True),
        count=recipe.images,
        judge=demo.folder / "judge",
        allocation=allocation,
        command=f"stageprune demo {name} --target {target}",
    )
    page = report.save(out / "report")
    say(f"4/4 {report} [{time.perf_counter() - started:.0f} s]")
    say(f"report  {page}\nbundle  {saved}\nuse it: pipe.enable_stage_pruning({str(saved)!r})")
    return page
