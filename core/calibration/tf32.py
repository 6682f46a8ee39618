"""TF32 products for as long as a block runs, whichever threads run such blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..shared_switch import SharedSwitch


def tf32_products() -> AbstractContextManager[None]:
    """GPU products of float32 matrices round their inputs to TF32 within the block; sums stay float32."""
    return _switch.on()


def _turn_on() -> Callable[[], None]:
    matmul = torch.backends.cuda.matmul
    # torch 2.9 renamed the switch, and refuses to read the old one once the new one was set.
    name, on = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, on)
    return lambda: setattr(matmul, name, before)


_switch = SharedSwitch(_turn_on)
