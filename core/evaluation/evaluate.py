"""`evaluate`: how good a pruned pipeline is, beside dense, uniform, magnitude and fewer steps."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bundle import Bundle
from ..errors import StagePruneError
from ..groups import Group
from ..host import Host, Prompt
from ..planning import Allocation, Comparison, SearchResult
from ..pruning import Bank
from ..runtime import StagePruner, StageSummary, pruner_of, summarise
from ..version import __version__
from .benchmark import environment
from .curve import error_curve
from .extras import require_report_extra
from .judge import Judge
from .metrics import mse
from .report import Report
from .rows import Row
from .runs import Job, run_variants, warm_up
from .scores import Pictures, score
from .variants import FEWER_STEPS, SCHEDULE, Variant, make_variants

EQUAL_COST = 0.02
"""Variants further than this from the schedule, in shares of the dense MACs, are noted."""

WORST = 4
"""Worst cases shown beside the grid."""


@torch.no_grad()
def evaluate(
    host: Host,
    bundle: Bundle,
    *,
    prompts: Sequence[Prompt] | None = None,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 20_000,
    batch_size: int = 32,
    judge: Judge | None = None,
    grid: int = 8,
    curve: bool = True,
    allocation: Allocation | None = None,
    search: SearchResult | None = None,
    comparison: Comparison | None = None,
    command: str | None = None,
) -> Report:
    """Measure a bundle's schedule against the dense model and against its rivals at about the same cost.

    All variants get the same prompts and seeds: `dense`, the bundle's `schedule`, `uniform` (the level of the same bank
    whose MACs are nearest), `magnitude` (pruned by magnitude at that level) and `fewer steps` (dense). They run in
    turn, batch by batch, and their times are compared within each round.

    Args:
        host: the pipeline, dense; it is left as it was, bit for bit.
        bundle: the bank and the schedule to judge.
        prompts: repeated up to `count`; those of the calibration, or else the host's own, by default.
        count: samples of each variant, at least 2.
        steps: sampling steps; those that the schedule was planned for by default, or else of the calibration, or 25.
        guidance: guidance scale; that of the calibration by default, or the pipeline's usual one.
        seed: first seed; calibration and allocation use lower ones, so that the default never meets them.
        batch_size: samples that run together; each batch is a round of timing.
        judge: gives accuracy (of classes, or of captions) and Fréchet distance; without it the report has paired
            metrics only. It is put in evaluation mode.
        grid: columns of the picture grid.
        curve: also run every level, and dense with fewer steps, on 16 samples.
        allocation: what chose the bundle's schedule: adds its error table and predictions.
        search: what found the bundle's schedule: adds the course of the search.
        comparison: of strategies: adds its picture and table.
        command: what made the report, to be printed in it.

    Raises:
        StagePruneError: no schedule, no pruned level, no prompt, an allocation of another schedule, a bundle of another
            model, a prompt that the model or the judge does not know, or the extra `report` is missing. Nothing has
            been sampled then.

    Example:
        >>> report = evaluate(DiffusersHost(pipe), bundle, count=64, judge=load_judge("demo/dit-digits"))
        >>> print(report)
        >>> report.save("out/report")
    """
    require_report_extra()
    made: Mapping[str, Any] = bundle.bank.provenance.get("calibration") or {}
    steps = steps if steps is not None else bundle.planned_steps or 25
    guidance = guidance if guidance is not None else made.get("guidance", host.default_guidance)
    if prompts is not None and not len(prompts):
        raise StagePruneError(
            "`prompts` is empty: give at least one text or class label, or leave it out for those of the calibration."
        )
    _check(host, bundle, allocation, search, count=count, batch_size=batch_size, steps=steps)
    prompts = prompts if prompts is not None else made.get("prompts") or host.default_prompts()
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    conditions = host.encode(prompts)
    wanted = None if judge is None else judge.wanted(prompts, conditions)
    summary = _summary(host, bundle, steps)
    job = Job(host, conditions, range(seed, seed + count), guidance, batch_size)
    variants = make_variants(host, bundle, steps)

    warm_up(job, variants)
    runs = run_variants(job, variants)
    shown, worst = list(range(min(grid, count))), _worst(runs[1].latents, runs[0].latents)
    if judge is not None:
        judge.eval()
    rows, images = score(job, runs, judge, wanted, [*shown, *worst])
    labels = [_label(prompt, number) for prompt, number in zip(prompts, job.seeds, strict=True)]
    return Report(
        rows=tuple(rows),
        schedule=bundle.schedule,  # type: ignore[arg-type]  # checked above
        summary=summary,
        taus=tuple(bundle.schedule.taus or host.taus(steps)),  # type: ignore[union-attr]  # checked above
        environment=_environment(job, bundle, steps, judge),
        notes=(*_broken(rows), *_notes(variants, judge, wanted is not None, count)),
        grid=_pictures(variants, labels, images, shown),
        worst=_pictures(variants, labels, images, worst),
        curve=error_curve(job, bundle, runs) if curve else (),
        allocation=allocation,
        command=command,
        layers={group.name: _shares(group, bundle.bank) for group in bundle.bank.groups},
        sparsities=bundle.bank.sparsities,
        layer_allocation=bundle.bank.provenance.get("layer_allocation"),
        search=search,
        comparison=comparison,
    )


def _shares(group: Group, bank: Bank) -> tuple[float, ...]:
    return tuple(count / group.size for count in bank.kept[group.name])


def _check(
    host: Host, bundle: Bundle, allocation: Allocation | None, search: SearchResult | None, **numbers: int
) -> None:
    if bundle.schedule is None:
        raise StagePruneError(
            "the bundle has no schedule, so there is nothing to evaluate. Make one with stageprune.allocate and pass "
            "Bundle(bank, schedule)."
        )
    if len(bundle.bank.sparsities) < 2:
        raise StagePruneError("the bank has no level but dense, so there is nothing to evaluate.")
    for name, value in numbers.items():
        least = 2 if name == "count" else 1
        if value < least:
            raise StagePruneError(f"`{name}` must be at least {least}, got {value}.")
    if pruner_of(host.denoiser) is not None:
        raise StagePruneError("stage pruning is enabled on this pipeline; call disable_stage_pruning() first.")
    bundle.bank.check_denoiser(host.denoiser)
    for name, made in (("allocation", allocation), ("search", search)):
        if made is not None and made.schedule != bundle.schedule:
            raise StagePruneError(
                f"`{name}` chose another schedule than the bundle's; give the one that chose it, or none."
            )


def _summary(host: Host, bundle: Bundle, steps: int) -> StageSummary:
    """Sparsity and memory as enabling this bundle gives them: the schedule's own levels only."""
    assert bundle.schedule is not None
    pruner = StagePruner(host.denoiser, bundle.bank, bundle.schedule, host.tau_reader, size=host.input_size)
    try:
        taus = bundle.schedule.taus or host.taus(steps)
        return summarise(pruner, taus, len(taus))
    finally:
        pruner.detach()


def _worst(latents: Tensor, dense: Tensor) -> list[int]:
    """The samples on which the schedule differs most from dense, worst first."""
    order = mse(latents, dense).argsort(descending=True)
    return [int(index) for index in order[:WORST]]


def _label(prompt: Prompt, seed: int) -> str:
    """Two lines that fit over a picture."""
    return f"{textwrap.shorten(str(prompt), 13, placeholder='…')}\nseed {seed}"


def _pictures(
    variants: Sequence[Variant], labels: Sequence[str], images: Mapping[int, Tensor], samples: Sequence[int]
) -> Pictures:
    stacked = torch.stack([images[i] for i in samples], 1) if samples else torch.zeros(len(variants), 0, 3, 1, 1)
    return Pictures(tuple(variant.description for variant in variants), tuple(labels[i] for i in samples), stacked)


def _environment(job: Job, bundle: Bundle, steps: int, judge: Judge | None) -> dict[str, Any]:
    described = job.host.describe()
    facts = {key: described[key] for key in ("model", "pipeline", "component", "scheduler") if described.get(key)}
    if described.get("size"):
        facts["size"] = "{} x {} pixels".format(*described["size"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts |= {
        "samples": len(job.seeds),
        "seeds": f"{job.seeds[0]} to {job.seeds[-1]}",
        "steps": steps,
        "guidance": job.guidance,
        "batch size": job.batch_size,
        "timing rounds": len(job.batches),
        "bank": f"method {bundle.bank.method}, levels {', '.join(f'{value:g}' for value in bundle.bank.sparsities)}",
    }
    if judge is not None:
        facts["judge"] = f"{_percent(judge.held_out_accuracy)} of {judge.held_out_images} held-out real images right"
        facts["judge's reference"] = f"{judge.reference_images} real images"
    machine = {**environment(job.host.denoiser), "cores": cores}
    return {**facts, **machine, **described.get("versions", {}), "stageprune": __version__}


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.1%}"


def _broken(rows: Sequence[Row]) -> list[str]:
    """Which variants gave samples that are not finite, and what this does to the numbers."""
    found = ", ".join(f"{row.description}: {row.broken} of {len(row.latent_errors)}" for row in rows if row.broken)
    if not found:
        return []
    if rows[0].broken:
        remedy = "Dense is among them, so paired metrics say nothing: check `guidance` and the pipeline's precision."
    else:
        remedy = "Their levels break the model: choose lower ones, or prune in float32 or bfloat16."
    return [f"Samples that are not finite, which is never the best value and never accurate: {found}. {remedy}"]


def _notes(variants: Sequence[Variant], judge: Judge | None, checked: bool, count: int) -> list[str]:
    """What a reader must know to read the numbers right."""
    notes = []
    if judge is None:
        notes.append("No judge was given, so accuracy and Fréchet distance were not measured.")
    else:
        if checked:
            notes.append(f"Accuracy is {judge.measures}; one image is {1 / count:.1%} of it.")
        else:
            notes.append(
                f"The prompts are of a sort that the judge cannot check, so {judge.measures} was not measured."
            )
        notes.append(f"{count} samples overstate a Fréchet distance: compare the rows with each other only.")
    schedule = next(variant for variant in variants if variant.name == SCHEDULE)
    unequal = [variant for variant in variants[2:] if abs(variant.macs_share - schedule.macs_share) > EQUAL_COST]
    if unequal:
        costs = ", ".join(f"{variant.description}: {variant.macs_share:.3f}" for variant in unequal)
        notes.append(f"Not at the schedule's cost of {schedule.macs_share:.3f} of the dense MACs: {costs}.")
    if schedule.schedule is not None and len(set(schedule.schedule.levels)) == 1:
        notes.append("The schedule runs one level everywhere, so `uniform` repeats it.")
    if all(variant.name != FEWER_STEPS for variant in variants):
        notes.append("The run has one step, so there is no variant with fewer.")
    return notes
