"""What the verbs of the command share: their arguments, and what these mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import StagePruneError

Pipe = Annotated[str, typer.Argument(help="A diffusers pipeline: local folder or Hub id.", metavar="PIPE")]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="Prompts or class labels, separated by commas; @FILE with one a line if they have commas themselves. "
        "Default: the pipeline's own."
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps. Default: those of the calibration.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: that of the calibration.")]
LayerAllocation = Annotated[
    str | None,
    typer.Option(
        help="How a level is divided among layers: measured (by how far images would move if one alone were pruned; "
        "default of obs) or uniform (the same share in each; default of the others)."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Size of the images in pixels, as 512 or 512x768 (height x width). Default: that of the calibration or "
        "bundle; without one, the pipeline's own."
    ),
]
OwnSize = Annotated[
    str | None,
    typer.Option(help="Size of the images in pixels, as 512 or 512x768 (height x width). Default: the pipeline's own."),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        help="Unit kinds, separated by commas: head, neuron, for UNets channel (ResNet channels), and by itself block "
        "(whole blocks, for --method depth). Default: head,neuron; for `prune`, those that were calibrated."
    ),
]
AlphaName = Annotated[
    str, typer.Option("--alpha", help="Weight of the steps: uniform, or log- or linear-, -decrease or -increase.")
]
Consumers = Annotated[
    str, typer.Option("--consumers", help="Compensated consumers per level (shared) or per level and stage (stage).")
]
Layers = Annotated[
    str,
    typer.Option(
        help="Whose inputs are recorded: consumers (what `prune` needs), or all (q, k, v and up projections too, which "
        "`sparsify` can zero)."
    ),
]
SkipBlocks = Annotated[
    bool,
    typer.Option("--skip-blocks", help="With --kinds block: run without each block too, for --method depth-output."),
]
Taylor = Annotated[
    float | None,
    typer.Option(
        help="Score units by gradients too, for --method taylor: at the steps with at least this share of the largest "
        "loss, as 0.05. Takes the memory of training."
    ),
]
PredecessorsOption = Annotated[
    str,
    typer.Option(
        "--predecessors",
        help="Compensate layers for inputs from dense predecessors, or from those that each level has itself (pruned; "
        "runs every level beside the dense model, in packages if --hessian-budget asks for it).",
    ),
]
Shares = Annotated[
    str | None,
    typer.Option(help="How much of a level a kind takes, relative to the others, as head=0.5,neuron=1."),
]
KeepDense = Annotated[
    str | None,
    typer.Option(help="Groups to leave alone, separated by commas, wildcards allowed, as blocks.0.*,*.attn."),
]
Tokens = Annotated[
    float | None,
    typer.Option(help="Share of each call's tokens that are summed, drawn at random. Default: what Hessians need."),
]
HessianBudget = Annotated[
    str | None,
    typer.Option(
        help="Memory for Hessians beside the model, as 4GiB: what does not fit is summed in further runs over the same "
        "prompts. Default: one run."
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Budget over the steps that the sampler runs: macs:0.67 (0.67 of the dense MACs; the default), "
        "latency:0.77 (of the time, measured on this device), speedup:1.3 (the dense time over 1.3), sparsity:0.3 "
        "(mean sparsity of the steps). --strategy hand has none unless it is given."
    ),
]
Strategy = Annotated[
    str,
    typer.Option(
        help="How levels are chosen. measured: measure what each stage loses at each level, choose exactly, check on "
        "other seeds (minutes; the best). uniform: one level everywhere. mosaic: MosaicDiff's formula, more pruning "
        "where the image changes slowly. pattern:front (last steps most), pattern:back (first steps most), "
        "pattern:middle, pattern:ends, pattern:zigzag; pattern:ramp-down and pattern:ramp-up are front and back: "
        "fixed shapes. hand: with --levels. Steps and levels together: joint chooses how many steps, where, and their "
        "levels; steps only the steps, all dense."
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(
        help="Where stages end. A number: so many, equal in noise level (default: 5; for hand one a level). "
        "equal-steps:5: each with as many steps. equal-logsnr:5: equal in signal-to-noise ratio. mosaic: MosaicDiff's "
        "three. Or the boundaries: noise levels from 1 (pure noise) to 0, as 0.8,0.5."
    ),
]
Empty = Annotated[
    str | None,
    typer.Option(
        help="What happens to a stage in which no step falls: refuse (say so and stop; default with --stages) or merge "
        "(into its neighbour; default without)."
    ),
]
Levels = Annotated[
    str | None,
    typer.Option(help="With --strategy hand: sparsity of each stage, noisiest (first steps) first, as 0,0.5,0.7."),
]
FitnessName = Annotated[
    str,
    typer.Option(
        "--fitness",
        help="What is made as small as possible. How far images are from the dense model's, seed by seed: latent_mse "
        "(fastest), latent_mae, latent_cosine, latent_snr, image_mse, image_ssim (looks alike), image_frequency (as "
        "much detail), lpips. How good they are by themselves: frechet (distance to real ones) and accuracy (show what "
        "was asked for), both by a judge; iqa:NAME, a metric of pyiqa.",
    ),
]
JointFitness = Annotated[
    str, typer.Option("--fitness", help="With --strategy joint or steps: what they choose by, as for `search`.")
]
JudgeFolder = Annotated[
    Path | None, typer.Option("--judge", help="Folder of a judge. Default: `judge` in the pipeline's folder.")
]


def _with_float64(name: str) -> str:
    """A `--device` of a verb that computes in float64."""
    if name.split(":")[0] == "mps":
        raise StagePruneError(
            f"--device must be auto, cpu or cuda for this verb, got {name}: MPS has no float64, in which calibrating, "
            "pruning and planning compute. Use cpu; `generate` with the finished bundle takes mps."
        )
    return name


Device = Annotated[
    str,
    typer.Option(
        callback=_with_float64,
        help="Device to run on: auto (CUDA if there is one, or else the CPU), cpu, cuda. Not mps: it has no float64.",
    ),
]
AnyDevice = Annotated[
    str,
    typer.Option(
        help="Device to run on: auto (CUDA if there is one, or else the CPU), cpu, cuda, mps (never by itself: pruning "
        "needs float64, which it lacks).",
    ),
]
Dtype = Annotated[str, typer.Option(help="Precision to load the pipeline in: float32, bfloat16, float16.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples that run together.")]
FULL_SIZE = "dit-xl, sd15, sdxl, sd3-medium, sd35-medium, sd35-large, flux-dev"


def read_json(path: Path) -> Any:
    """What an earlier verb wrote. StagePruneError names the file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StagePruneError(f"{path}: cannot be read as JSON ({error}).") from None


def words(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def load(name: str, device: str, dtype: str) -> Any:
    """The pipeline of that name."""
    from .hosts.diffusers.load import load_pipeline

    return load_pipeline(name, device, dtype)


def read_prompts(text: str | None, pipeline: Any) -> list[int | str]:
    """Prompts from the command line, from a file, or the pipeline's own."""
    from .hosts.diffusers import DiffusersHost

    host = DiffusersHost(pipeline)
    if text is None:
        return host.default_prompts()
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise StagePruneError(f"--prompts {text}: no such file.")
        parts = path.read_text("utf-8").splitlines()
    else:
        parts = text.split(",")
    prompts = [host.adapter.read_prompt(part) for part in map(str.strip, parts) if part]
    if not prompts:
        raise StagePruneError(f"--prompts {text!r} names no prompt.")
    return prompts


def repeat(prompts: list[int | str], count: int) -> list[int | str]:
    """The prompts over and over, `count` in all."""
    return [prompts[index % len(prompts)] for index in range(count)]


def numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise StagePruneError(f"{option} must be numbers separated by commas, got {text!r}.") from None


def stages_of(text: str | None) -> int | str | list[float] | None:
    """A `--stages`: a number, boundaries, or a partition's name."""
    if text is None or text.isdigit():
        return None if text is None else int(text)
    return numbers(text, "--stages") if re.match(r"[\d.]", text) else text


def default_judge(pipe: str) -> Path | None:
    """The judge that comes with a demo pipeline."""
    folder = Path(pipe) / "judge"
    return folder if folder.is_dir() else None


def shares_of(text: str | None) -> dict[str, float] | None:
    """The numbers in a `--shares`."""
    if text is None:
        return None
    parts = [part.split("=") for part in words(text)]
    if any(len(part) != 2 for part in parts):
        raise StagePruneError(f"--shares must be like head=0.5,neuron=1; got {text!r}.")
    values = numbers(",".join(value for _, value in parts), "--shares")
    return {kind.strip(): value for (kind, _), value in zip(parts, values, strict=True)}


def gibibytes(text: str | None) -> float | None:
    """The number in a `--hessian-budget`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB)?", text or "", re.IGNORECASE)
    if text is not None and match is None:
        raise StagePruneError(f"--hessian-budget must be a size such as 4GiB or 500MiB, got {text!r}.")
    return float(match[1]) / (1024 if (match[2] or "").lower() == "mib" else 1) if match else None


def pixels(size: str | None) -> tuple[int, int] | None:
    """Height and width of a `--size`."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None:
        raise StagePruneError(f"--size must be a side in pixels, or height x width such as 512x768; got {size!r}.")
    return int(match[1]), int(match[2] or match[1])


def show_pipeline(pipeline: Any, size: tuple[int, int] | None) -> None:
    """Print the groups and cost of a pipeline's denoiser."""
    from .groups import find_groups, measure_cost
    from .hosts.diffusers import DiffusersHost

    host = DiffusersHost(pipeline, size)
    denoiser, at = host.denoiser, host.input_size
    cost = measure_cost(denoiser, size=at)
    where = at or "the model's default size"
    typer.echo(f"{host.component}: {type(denoiser).__name__}, {cost.dense / 1e9:.3f} GMACs a forward at {where}")
    typer.echo(f"prunable: {cost.prunable / cost.dense:.1%} of the MACs")
    for group in find_groups(denoiser):
        typer.echo(str(group))
