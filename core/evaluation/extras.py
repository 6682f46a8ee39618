"""The libraries of the extra `report`, which the engine itself does without."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import StagePruneError

LIBRARIES = ("torchmetrics", "matplotlib", "jinja2", "PIL")


@contextmanager
def report_extra() -> Iterator[None]:
    """Imports within the block need the extra; StagePruneError says how to install it if one fails."""
    try:
        yield
    except ImportError as error:
        raise StagePruneError(
            f"evaluation needs {error.name or error}, which is not installed: pip install 'stageprune[report]'."
        ) from None


def require_report_extra() -> None:
    """Import all of the extra's libraries now, rather than after an hour of sampling."""
    with report_extra():
        for name in LIBRARIES:
            importlib.import_module(name)
