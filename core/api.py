"""The public functions. Each takes a pipeline; the engine behind them takes a `Host`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import calibration as _calibration
from . import evaluation as _evaluation
from . import planning as _planning
from . import pruning as _pruning
from .bundle import Bundle, load_bundle
from .calibration import Alpha, Calibration, Layers
from .distributed import processes_here
from .errors import StagePruneError
from .evaluation import Judge
from .host import Host, Prompt, check_prompts
from .hosts.diffusers import DiffusersHost, Size
from .planning import ErrorTable, Fitness, JumpTable, MosaicSettings, Stages
from .planning.fitness import Measure
from .pruning import DEFAULT_LEVELS, Bank, LayerAllocation, Predecessors
from .pruning.bank import Sharing, fingerprint_of
from .runtime import pruner_of, remember_bank
from .schedule import StageSchedule


def judge_of(judge: Judge | str | Path | None) -> Judge | None:
    """A judge as it is given, or from its folder."""
    return Judge.load(judge) if isinstance(judge, str | Path) else judge


def host_for(pipe: Any, size: Size | None = None) -> Host:
    """The host of a pipeline; a Host is returned as it is. Refuses a pipeline that is being pruned already."""
    given = hasattr(pipe, "advance") and hasattr(pipe, "tau_reader")
    if given and size is not None:
        raise StagePruneError("`size` goes with a pipeline; this host was made for a size already.")
    host: Host = pipe if given else DiffusersHost(pipe, size)
    if pruner_of(host.denoiser) is not None:
        raise StagePruneError(
            "stage pruning is enabled on this pipeline, which would measure the pruned model as if it were dense. Call "
            "disable_stage_pruning() first."
        )
    return host


def host_at(pipe: Any, size: Size | None, made: Bank | Calibration | None) -> Host:
    """The host of a pipeline at `size`, by default at the one that `made` has recorded.

    That counts only if the pipeline can be driven, and `made` is of its denoiser: if not, whoever uses it says so.
    """
    host = host_for(pipe, size)
    if size is not None or made is None or not isinstance(host, DiffusersHost) or host is pipe:
        return host
    calibrated: Mapping[str, Any] = made.provenance.get("calibration") or {}
    recorded, own = made.provenance.get("size") or calibrated.get("size"), host.describe()["size"]
    if recorded in (None, own) or own is None or made.fingerprint.mismatch(fingerprint_of(host.denoiser)):
        return host
    return host_for(pipe, recorded)


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    steps: int = 25,
    guidance: float | None = None,
    size: Size | None = None,
    stages: int | Sequence[float] = 1,
    alpha: Alpha = "uniform",
    kinds: Sequence[str] = ("head", "neuron"),
    layers: Layers = "consumers",
    skip_blocks: bool = False,
    taylor: float | None = None,
    tokens: float | None = None,
    hessian_budget: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
) -> Calibration:
    """Accumulate the Hessians of every consumer's inputs on the pipeline's own dense trajectories.

    Started by `accelerate launch` (or `torchrun`) in several processes, each runs its share of the prompts, and each
    returns the sums of all.

    Args:
        pipe: a diffusers pipeline of a supported family.
        prompts: texts or class labels; each gets its own seed (`seed`, `seed + 1`, ...).
        steps: sampling steps.
        guidance: guidance scale, the pipeline's usual one by default; above 1 the unconditional pass is recorded too.
        size: of the images in pixels, a side or (height, width); what the pipeline makes by itself by default.
        stages: equal stages kept apart (needed for orders or consumers per stage), or inner boundaries in tau, falling.
        alpha: weight of each step: `uniform`, `log-decrease` (OBS-Diff, equation 5), `log-increase`, `linear-decrease`,
            `linear-increase`, or a function from tau in [0, 1] to a weight.
        kinds: unit kinds that will be pruned; add `channel` for the convolutions of a UNet (their Hessians are large).
            `block` scores whole blocks, for method `depth`.
        layers: `consumers`, whose inputs `prune` needs, or `all`: the producers' too (q, k, v, up), for `sparsify`.
        skip_blocks: with kind `block`, also run the denoiser without each block, for method `depth-output`.
        taylor: also take gradients of the denoising loss, for method `taylor`, at the steps with at least this share of
            the largest loss (Diff-Pruning: 0.05). None takes none.
        tokens: share of each call's inputs that Hessians are summed over, drawn at random. None is as many as a Hessian
            needs, layer by layer: about 24 for each of its columns in each stage, all if there are fewer.
        hessian_budget: GiB of Hessians that are held where the denoiser is; what does not fit is summed in further runs
            over the same prompts. None is one run.
        seed: first seed.
        batch_size: prompts that run together.
        checkpoint: file rewritten after each batch; an interrupted call goes on from it to the identical result. Each
            of several processes has its own beside it.

    Raises:
        CalibrationError: too few data for the Hessians' rank, a budget that is too small, or a checkpoint of another
            call.

    Example:
        >>> calibration = stageprune.calibrate(pipe, list(range(10)) * 4, steps=20)
        >>> calibration.save("out/calibration.safetensors")
    """
    host = host_for(pipe, size)
    return _calibration.calibrate(
        host,
        prompts,
        steps=steps,
        guidance=host.default_guidance if guidance is None else guidance,
        stages=stages,
        alpha=alpha,
        kinds=kinds,
        layers=layers,
        skip_blocks=skip_blocks,
        taylor=taylor,
        tokens=tokens,
        hessian_budget=hessian_budget,
        seed=seed,
        batch_size=batch_size,
        checkpoint=checkpoint,
        processes=processes_here(),
    )


def prune(
    pipe: Any,
    calibration: Calibration | None = None,
    *,
    method: str = "obs",
    levels: Sequence[float] = DEFAULT_LEVELS,
    kinds: Sequence[str] | None = None,
    order: Sharing = "shared",
    consumers: Sharing = "shared",
    layer_allocation: LayerAllocation | None = None,
    layer_prompts: int = 4,
    predecessors: Predecessors = "dense",
    predecessor_prompts: int = 32,
    hessian_budget: float | None = None,
    multiple: int = 64,
    minimum: float = 0.0,
    shares: Mapping[str, float] | None = None,
    keep_dense: Sequence[str] = (),
    damping: float = 0.01,
    seed: int = 0,
    size: Size | None = None,
) -> Bank:
    """Order every group's units and compensate every consumer at every level. The pipeline is not changed, but it knows
    the bank afterwards: `pipe.enable_stage_pruning(schedule)` works with a bare schedule.

    Args:
        pipe: the pipeline that was calibrated.
        calibration: its Hessians; `obs`, `wanda` and `activation` need them, `magnitude` and `random` do not; `depth`
            needs one that was made with `kinds=["block"]`, `taylor` one that was made with `taylor=0.05`.
        method: one of `stageprune.methods()`.
        levels: sparsities in [0, 1), the share of prunable MACs to remove; dense is always added.
        kinds: unit kinds to prune: `head`, `neuron`, and for UNets `channel`; by default those that were calibrated.
            `["block"]` skips whole blocks (`depth`, `depth-output`, `random`).
        order: `shared` (one order, prefix views, free switches) or `stage` (one a stage, gathered at a switch).
        consumers: `shared` (one compensated consumer a level) or `stage` (one a level and stage).
        layer_allocation: how a level is divided among the groups: `measured`, by how far samples would move if one
            group alone were pruned (the default of `obs`; 25 guided calls of the denoiser for each group, about half of
            which is remembered from dense ones), or `uniform`, the same share in every group (the default of the other
            methods).
        layer_prompts: prompts to measure that with, the calibration's first ones.
        predecessors: compensate consumers for inputs from `dense` predecessors, or from those that each level has
            itself (`pruned`: asymmetric compensation, which runs every level beside the dense denoiser).
        predecessor_prompts: prompts of these runs, the calibration's first ones.
        hessian_budget: GiB that the sums of these runs may take; what does not fit goes into further packages, each of
            which sees what the packages before it have become. None is one package.
        multiple: neurons are kept in multiples of this.
        minimum: share of each group's units that stays at every level.
        shares: unit kind -> how much of a level it takes, relative to the other kinds: `{"head": 0.5}` takes half as
            large a share of the heads as of the rest. Levels are then divided uniformly.
        keep_dense: groups to leave alone, by name or with wildcards (`blocks.0.*`; `stageprune inspect PIPE` lists
            them); levels are shares of the rest.
        damping: added to each Hessian's diagonal, relative to its mean.
        seed: for methods that draw.
        size: in pixels, a side or (height, width): MACs are counted at this size; that of the calibration by default.

    Raises:
        BankError: an argument is out of range.
        CalibrationError: the calibration is missing, of another model, or too small.

    Example:
        >>> bank = stageprune.prune(pipe, calibration, levels=[0, 0.2, 0.35, 0.5])
    """
    host = host_at(pipe, size, calibration)
    bank = _pruning.prune(
        host,
        calibration,
        method=method,
        levels=levels,
        kinds=kinds,
        order=order,
        consumers=consumers,
        layer_allocation=layer_allocation,
        layer_prompts=layer_prompts,
        predecessors=predecessors,
        predecessor_prompts=predecessor_prompts,
        hessian_budget=hessian_budget,
        multiple=multiple,
        minimum=minimum,
        shares=shares,
        keep_dense=keep_dense,
        damping=damping,
        seed=seed,
    )
    remember_bank(host.denoiser, bank)
    return bank


def allocate(
    pipe: Any,
    bank: Bank,
    *,
    target: str | float | None = None,
    strategy: str = "measured",
    prompts: Sequence[Prompt] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    stages: Stages | None = None,
    empty: str | None = None,
    levels: Sequence[float] | None = None,
    seed: int = 10_000,
    batch_size: int = 32,
    table: ErrorTable | None = None,
    jumps: JumpTable | None = None,
    mosaic: MosaicSettings | None = None,
    fitness: str | Fitness | Measure = "latent_mse",
    judge: Judge | str | Path | None = None,
    rivals: Sequence[StageSchedule] = (),
) -> _planning.Allocation:
    """Choose a level for each stage under a budget over the steps that the sampler really runs.

    Args:
        pipe: the pipeline that the bank was made from.
        bank: the levels to choose from.
        target: `macs:0.67`, the default, is 0.67 of the dense MACs over the same steps; `latency:0.77` and
            `speedup:1.3` count time, measured on this device; `sparsity:0.3` is the mean of the levels' sparsities.
        strategy: `measured` (error table, exact dynamic programming, a race of the best few on other seeds), `uniform`,
            `mosaic` (MosaicDiff's closed form), `pattern:front`, `back`, `middle`, `ends` or `zigzag` (Diff-ES's fixed
            shapes), or `hand` with `levels`. `joint` chooses how many steps to make, and where, together with their
            levels; `steps` chooses only the steps, all dense. Their target is a share of the dense run of `steps`.
        prompts: of the probes; the calibration's first 64 by default.
        steps: sampling steps; those of the calibration by default.
        guidance: guidance scale; that of the calibration by default.
        size: of the images in pixels, a side or (height, width); what the bank was made for by default.
        stages: a number of stages equal in tau; `equal-tau`, `equal-steps` or `equal-logsnr`, each with a number behind
            a colon if wanted (`equal-steps:4`); `mosaic`; or inner boundaries in tau, falling. 5 by default, or the
            bank's own.
        empty: a stage that no step visits is refused (`refuse`, the default for stages that were asked for) or joined
            to its neighbour (`merge`, the default for the default stages).
        levels: for `hand`, the sparsity of each stage, noisiest first; checked against `target` if that is given.
        seed: first probe seed.
        batch_size: probes that run together.
        table: `Allocation.table` of an earlier call with the same bank, stages, steps, guidance, size,
            sampler and dtype.
        jumps: `Allocation.jumps` of an earlier call, likewise, for the strategies that choose steps.
        mosaic: parameters of MosaicDiff's closed form.
        fitness: what `joint` and `steps` choose by: a name or function, as for `search`. `latent_mse`, the default, is
            how near the dense model's own samples are; `frechet`, which wants many prompts, how near real ones.
        judge: for `frechet` and `accuracy`; a judge or its folder.
        rivals: schedules within the same budget that the choice of `joint` or `steps` must not be worse than: one of
            them is the choice, unless a plan is ahead of it. Those that list no steps run at the sampler's own, as
            many as they were planned for, or else `steps`. `steps` heeds dense ones alone.

    Returns:
        An `Allocation`: the schedule, its executed cost, the error table and the candidates that were tried.

    Raises:
        AllocationError: no level is cheap enough, a stage is visited by no step, `table` was measured otherwise, or a
            rival is too dear.
        FitnessError: a fitness that cannot be computed.

    Example:
        >>> allocation = stageprune.allocate(pipe, bank, target="macs:0.67")
        >>> stageprune.Bundle(bank, allocation.schedule).save("out/bundle")
        >>> stageprune.allocate(pipe, bank, target="speedup:1.3", stages="equal-steps:4")
    """
    return _planning.allocate(
        host_at(pipe, size, bank),
        bank,
        target=target,
        strategy=strategy,
        prompts=prompts,
        steps=steps,
        guidance=guidance,
        stages=stages,
        empty=empty,
        levels=levels,
        seed=seed,
        batch_size=batch_size,
        table=table,
        jumps=jumps,
        mosaic=mosaic,
        fitness=fitness,
        judge=judge_of(judge),
        rivals=rivals,
    )


def evaluate(
    pipe: Any,
    bundle: Bundle | str | Path,
    *,
    prompts: Sequence[Prompt] | None = None,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    seed: int = 20_000,
    batch_size: int = 32,
    judge: Judge | str | Path | None = None,
    allocation: _planning.Allocation | None = None,
    search: _planning.SearchResult | None = None,
    comparison: _planning.Comparison | None = None,
    command: str | None = None,
) -> _evaluation.Report:
    """Compare a bundle's schedule with dense, uniform, magnitude and dense with fewer steps, all on the same seeds.

    Args:
        pipe: the pipeline that the bundle was made from.
        bundle: a bundle with a schedule, or its folder or Hub id.
        prompts: repeated up to `count`; those of the calibration by default.
        count: images of each variant.
        steps: sampling steps; those that the schedule was planned for by default, or else of the calibration.
        guidance: guidance scale; that of the calibration by default.
        size: of the images in pixels, a side or (height, width); what the bank was made for by default.
        seed: first seed.
        batch_size: samples that run together; each batch is a round of timing.
        judge: a classifier for class accuracy and Frechet distance, or its folder.
        allocation: adds the error table, and how well it predicted, to the report.
        search: adds the course of the search that found the schedule.
        comparison: adds strategies side by side, from `compare`.
        command: what made the report, printed in it.

    Returns:
        A `Report`: `print(report)` shows the table, `report.save(folder)` writes HTML and JSON.

    Raises:
        StagePruneError: the bundle has no schedule, or is of another model; or the extra `report` is missing.

    Example:
        >>> stageprune.evaluate(pipe, "out/bundle", judge="demo/dit-digits/judge").save("out/report")
    """
    check_prompts(prompts)
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    return _evaluation.evaluate(
        host_at(pipe, size, loaded.bank),
        loaded,
        prompts=prompts,
        count=count,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        judge=judge_of(judge),
        allocation=allocation,
        search=search,
        comparison=comparison,
        command=command,
    )
