"""A switch of the whole process that blocks of several threads may want at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SharedSwitch:
    """On for as long as any block is inside. Where blocks overlap, the first to begin notes what the user had set and
    the last to end puts it back.

    Args:
        turn_on: turns it on, and returns what puts back what was set before.
    """

    def __init__(self, turn_on: Callable[[], Callable[[], None]]) -> None:
        self._turn_on = turn_on
        self._lock = threading.Lock()
        self._inside = 0
        self._put_back: Callable[[], None] = lambda: None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block it is on."""
        with self._lock:
            if not self._inside:
                self._put_back = self._turn_on()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._put_back()
