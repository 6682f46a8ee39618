"""The verbs `search` and `compare`, with the options that they alone have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    Batch,
    BundleArgument,
    Device,
    Dtype,
    Empty,
    FitnessName,
    Guidance,
    JudgeFolder,
    Out,
    Pipe,
    Prompts,
    Size,
    Stages,
    Steps,
    Target,
    default_judge,
    load,
    pixels,
    read_prompts,
    stages_of,
    words,
)
from .errors import StagePruneError

Init = Annotated[
    str | None,
    typer.Option(
        help="Where the search begins. measured (the default), mosaic, or pattern:front and its like: what that "
        "strategy of `allocate` chooses, and small changes of it. A bundle's folder: its schedule, likewise. random: "
        "schedules drawn at random; uniform: one level everywhere, and random ones; patterns: all patterns, and small "
        "changes; hybrid: uniform, patterns and random."
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help="Settings to begin with: ours, or those that Diff-ES published for dit or sdxl, which take far longer."
    ),
]
Generations = Annotated[int | None, typer.Option(min=1, help="Most generations. Default: the preset's, 40.")]
Offspring = Annotated[int | None, typer.Option(min=1, help="New schedules a generation. Default: the preset's, 16.")]
Patience = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after so many generations without a better schedule. Default: the preset's, 8."),
]
Memory = Annotated[
    float | None,
    typer.Option(
        min=0, help="GiB for half-run samples, which spare running the same beginning again. Default: the preset's, 1."
    ),
]
SearchSeed = Annotated[int, typer.Option("--seed", help="Of what the search draws: another one searches elsewhere.")]


def search(
    pipe: Pipe,
    bundle: BundleArgument,
    out: Out = Path("out/bundle"),
    target: Target = None,
    init: Init = None,
    fitness: FitnessName = "latent_mse",
    preset: Preset = "ours",
    generations: Generations = None,
    offspring: Offspring = None,
    patience: Patience = None,
    memory: Memory = None,
    seed: SearchSeed = 0,
    stages: Stages = None,
    empty: Empty = None,
    prompts: Prompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    judge: JudgeFolder = None,
    batch_size: Batch = 32,
    history: Annotated[Path | None, typer.Option(help="Also write how the search went here, as JSON.")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Try many schedules, keep and change the best, and save the bundle with the winner. Minutes to hours.

    `allocate` predicts what a schedule loses; this runs it. It begins where `allocate` ends, for images as close as
    possible to the dense model's (--fitness chooses another aim), and takes the winner on probes that it did not search
    with. Interrupted? Run it again: it goes on. Several GPUs: accelerate launch -m stageprune search PIPE BUNDLE ...

    For a first try: stageprune search PIPE BUNDLE --target macs:0.67 --generations 10
    """
    from .api_search import search as run
    from .bundle import Bundle, check_bundle_folder
    from .distributed import processes_here
    from .files import atomic_file

    check_bundle_folder(out)  # before hours of work, not after
    processes = processes_here()
    bank = Bundle.load(bundle).bank
    pipeline = load(pipe, processes.device if device == "auto" else device, dtype)
    part = out.with_name(out.name + ".search.part")
    changes = {"generations": generations, "offspring": offspring, "patience": patience, "memory": memory, "seed": seed}
    try:
        result = run(
            pipeline,
            bank,
            target=target,
            init=init_of(init),
            fitness=fitness,
            settings=settings_of(preset, **changes),
            prompts=read_prompts(prompts, pipeline) if prompts else None,
            steps=steps,
            guidance=guidance,
            size=pixels(size),
            stages=stages_of(stages),
            empty=empty,
            judge=judge or default_judge(pipe),
            batch_size=batch_size,
            checkpoint=part,
        )
    except KeyboardInterrupt as stop:
        typer.echo(str(stop), err=True)
        raise
    if not processes.first:
        return
    Bundle(bank, result.schedule).save(out)
    if history is not None:
        with atomic_file(history) as temporary:
            temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    part.unlink(missing_ok=True)
    typer.echo(f"{result}\nsaved to {out}")


def compare(
    pipe: Pipe,
    bundle: BundleArgument,
    out: Out = Path("out/comparison.json"),
    targets: Annotated[
        str, typer.Option(help="Budgets, separated by commas, as --target of `allocate` takes them, all of one kind.")
    ] = "0.9,0.8,0.7,0.6,0.5",
    strategies: Annotated[
        str,
        typer.Option(
            help="Separated by commas: those of `allocate`, and `fewer steps`, the dense model with as many steps as "
            "the budget pays for."
        ),
    ] = "fewer steps,steps,uniform,mosaic,measured,joint",
    fitness: FitnessName = "latent_mse",
    prompts: Prompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    judge: JudgeFolder = None,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Try every strategy under several budgets on new seeds, and write the errors as JSON and as a picture. Minutes.

    Which is best differs from model to model, and from budget to budget: fewer steps, pruning, or both.
    """
    from .api_search import compare as run
    from .bundle import Bundle
    from .evaluation.extras import require_report_extra
    from .evaluation.plan_pictures import comparison_picture
    from .files import atomic_file

    require_report_extra()  # before minutes of work, not after
    bank, pipeline = Bundle.load(bundle).bank, load(pipe, device, dtype)
    found = run(
        pipeline,
        bank,
        targets=words(targets),
        strategies=words(strategies),
        prompts=read_prompts(prompts, pipeline) if prompts else None,
        steps=steps,
        guidance=guidance,
        size=pixels(size),
        batch_size=batch_size,
        fitness=fitness,
        judge=judge or default_judge(pipe),
    )
    picture = out.with_suffix(".png")
    for path, content in ((out, found.to_json().encode()), (picture, comparison_picture(found))):
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    typer.echo(f"{found}\nsaved to {out} and {picture}")


def init_of(text: str | None) -> Any:
    """An `--init`: a name, or the schedule of a bundle's folder."""
    from .bundle import MANIFEST, Bundle

    if text is None or not (Path(text) / MANIFEST).is_file():
        return text
    schedule = Bundle.load(text).schedule
    if schedule is None:
        raise StagePruneError(f"--init {text}: that bundle has no schedule; `stageprune allocate` makes one.")
    return schedule


def settings_of(preset: str, **changes: Any) -> Any:
    """The settings of a search: a preset, and what was changed."""
    from .planning import SearchSettings

    given = {name: value for name, value in changes.items() if value is not None}
    return SearchSettings(**given) if preset == "ours" else SearchSettings.published(preset, **given)
