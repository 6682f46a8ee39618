"""The `stageprune` command: every public function as a verb."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

from .errors import StagePruneError

try:
    import typer
    from rich.console import Console
except ImportError:
    sys.exit("The stageprune command needs its extra: pip install 'stageprune[cli]'")

from .cli_bank import calibrate, prune
from .cli_options import (
    FULL_SIZE,
    AnyDevice,
    Batch,
    BundleArgument,
    Device,
    Dtype,
    Empty,
    Guidance,
    JointFitness,
    JudgeFolder,
    Levels,
    Out,
    OwnSize,
    Pipe,
    Prompts,
    Size,
    Stages,
    Steps,
    Strategy,
    Target,
    default_judge,
    load,
    numbers,
    pixels,
    read_json,
    read_prompts,
    show_pipeline,
    stages_of,
)
from .cli_search import compare, search
from .cli_static import export, sparsify

console = Console(stderr=True)
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Stage-wise structural pruning of diffusion models. The usual way: calibrate, prune, allocate, then generate "
    "or evaluate with the bundle. `search` improves on `allocate`. `stageprune demo` does all of it on a small trained "
    "pipeline.",
)


@app.callback()
def setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the library logs.")] = False,
) -> None:
    """Set up logging for all verbs."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


for making in (calibrate, prune):
    app.command()(making)


@app.command()
def allocate(
    pipe: Pipe,
    bundle: BundleArgument,
    out: Out = Path("out/bundle"),
    target: Target = None,
    strategy: Strategy = "measured",
    levels: Levels = None,
    stages: Stages = None,
    empty: Empty = None,
    fitness: JointFitness = "latent_mse",
    prompts: Prompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    judge: JudgeFolder = None,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Choose a level for each stage under a budget and save the bundle with that schedule.

    A stage is a part of the denoising, from noise to image; a level is how much of the model is left out there.

    For a first try: stageprune allocate PIPE BUNDLE --target macs:0.67
    """
    from .api import allocate as run
    from .bundle import Bundle, check_bundle_folder

    check_bundle_folder(out)  # before minutes of work, not after
    bank, pipeline = Bundle.load(bundle).bank, load(pipe, device, dtype)
    allocation = run(
        pipeline,
        bank,
        target=target,
        strategy=strategy,
        prompts=read_prompts(prompts, pipeline) if prompts else None,
        steps=steps,
        guidance=guidance,
        size=pixels(size),
        stages=stages_of(stages),
        empty=empty,
        levels=numbers(levels, "--levels") if levels else None,
        batch_size=batch_size,
        fitness=fitness,
        judge=judge or default_judge(pipe),
    )
    typer.echo(f"{allocation.table or ''}\n{allocation}".strip())
    Bundle(bank, allocation.schedule).save(out)
    typer.echo(f"saved to {out}")


for verb in (search, compare, sparsify, export):
    app.command()(verb)


@app.command()
def generate(
    pipe: Pipe,
    bundle: Annotated[Path | None, typer.Option(help="A bundle; dense without.")] = None,
    out: Out = Path("out/images"),
    prompts: Prompts = None,
    seed: Annotated[int, typer.Option(help="First seed; each prompt gets the next one.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: those that the bundle was planned for, or 25.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's usual one.")] = None,
    size: OwnSize = None,
    device: AnyDevice = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Generate images, dense or pruned, with the same seeds either way."""
    import torch

    from .bundle import load_bundle
    from .hosts.diffusers import DiffusersHost
    from .hosts.diffusers.attach import enable_stage_pruning, stage_pruning_summary

    pipeline = load(pipe, device, dtype)
    host, chosen = DiffusersHost(pipeline, pixels(size)), read_prompts(prompts, pipeline)
    if bundle is not None:
        loaded = load_bundle(bundle)
        pruner = enable_stage_pruning(pipeline, loaded)
        steps = steps or len(pruner.schedule.taus or ()) or loaded.planned_steps
    steps = steps or 25
    if bundle is not None:
        typer.echo(str(stage_pruning_summary(pipeline, steps, host.size)))
    scale = host.default_guidance if guidance is None else guidance
    out.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(chosen):  # one by one: a large model has no room for all of them
        inputs = host.adapter.call_arguments(pipeline, [prompt], scale)
        generator = [torch.Generator().manual_seed(seed + index)]
        image = pipeline(**inputs, generator=generator, num_inference_steps=steps).images[0]
        image.save(out / f"{index:03d}-seed{seed + index}.png")
    typer.echo(f"{len(chosen)} images saved to {out}")


@app.command()
def evaluate(
    pipe: Pipe,
    bundle: BundleArgument,
    out: Out = Path("out/report"),
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=2, help="Images per variant.")] = 64,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: those that the bundle was planned for.")
    ] = None,
    guidance: Guidance = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 20_000,
    judge: JudgeFolder = None,
    search: Annotated[Path | None, typer.Option(help="What `search --history` wrote: adds how it went.")] = None,
    comparison: Annotated[Path | None, typer.Option(help="What `compare` wrote: adds strategies side by side.")] = None,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Compare the bundle with dense, uniform, magnitude and fewer steps; write an HTML and a JSON report."""
    from .api import evaluate as run
    from .bundle import Bundle
    from .planning import Comparison, SearchResult

    loaded = Bundle.load(bundle)
    pipeline = load(pipe, device, dtype)
    report = run(
        pipeline,
        loaded,
        prompts=read_prompts(prompts, pipeline) if prompts else None,
        count=count,
        steps=steps,
        guidance=guidance,
        size=pixels(size),
        seed=seed,
        judge=judge or default_judge(pipe),
        batch_size=batch_size,
        search=None if search is None else SearchResult.from_dict(read_json(search)),
        comparison=None if comparison is None else Comparison.from_dict(read_json(comparison)),
        command="stageprune " + " ".join(sys.argv[1:]),
    )
    page = report.save(out)
    typer.echo(f"{report}\nreport: {page}")


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A bundle, a calibration, or a pipeline.")], size: OwnSize = None
) -> None:
    """Show what a bundle or calibration holds, or the groups and cost of a pipeline's denoiser."""
    from .bundle import MANIFEST, Bundle
    from .calibration import Calibration

    path = Path(target)
    made = (path / MANIFEST).exists() or path.is_file()
    if made and size is not None:
        raise StagePruneError(f"--size goes with a pipeline; {target} has recorded the size that it was made at.")
    if (path / MANIFEST).exists():
        bundle = Bundle.load(path)
        typer.echo(str(bundle.bank))
        typer.echo(str(bundle.schedule or "no schedule: `stageprune allocate` makes one"))
        typer.echo("provenance: " + json.dumps(bundle.bank.provenance, indent=1, default=str)[:2000])
    elif path.is_file():
        typer.echo(str(Calibration.load(path)))
    else:
        show_pipeline(load(target, "cpu", "float32"), pixels(size))


@app.command()
def bench(
    pipe: Annotated[str, typer.Argument(help=f"A pipeline, or an architecture with random weights: {FULL_SIZE}.")],
    bundle: Annotated[Path | None, typer.Option(help="A bundle. Default: a random bank.")] = None,
    levels: Annotated[
        str | None, typer.Option(help="Sparsities to time. Default: the bundle's, or 0,0.2,0.3,0.5.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a forward.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, each of which runs every level.")] = 5,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="torch.compile the blocks.")] = False,
    size: Size = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write JSON here.")] = None,
    device: AnyDevice = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Time dense and pruned forwards and images, interleaved, beside the MAC-ideal; memory; cost of a switch."""
    from .bench import run_bench

    result = run_bench(
        pipe,
        bundle,
        levels=numbers(levels, "--levels") if levels else None,
        batch=batch,
        rounds=rounds,
        compile_blocks=compile_blocks,
        device=device,
        dtype=dtype,
        size=pixels(size),
    )
    if out is not None:
        from .files import atomic_file

        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    typer.echo(str(result))


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="dit-digits, sdxl-shapes or flux-shapes.")] = "dit-digits",
    out: Out = Path("out/demo"),
    target: Annotated[str, typer.Option(help="Budget.")] = "macs:0.67",
) -> None:
    """The main job on a small trained pipeline: calibrate, prune, allocate, generate, report, bundle."""
    from .demo import run_demo

    run_demo(name, out, target, say=typer.echo)


@app.command()
def env() -> None:
    """Versions and hardware, for bug reports."""
    from .environment import describe_environment

    for key, value in describe_environment().items():
        typer.echo(f"{key:<16} {value}")


def main() -> None:
    """Entry point: errors of the library are shown as one message, without a traceback."""
    try:
        if app(standalone_mode=False) == 130:  # what newer versions of typer make of an interruption
            raise KeyboardInterrupt
    except StagePruneError as error:
        console.print("error: " + str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except typer.Exit as request:
        sys.exit(request.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted; the same command goes on from its checkpoint, if it keeps one (calibrate, search)")
        sys.exit(130)
    except Exception as error:
        # Usage errors of the command line know how to show themselves.
        if not hasattr(error, "show"):
            raise
        error.show()
        sys.exit(2)


if __name__ == "__main__":
    main()
