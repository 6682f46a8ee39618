"""The verbs that make a bank: `calibrate` and `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    AlphaName,
    Batch,
    Consumers,
    Device,
    Dtype,
    HessianBudget,
    KeepDense,
    Kinds,
    LayerAllocation,
    Layers,
    Out,
    OwnSize,
    Pipe,
    PredecessorsOption,
    Prompts,
    Shares,
    Size,
    SkipBlocks,
    Taylor,
    Tokens,
    gibibytes,
    load,
    numbers,
    pixels,
    read_prompts,
    repeat,
    shares_of,
    words,
)


def calibrate(
    pipe: Pipe,
    out: Out = Path("out/calibration.safetensors"),
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="How many prompts; a shorter list repeats, with new seeds.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's usual one.")] = None,
    size: OwnSize = None,
    stages: Annotated[int, typer.Option(min=1, help="Stages kept apart (for orders or consumers per stage).")] = 1,
    kinds: Kinds = None,
    layers: Layers = "consumers",
    skip_blocks: SkipBlocks = False,
    taylor: Taylor = None,
    tokens: Tokens = None,
    hessian_budget: HessianBudget = None,
    alpha: AlphaName = "uniform",
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Run the pipeline on prompts and accumulate what pruning needs to know. Interrupted? Run it again: it goes on.

    Several GPUs: accelerate launch -m stageprune calibrate PIPE ...
    """
    from .api import calibrate as run
    from .distributed import processes_here
    from .processes import own_file

    processes = processes_here()
    pipeline = load(pipe, processes.device if device == "auto" else device, dtype)
    part = out.with_name(out.name + ".part")
    chosen = repeat(read_prompts(prompts, pipeline), count)
    result = run(
        pipeline,
        chosen,
        steps=steps,
        guidance=guidance,
        size=pixels(size),
        stages=stages,
        alpha=alpha,
        kinds=words(kinds or "head,neuron"),
        layers=layers,  # type: ignore[arg-type]  # checked by calibrate
        skip_blocks=skip_blocks,
        taylor=taylor,
        tokens=tokens,
        hessian_budget=gibibytes(hessian_budget),
        seed=seed,
        batch_size=batch_size,
        checkpoint=part,
    )
    if processes.first:
        result.save(out)
        typer.echo(f"{result}\nsaved to {out}")
    own_file(part, processes).unlink(missing_ok=True)


def prune(
    pipe: Pipe,
    calibration: Annotated[
        Path | None, typer.Option(help="What `calibrate` wrote. Data-free methods need none.")
    ] = None,
    out: Out = Path("out/bank"),
    method: Annotated[
        str, typer.Option(help="obs, wanda, activation, taylor, magnitude, random; for blocks depth.")
    ] = "obs",
    levels: Annotated[str, typer.Option(help="Sparsities of the levels.")] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    kinds: Kinds = None,
    order: Annotated[str, typer.Option(help="One order for all stages (shared) or one a stage (stage).")] = "shared",
    consumers: Consumers = "shared",
    layer_allocation: LayerAllocation = None,
    layer_prompts: Annotated[int, typer.Option(min=1, help="Prompts to measure layers with.")] = 4,
    predecessors: PredecessorsOption = "dense",
    predecessor_prompts: Annotated[int, typer.Option(min=1, help="Prompts of --predecessors pruned.")] = 32,
    hessian_budget: HessianBudget = None,
    multiple: Annotated[int, typer.Option(min=1, help="Keep neurons in multiples of this.")] = 64,
    minimum: Annotated[float, typer.Option(help="Share of each layer's units that stays at every level.")] = 0.0,
    shares: Shares = None,
    keep_dense: KeepDense = None,
    damping: Annotated[float, typer.Option(help="Relative damping of the Hessians.")] = 0.01,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Make the bank of levels and save it as a bundle without a schedule (`allocate` adds one)."""
    from .api import prune as run
    from .bundle import Bundle, check_bundle_folder
    from .calibration import Calibration

    check_bundle_folder(out)  # before minutes of work, not after
    loaded = Calibration.load(calibration) if calibration else None
    bank = run(
        load(pipe, device, dtype),
        loaded,
        method=method,
        levels=numbers(levels, "--levels"),
        kinds=words(kinds) if kinds else None,
        order=order,  # type: ignore[arg-type]  # checked by prune
        consumers=consumers,  # type: ignore[arg-type]
        layer_allocation=layer_allocation,  # type: ignore[arg-type]
        layer_prompts=layer_prompts,
        predecessors=predecessors,  # type: ignore[arg-type]  # checked by prune
        predecessor_prompts=predecessor_prompts,
        hessian_budget=gibibytes(hessian_budget),
        multiple=multiple,
        minimum=minimum,
        shares=shares_of(shares),
        keep_dense=words(keep_dense) if keep_dense else (),
        damping=damping,
        size=pixels(size),
    )
    Bundle(bank).save(out)
    typer.echo(f"{bank}\nsaved to {out}")
