"""Loading pipelines by folder or Hub id, with errors that say what to do."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version

from ...errors import StagePruneError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(name: str | Path, device: str = "auto", dtype: str = "float32") -> Any:
    """A diffusers pipeline on a device, with its own progress bars off.

    Args:
        name: a pipeline's folder, or a Hub id (`user/name`).
        device: `auto` (CUDA if there is one, or else the CPU), or a torch device.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        StagePruneError: there is no such pipeline, or an argument is unknown.
    """
    path = Path(name)
    if path.exists() and not (path / "model_index.json").is_file():
        raise StagePruneError(f"{name} is no diffusers pipeline folder: it has no model_index.json.")
    if not path.exists() and (str(name).count("/") != 1 or str(name).startswith((".", "/"))):
        raise StagePruneError(f"{name}: no such folder, and not a Hub id (user/name).")
    key = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"  # the old name warns
    _quiet()
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(name), **{key: pick_dtype(dtype)})
    except (OSError, ImportError) as error:  # ImportError: text encoders need transformers
        raise StagePruneError(f"{name} could not be loaded: {error}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(pick_device(device))


def _quiet() -> None:
    """No progress bars of loading: each text encoder has one, drawn over the others."""
    diffusers.utils.logging.disable_progress_bar()
    if find_spec("transformers"):
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()


def pick_device(name: str) -> str:
    """`auto` is CUDA if there is one, or else the CPU: never MPS, which has no float64, in which pruning computes."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    if name not in DTYPES:
        raise StagePruneError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]
