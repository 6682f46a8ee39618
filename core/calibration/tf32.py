"""TF32 products for as long as a block runs, whichever threads run such blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: Any = None


@contextmanager
def tf32_products() -> Iterator[None]:
    """GPU products of float32 matrices round their inputs to TF32 within the block; sums stay float32.

    The switch is the process's. Where blocks of several threads overlap, the first to begin notes what the user had set
    and the last to end puts it back.
    """
    global _inside, _before  # noqa: PLW0603  (as the switch itself is)
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and refuses to read the old one once the new one was set.
    switch, on = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    with _lock:
        if not _inside:
            _before = getattr(matmul, switch)
            setattr(matmul, switch, on)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                setattr(matmul, switch, _before)
