"""The public functions `search` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import planning as _planning
from .api import host_at, judge_of
from .distributed import processes_here
from .evaluation import Judge
from .host import Prompt
from .hosts.diffusers import Size
from .planning import Comparison, Fitness, MosaicSettings, SearchResult, SearchSettings, Stages
from .planning.fitness import Measure
from .pruning import Bank
from .schedule import StageSchedule


def search(
    pipe: Any,
    bank: Bank,
    *,
    target: str | float | None = None,
    init: str | StageSchedule | None = None,
    fitness: str | Fitness | Measure = "latent_mse",
    settings: SearchSettings | None = None,
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    stages: Stages | None = None,
    empty: str | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    judge: Judge | str | Path | None = None,
    checkpoint: str | Path | None = None,
    mosaic: MosaicSettings | None = None,
) -> SearchResult:
    """Search the levels of all stages by evolution, for any fitness, under the budget of `allocate`.

    `allocate` adds up errors that it measured stage by stage, and needs a paired error to do so. A search runs whole
    trajectories, so that it sees how stages act on each other, and serves any fitness; it takes longer, and begins by
    default where `allocate` ends. Started by `accelerate launch` (or `torchrun`) in several processes, they share the
    work, and each returns the result of one.

    Args:
        pipe: the pipeline that the bank was made from.
        bank: the levels to choose from.
        target: as for `allocate`; `macs:0.67` by default.
        init: where it begins: `measured`, the default, or any other strategy of `allocate`, or a schedule, each with
            its mutants; or `random`, `uniform`, `patterns`, or `hybrid`, which is all three.
        fitness: what is minimised. Against the dense model, seed by seed: `latent_mse`, `latent_mae`, `latent_cosine`,
            `latent_snr`, `image_mse`, `image_ssim`, `image_frequency`, `lpips` (extra `iqa`). By a judge: `frechet`,
            `accuracy`. By any metric of pyiqa (extra `iqa`): `iqa:topiq_nr`. Or a `Fitness`, or a function
            `f(made, dense)` that gives a number a probe from `made.images` or `made.latents` and those of `dense`.
        settings: of the evolution: `SearchSettings(generations=..., seed=...)`, or `SearchSettings.published("dit")`
            for those of Diff-ES.
        prompts: of the probes; the second half is held out to choose the winner on. The calibration's first 64 by
            default.
        steps: sampling steps; those of the calibration by default.
        guidance: guidance scale; that of the calibration by default.
        size: of the images in pixels, a side or (height, width); what the bank was made for by default.
        stages: as for `allocate`; those of `init` if that is a schedule.
        empty: as for `allocate`.
        seed: first probe seed.
        batch_size: probes that run together.
        judge: for `frechet` and `accuracy`; a judge or its folder.
        checkpoint: file replaced after each generation; an interrupted call goes on from it to the identical result.
        mosaic: parameters of MosaicDiff's closed form, for `init="mosaic"` and `stages="mosaic"`.

    Returns:
        A `SearchResult`: the schedule, its fitness on search and held-out probes, the history, and the cost in denoiser
        steps.

    Raises:
        SearchError: settings, probes or a fitness that cannot be used, or a checkpoint of another search.
        AllocationError: no level is cheap enough, or a stage is visited by no step.

    Example:
        >>> result = stageprune.search(pipe, bank, target="macs:0.67", checkpoint="out/search.part")
        >>> stageprune.Bundle(bank, result.schedule).save("out/bundle")
        >>> stageprune.search(pipe, bank, init=result.schedule, fitness="frechet", judge="demo/dit-digits/judge")
    """
    return _planning.search(
        host_at(pipe, size, bank),
        bank,
        target=target,
        init=init,
        fitness=fitness,
        settings=settings,
        prompts=prompts,
        steps=steps,
        guidance=guidance,
        stages=stages,
        empty=empty,
        seed=seed,
        batch_size=batch_size,
        judge=judge_of(judge),
        checkpoint=checkpoint,
        mosaic=mosaic,
        processes=processes_here(),
    )


def compare(
    pipe: Any,
    bank: Bank,
    *,
    targets: Sequence[str | float] = _planning.DEFAULT_TARGETS,
    strategies: Sequence[str] = _planning.DEFAULT_STRATEGIES,
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    mosaic: MosaicSettings | None = None,
    fitness: str | Fitness | Measure = "latent_mse",
    judge: Judge | str | Path | None = None,
) -> Comparison:
    """Which way of making images for less serves this model best: each strategy under each budget, on seeds that none
    has planned on, beside the dense model with fewer steps.

    Args:
        pipe: the pipeline that the bank was made from.
        bank: the levels to choose from.
        targets: budgets, as of `allocate`, all of one kind.
        strategies: of `allocate`, and `fewer steps`: the dense model at the sampler's own spacing.
        prompts: of the probes; the calibration's first 64 by default. Up to 32 of them are also judged on.
        steps: of the dense run that budgets are shares of; those of the calibration by default.
        guidance: guidance scale; that of the calibration by default.
        size: of the images in pixels, a side or (height, width); what the bank was made for by default.
        seed: first seed of planning; judging takes others.
        batch_size: probes that run together.
        mosaic: parameters of MosaicDiff's closed form.
        fitness: what all are judged by, and `joint` and `steps` choose by, as for `search`.
        judge: for `frechet` and `accuracy`; a judge or its folder.

    Returns:
        A `Comparison`: `print` shows a table; `evaluate(..., comparison=...)` adds it to a report.

    Raises:
        AllocationError: no such strategy, budgets of different kinds, or nothing fits into any of them.

    Example:
        >>> print(stageprune.compare(pipe, bank, targets=[0.8, 0.5], strategies=["fewer steps", "measured", "joint"]))
    """
    return _planning.compare(
        host_at(pipe, size, bank),
        bank,
        targets=targets,
        strategies=strategies,
        prompts=prompts,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        mosaic=mosaic,
        fitness=fitness,
        judge=judge_of(judge),
    )
