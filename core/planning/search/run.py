"""From arguments to a search: everything is checked before anything is run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import SearchError
from ...host import Host, Prompt
from ...processes import Processes, Single
from ...pruning import Bank
from ...runtime import applied
from ...schedule import StageSchedule, Target
from ..allocation import Request
from ..costs import Budget
from ..defaults import DEFAULT_TARGET, partition_for, sampling_for
from ..fitness import Fitness, Measure, fitness_of
from ..mosaic import MosaicSettings
from ..partitions import Stages
from ..sampling import Sampling
from .checkpoint import Checkpoint
from .evolution import Evolution, Task
from .identity import identity_of
from .initial import Init, check_init
from .ledger import Ledger
from .probes import split
from .result import SearchResult
from .selection import probe_counts
from .settings import SearchSettings
from .space import Genome
from .state import SearchState

if TYPE_CHECKING:
    from ...evaluation.judge import Judge

logger = logging.getLogger(__name__)


@torch.no_grad()
def search(
    host: Host,
    bank: Bank,
    *,
    target: str | float | Target | None = None,
    init: Init | None = None,
    fitness: str | Fitness | Measure = "latent_mse",
    settings: SearchSettings | None = None,
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    stages: Stages | None = None,
    empty: str | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    judge: Judge | None = None,
    checkpoint: str | Path | None = None,
    mosaic: MosaicSettings | None = None,
    processes: Processes | None = None,
) -> SearchResult:
    """Search the levels of all stages by evolution, under a budget over the steps that the sampler executes.

    Args:
        host: the pipeline.
        bank: the levels to choose from.
        target: the budget, as for `allocate`.
        init: the initial pool: `random`, `uniform`, `patterns`, `hybrid`, a strategy of `allocate` or a schedule to
            start warm from; that of the settings by default.
        fitness: what is minimised: a name in `FITNESS`, a `Fitness`, or a function of what a candidate made and what
            the dense model made of the same probes, which gives a number a probe.
        settings: of the evolution.
        prompts: probe prompts; the second half is held out. The calibration's first 64 by default.
        steps: sampling steps; those of the calibration by default.
        guidance: guidance scale, for the dense model and the candidates; that of the calibration by default.
        stages: as for `allocate`; those of `init` if it is a schedule.
        empty: as for `allocate`.
        seed: first probe seed.
        batch_size: probes that run together.
        judge: what `frechet` and `accuracy` ask.
        checkpoint: a file that is replaced after every generation. If it exists and belongs to the same search, this
            goes on from there, to the identical schedule and history.
        mosaic: parameters of MosaicDiff's closed form.
        processes: that share the work; this one alone by default.

    Raises:
        SearchError: settings, probes, fitness or checkpoint that do not fit.
        AllocationError: no level is cheap enough, a stage is visited by no step, or the dense samples are not finite.
        ScheduleError: boundaries that make no schedule of this bank.
        KeyboardInterrupt: interrupted; the message says how to go on. The denoiser is as it was.
    """
    settings, processes = settings or SearchSettings(), processes or Single()
    begin = settings.init if init is None else init
    check_init(begin)
    chosen, wanted = fitness_of(fitness, judge), Target.parse(DEFAULT_TARGET if target is None else target)
    if batch_size < 1:
        raise SearchError(f"`batch_size` must be at least 1, got {batch_size}.")
    sampling = sampling_for(
        host,
        bank,
        prompts=prompts,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        mosaic=mosaic,
    )
    _check_probes(sampling, chosen, settings)
    partition = _partition(sampling, bank, stages, empty, begin)
    bank.bind(partition)
    identity = identity_of(sampling, bank, partition, wanted, chosen, judge, settings, begin)
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), identity)
    saved = _resume(file, processes)
    ours, held_out = split(sampling)
    with applied(host, bank) as pruner:
        costs: Mapping[float, int] = saved[0].costs if saved else Budget.of(wanted, ours, pruner).costs
        budget = Budget(wanted, processes.agree(costs))
        task = Task(Request(ours, bank, budget, partition, pruner), held_out, chosen, settings, begin)
        state, rows = saved or (SearchState(Random(settings.seed), dict(budget.costs)), {})
        ledger = Ledger(chosen, rows)

        def save() -> None:
            if file and processes.first:
                file.save(state, ledger.rows)

        evolution = Evolution(task, state, ledger, save, processes)
        try:
            save()
            return evolution.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(state, file)) from None


def _partition(sampling: Sampling, bank: Bank, stages: Stages | None, empty: str | None, init: Init) -> StageSchedule:
    if stages is None and isinstance(init, StageSchedule):
        stages = init.edges[1:-1]
    return partition_for(sampling, bank, stages, empty)


def _check_probes(sampling: Sampling, fitness: Fitness, settings: SearchSettings) -> None:
    """SearchError if there are too few prompts for two halves, each of which the fitness can do with."""
    half, least = len(sampling.prompts) // 2, fitness.probes
    if half < least:
        raise SearchError(
            f"fitness {fitness.name!r} needs {least} search probes, and as many are held out: give at least "
            f"{2 * least} `prompts` (they may repeat; each has a seed of its own), got {len(sampling.prompts)}."
        )
    counts = probe_counts(settings, fitness, half)
    logger.info("probes of each round: %s, held out: %d", counts, len(sampling.prompts) - half)


def _resume(file: Checkpoint | None, processes: Processes) -> tuple[SearchState, dict[Genome, Tensor]] | None:
    """What the first process finds in the file; all of them refuse what it refuses."""
    saved, problem = None, None
    if file and processes.first:
        try:
            saved = file.load()
        except SearchError as error:
            problem = str(error)
    saved, problem = processes.agree((saved, problem))
    if problem:
        raise SearchError(problem)
    return saved


def _interrupted(state: SearchState, file: Checkpoint | None) -> str:
    best = f", best {state.history[-1].best:.3e}" if state.history else ""
    how = (
        f"the same call goes on from {file.path}."
        if file
        else "it kept no checkpoint: give `checkpoint` to go on next time."
    )
    return f"search interrupted after {len(state.history)} generations{best}; {how}"
