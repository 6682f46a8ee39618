"""Progress bars with the remaining time, on standard error; quiet where there is no terminal or
`STAGEPRUNE_QUIET=1`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def _disabled() -> bool:
    return os.environ.get("STAGEPRUNE_QUIET", "") not in ("", "0") or not (
        sys.stderr.isatty() or os.environ.get("STAGEPRUNE_PROGRESS")
    )


def track(items: Collection[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar."""
    bar: Iterable[T] = tqdm(items, desc=description, total=len(items), disable=_disabled(), leave=False)
    return bar


@contextmanager
def bar(total: int, description: str, unit: str = "it", shown: bool = True) -> Iterator[tqdm]:  # type: ignore[type-arg]
    """A progress bar to be advanced by hand with `.update(n)`; one that is not `shown` does nothing."""
    with tqdm(total=total, desc=description, unit=unit, disable=_disabled() or not shown, leave=False) as progress:
        yield progress
