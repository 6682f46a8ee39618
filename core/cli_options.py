"""What the verbs of the command share: their arguments, and what these mean."""

from __future__ import annotations

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
        help="Unit kinds, separated by commas: head, neuron, and for UNets channel (ResNet channels). Default: "
        "head,neuron; for `prune`, those that were calibrated."
    ),
]
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, mps.")]
Dtype = Annotated[str, typer.Option(help="Precision to load the pipeline in: float32, bfloat16, float16.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples that run together.")]
FULL_SIZE = "dit-xl, sd15, sdxl, sd3-medium, sd35-medium, sd35-large, flux-dev"


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

    if text is None:
        return DiffusersHost(pipeline).default_prompts()
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise StagePruneError(f"--prompts {text}: no such file.")
        parts = path.read_text("utf-8").splitlines()
    else:
        parts = text.split(",")
    prompts: list[int | str] = [int(part) if part.isdigit() else part for part in map(str.strip, parts) if part]
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


def default_judge(pipe: str) -> Path | None:
    """The judge that comes with a demo pipeline."""
    folder = Path(pipe) / "judge"
    return folder if folder.is_dir() else None


def pixels(size: str | None) -> tuple[int, int] | None:
    """Height and width of a `--size`."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None:
        raise StagePruneError(f"--size must be a side in pixels, or height x width such as 512x768; got {size!r}.")
    return int(match[1]), int(match[2] or match[1])
