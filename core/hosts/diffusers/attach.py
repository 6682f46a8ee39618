"""`pipe.enable_stage_pruning(...)`: plain functions on a pipeline or a denoiser, and the methods that delegate to
them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bundle import Bundle, load_bundle
from ...errors import ScheduleError, StagePruneError
from ...groups import measure_cost
from ...runtime import Resident, StagePruner, StageSummary, known_bank, pruner_of, remember_bank, summarise
from ...schedule import StageSchedule
from .host import DiffusersHost, find_denoiser
from .listed import is_listed, original
from .pipelines import Size
from .timesteps import reader_for

logger = logging.getLogger(__name__)


def enable_stage_pruning(
    target: Any, source: str | Path | Bundle | StageSchedule, *, resident: Resident = "all"
) -> StagePruner:
    """Run each stage of the denoising trajectory at its own level.

    Args:
        target: a pipeline, or its denoiser. State lives on the denoiser: pipelines that share it are pruned alike.
        source: a bundle (Hub id, folder or `Bundle`), or a `StageSchedule` for the bank that the denoiser already knows
            (from `prune`, or from an earlier enable).
        resident: `all` keeps every level of the schedule on the device; `active` keeps the others in host memory and
            copies at a switch, so that the device never holds more than the dense model.

    A schedule that lists its steps (strategy `joint`) makes the pipeline visit these, by its own solver: call it with
    `num_inference_steps` of that number. Disabling gives the pipeline its scheduler back.

    Returns:
        The pruner, for those who want to look inside.

    Raises:
        StagePruneError: already enabled, no bank known, or the denoiser cannot be pruned; nothing has been changed
            then.

    Example:
        >>> pipe.enable_stage_pruning("out/bundle")
        >>> images = pipe([3, 7], num_inference_steps=20).images
        >>> pipe.disable_stage_pruning()
    """
    denoiser = _denoiser(target)
    if isinstance(source, StageSchedule):
        bank, schedule = known_bank(denoiser), source
        if bank is None:
            raise StagePruneError(
                "no bank is known for this denoiser, so a schedule alone cannot be enabled. Enable a bundle first, or "
                "make a bank with stageprune.prune."
            )
    else:
        bundle = source if isinstance(source, Bundle) else load_bundle(source)
        if bundle.schedule is None:
            remember_bank(denoiser, bundle.bank)
            raise ScheduleError(
                "the bundle has no schedule. Make one with stageprune.allocate, or enable a StageSchedule: its "
                "bank is known now."
            )
        bank, schedule = bundle.bank, bundle.schedule
    if isinstance(target, nn.Module):
        if schedule.taus is not None:
            logger.warning("the schedule lists %d steps, which only a pipeline can run.", len(schedule.taus))
        pruner = StagePruner(denoiser, bank, schedule, reader_for(denoiser), resident=resident)
        remember_bank(denoiser, bank)
        return pruner
    host = DiffusersHost(target)
    listed = None if schedule.taus is None else host.visiting(schedule.taus).scheduler
    pruner = StagePruner(denoiser, bank, schedule, host.tau_reader, resident=resident, size=host.input_size)
    remember_bank(denoiser, bank)
    if listed is not None:
        target.scheduler = listed
    return pruner


def disable_stage_pruning(target: Any) -> None:
    """Restore the denoiser, bit for bit, and the pipeline's scheduler. Warns if nothing was enabled."""
    pruner = pruner_of(_denoiser(target))
    if not isinstance(target, nn.Module) and is_listed(target.scheduler):
        target.scheduler = original(target.scheduler)
    if pruner is None:
        logger.warning("disable_stage_pruning: stage pruning was not enabled on this %s.", type(target).__name__)
        return
    pruner.detach()


def is_stage_pruning_enabled(target: Any) -> bool:
    """Whether stage pruning is enabled."""
    return pruner_of(_denoiser(target)) is not None


def stage_pruning_summary(target: Any, steps: int | None = None, size: Size | None = None) -> StageSummary:
    """Stages, levels, parameters, MACs and memory, requested and realised.

    Args:
        target: a pipeline or its denoiser, with stage pruning enabled.
        steps: also show what a run of so many steps executes (pipelines only); those that the schedule
            lists or was planned for by default.
        size: of the images in pixels, a side or (height, width) (pipelines only); by default MACs are those of the size
            that the pipeline makes by itself.
    """
    pruner = pruner_of(_denoiser(target))
    if pruner is None:
        raise StagePruneError("stage pruning is not enabled; call enable_stage_pruning() first.")
    if isinstance(target, nn.Module):
        if size is not None:
            raise StagePruneError("`size` is in pixels of the image: pass the pipeline, not its denoiser alone.")
        return summarise(pruner)
    host = DiffusersHost(target, size)
    if steps is None and is_listed(target.scheduler):
        steps = len(pruner.schedule.taus or ())
    elif steps is None:
        steps = pruner.schedule.planned_steps
    taus = None if steps is None else host.taus(steps)
    if size is None:
        return summarise(pruner, taus, steps)
    cost = measure_cost(_dense_twin(host.denoiser), size=host.input_size)
    return summarise(pruner, taus, steps, at=(cost, host.input_size))


def _dense_twin(denoiser: Any) -> nn.Module:
    """The denoiser as its configuration makes it, without weights."""
    with torch.device("meta"):
        twin: nn.Module = type(denoiser).from_config(denoiser.config)
    return twin


METHODS = (enable_stage_pruning, disable_stage_pruning, is_stage_pruning_enabled, stage_pruning_summary)


def attach() -> None:
    """Add the functions above as methods to every pipeline class. New names only; nothing of diffusers is replaced.

    Done by `import stageprune` unless STAGEPRUNE_NO_ATTACH=1.
    """
    if os.environ.get("STAGEPRUNE_NO_ATTACH") == "1":
        return
    for base in _pipeline_bases():
        for function in METHODS:
            existing = base.__dict__.get(function.__name__)
            if existing is None:
                setattr(base, function.__name__, function)
            elif not _is_ours(existing):
                logger.warning(
                    "%s.%s exists already; use stageprune.%s instead.",
                    base.__name__,
                    function.__name__,
                    function.__name__,
                )


def detach() -> None:
    """Undo `attach`."""
    for base in _pipeline_bases():
        for function in METHODS:
            if base.__dict__.get(function.__name__) is function:
                delattr(base, function.__name__)


def _is_ours(function: Any) -> bool:
    """Also true for a second copy of this library (installed, and cloned into ComfyUI)."""
    return str(getattr(function, "__module__", "")).endswith("core.hosts.diffusers.attach")


def _pipeline_bases() -> list[type]:
    import diffusers  # noqa: PLC0415

    return [
        base
        for name in ("DiffusionPipeline", "ModularPipeline")
        if (base := getattr(diffusers, name, None)) is not None
    ]


def _denoiser(target: Any) -> nn.Module:
    if isinstance(target, nn.Module):
        return getattr(target, "_orig_mod", target)
    return find_denoiser(target)[1]
