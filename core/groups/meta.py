"""One forward of a denoiser on the meta device: shapes and identities of what flows through it, without memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..host import InputSize
from .layer import layer_at
from .registry import family_of

SeeInput = Callable[[str, Tensor], None]
"""Called with the path of a layer and its input, on the meta device, in the order in which the layers run."""

_CALLED = ("_forward_pre_hooks", "_forward_hooks", "_compiled_call_impl", "forward")
"""What an instance may hold that a call runs beside or instead of its class's forward."""


def run_on_meta(
    denoiser: nn.Module, size: InputSize | None = None, watch: Mapping[str, SeeInput] | None = None
) -> None:
    """Run one sample of the family's example input. No weight is read, no hook of the denoiser is called.

    Args:
        denoiser: a denoiser of a supported family.
        size: of the example; the model's own by default.
        watch: layer path -> what sees its input.
    """
    state = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    inputs = {name: _to_meta(value) for name, value in family_of(denoiser).example_inputs(denoiser, size=size).items()}
    with torch.no_grad(), _bare(denoiser):
        for path, see in (watch or {}).items():  # these hooks vanish with the bare state
            layer_at(denoiser, path).register_forward_pre_hook(lambda _, args, path=path, see=see: see(path, args[0]))
        torch.func.functional_call(denoiser, meta, kwargs=inputs)


@contextmanager
def _bare(denoiser: nn.Module) -> Iterator[None]:
    """Without hooks (a user's may read values, which meta tensors lack), without a forward that an offloading hook put
    in the instance (it moves weights, which meta tensors cannot), and without compiled calls (not countable).
    """
    saved = []
    for module in denoiser.modules():
        state = module.__dict__
        saved.append((state, {name: state.pop(name) for name in _CALLED if name in state}))
        state.update(_forward_pre_hooks=OrderedDict(), _forward_hooks=OrderedDict())
    try:
        yield
    finally:
        for state, values in saved:
            state.update(values)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Mapping):  # SDXL's added_cond_kwargs
        return {name: _to_meta(part) for name, part in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value
