"""A plain model folder: what the model's own library writes and loads, and one JSON file on how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import StagePruneError
from .files import atomic_folder, replaceable

RECORD = "stageprune-static.json"


def check_plain_folder(folder: str | Path) -> Path:
    """The folder, if a plain model may be written there: StagePruneError if something else is. Costs nothing, so ask
    first.
    """
    target = Path(folder)
    if not replaceable(target, RECORD):
        raise StagePruneError(
            f"{target} exists and was not written by stageprune; it is not overwritten. Name another."
        )
    return target


def save_plain(folder: str | Path, write: Callable[..., Any], record: Mapping[str, Any]) -> Path:
    """Write a plain model folder, whole or not at all.

    Args:
        folder: where to; an earlier plain folder is replaced, an empty one is filled.
        write: `save_pretrained` of a model or a pipeline; told to write safetensors.
        record: how it was made, plain data.

    Raises:
        StagePruneError: the folder holds something else.
    """
    target = check_plain_folder(folder)
    with atomic_folder(target) as temporary:
        write(temporary, safe_serialization=True)
        (temporary / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    return target
