"""Eager calls for as long as a block runs, whatever the user has compiled, and whichever threads run such blocks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Modules run as they are written within the block, hooks included: a graph that was compiled before a hook was
    added would run without it. Graphs are kept, and serve again afterwards.

    Any way to compile is covered: `module.compile()` of the denoiser or of its blocks, and the wrapper that
    `torch.compile(module)` gives. torch's switch is the process's. Where blocks of several threads overlap, the first
    to begin notes what the user had set and the last to end puts it back.
    """
    global _inside, _stance  # noqa: PLW0603  (as the switch itself is)
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        yield
        return
    with _lock:
        if not _inside:
            _stance = torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]  # holds from here on
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)
