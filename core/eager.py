"""Eager calls for as long as a block runs, whatever the user has compiled, and whichever threads run such blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .shared_switch import SharedSwitch


@contextmanager
def eager() -> Iterator[None]:
    """Modules run as they are written within the block, hooks included: a graph that was compiled before a hook was
    added would run without it. Graphs are kept, and serve again afterwards.

    Any way to compile is covered: `module.compile()` of the denoiser or of its blocks, and the wrapper that
    `torch.compile(module)` gives.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        yield
        return
    with _stance.on():
        yield


def _force_eager() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]  # holds from here on
    return lambda: stance.__exit__(None, None, None)


_stance = SharedSwitch(_force_eager)
