"""From a budget to a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import AllocationError
from ..host import Host, Prompt
from ..pruning import Bank
from ..runtime import applied
from ..schedule import StageSchedule, Target
from .allocation import STRATEGIES, Allocation, Candidate, Entry, Request, Strategy, register_strategy
from .costs import TOLERANCE, Budget
from .defaults import DEFAULT_PROBES, DEFAULT_TARGET, partition_for, sampling_for
from .fitness import Fitness, Measure, fitness_of
from .joint import JumpTable
from .mosaic import MosaicSettings
from .partitions import Stages
from .rivals import rivals_within
from .table import ErrorTable

if TYPE_CHECKING:
    from ..evaluation.judge import Judge

__all__ = [
    "DEFAULT_PROBES",
    "DEFAULT_TARGET",
    "STRATEGIES",
    "TOLERANCE",
    "Allocation",
    "Candidate",
    "Entry",
    "Request",
    "Strategy",
    "allocate",
    "register_strategy",
]


@torch.no_grad()
def allocate(
    host: Host,
    bank: Bank,
    *,
    target: str | float | Target | Budget | None = None,
    strategy: str = "measured",
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    stages: Stages | None = None,
    empty: str | None = None,
    levels: Sequence[float] | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    table: ErrorTable | None = None,
    jumps: JumpTable | None = None,
    mosaic: MosaicSettings | None = None,
    fitness: str | Fitness | Measure = "latent_mse",
    judge: Judge | None = None,
    rivals: Sequence[StageSchedule] = (),
) -> Allocation:
    """Choose a level for each stage under a budget over the steps that the sampler executes.

    Args:
        host: the pipeline.
        bank: the levels to choose from.
        target: `macs:0.67` is 0.67 of the MACs that the dense model would execute over the same steps, and the default;
            `latency:0.77` and `speedup:1.3` count the measured time of denoiser calls on this device instead;
            `sparsity:0.3` the levels' sparsities. `hand` has no budget unless one is given. A `Budget` is a target
            with what levels cost, so that several calls plan by one measurement of their times.
        strategy: `uniform`, one level everywhere; `mosaic`, MosaicDiff's closed form; `pattern:front` and the other
            fixed patterns of Diff-ES; `hand`, the given `levels`; `measured`, exact dynamic programming over a
            measured error table, whose best choices are then run on held-out seeds; or, so that the schedule lists its
            steps, `joint`, steps and levels together, or `steps`, those of the dense model. Their `target` is a share
            of the dense run of `steps`, and their best few plans are run again on fresh seeds until one is ahead.
        prompts: probe prompts; half fill the error table, half are held out. The calibration's first 64 by default.
        steps: sampling steps; those of the calibration by default.
        guidance: guidance scale; that of the calibration by default.
        stages: a number of stages equal in tau; a partition's name (`equal-tau`, `equal-steps`, `equal-logsnr`, each
            with a number behind a colon if wanted, or `mosaic`); or inner boundaries in tau, falling. By default the
            bank's own stages, `mosaic` for that strategy, one a level for `hand`, and else 5 stages equal in tau, fewer
            if the sampler has fewer steps.
        empty: what to do with a stage that no step visits: `refuse` it, or `merge` it into its neighbour. By default
            stages that were asked for, or that the bank has, are refused, and those of the default partition merged.
        levels: for `hand`, the sparsity of each stage, noisiest first.
        seed: first probe seed; calibration seeds start at 0, so that the default never meets them.
        batch_size: probes that run together.
        table: `Allocation.table` of an earlier call with the same bank, stages, steps, guidance and image size, sampler
            and dtype, to save measuring it again for another target.
        jumps: `Allocation.jumps` of an earlier call, likewise, for the strategies that choose steps.
        mosaic: parameters of MosaicDiff's closed form.
        fitness: what `joint` and `steps` choose by, as for `search`, against a dense run on a fine grid.
        judge: what the fitnesses `frechet` and `accuracy` ask.
        rivals: schedules within the same budget that the choice of `joint` or `steps` must not be worse than: one of
            them is the choice, unless a plan is ahead of it. Those that list no steps run at the sampler's own, as
            many as they were planned for, or else `steps`. `steps` heeds dense ones alone.

    Raises:
        AllocationError: no level is cheap enough, a stage is visited by no step, `table` was measured otherwise, the
            strategy takes no fitness or no rivals, a rival is too dear, or the samples that it would choose by are not
            finite.
        FitnessError: a fitness that cannot be computed.
        ScheduleError: boundaries or levels that make no schedule of this bank.
    """
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
    chosen = fitness_of(fitness, judge)
    _check_strategy(strategy, stages, levels, chosen, rivals)
    default, wanted = STRATEGIES[strategy].stages, Target.parse(_target_of(target, strategy))
    partition = partition_for(sampling, bank, stages, empty, default or 1, levels)
    bank.bind(partition)
    with applied(host, bank) as pruner:
        budget = target if isinstance(target, Budget) else Budget.of(wanted, sampling, pruner)
        beside = rivals_within(rivals, budget, sampling, bank)
        request = Request(sampling, bank, budget, partition, pruner, table, jumps, chosen, beside)
        return STRATEGIES[strategy].run(request)


def _target_of(target: str | float | Target | Budget | None, strategy: str) -> str | float | Target:
    """What was asked for, or the default."""
    if target is None:
        return 1.0 if strategy == "hand" else DEFAULT_TARGET
    return target.target if isinstance(target, Budget) else target


def _check_strategy(
    strategy: str,
    stages: Stages | None,
    levels: Sequence[float] | None,
    fitness: Fitness,
    rivals: Sequence[StageSchedule],
) -> None:
    """AllocationError if there is no such strategy, or it does not take what was given."""
    if strategy not in STRATEGIES:
        raise AllocationError(f"`strategy` must be one of {', '.join(STRATEGIES)}; got {strategy!r}.")
    if (levels is not None) != (strategy == "hand"):
        raise AllocationError("strategy 'hand' needs `levels`, one a stage, noisiest first; no other takes them.")
    if STRATEGIES[strategy].stages is None:
        if stages is not None:
            raise AllocationError(
                f"strategy {strategy!r} makes stages of its own, around the steps that it chooses: leave out `stages`."
            )
        return
    if fitness.name != "latent_mse":
        raise AllocationError(
            f"strategy {strategy!r} takes no `fitness`; `joint` and `steps` do, and `search` finds levels for any."
        )
    if rivals:
        raise AllocationError(
            f"strategy {strategy!r} takes no `rivals`, got {len(rivals)}; `joint` and `steps` do. Leave them out."
        )
