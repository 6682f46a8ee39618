"""Layers whose forward is not their own: offloaded one by one, cast while they wait, or otherwise wrapped.

Offloading hooks replace `forward` in the instance and may keep the weights elsewhere. Around the whole denoiser, or
around blocks that stay, that is harmless; on a layer that belongs to a group it is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import GroupError
from .group import Group

HOOKS = {
    "_old_forward": "pipe.remove_all_hooks()",  # accelerate sets it first, before it moves a weight
    "_hf_hook": "pipe.remove_all_hooks()",
    "_diffusers_hook": (
        "`diffusers.hooks.HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(name)` (its name is "
        "'group_offloading' for group offload, 'layerwise_casting' for that)"
    ),
    "forward": "`del module.forward`",
}
"""Attributes that whoever wraps a module's forward sets on it, and how to be rid of them."""

ALLOWED = (
    "Allowed is offload of the whole model (pipe.enable_model_cpu_offload()) and, if no whole blocks are pruned, "
    "block-level group offload (pipe.enable_group_offload(..., offload_type='block_level'))."
)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class. Hooks that were removed leave that one in the instance."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def refuse_hooked(path: str, module: nn.Module) -> None:
    """GroupError, with its remedy, if the forward of the module at `path` has been replaced."""
    if hasattr(module, "_hf_hook"):
        found, remedy = f"`{path}` is offloaded by accelerate", HOOKS["_hf_hook"]
    elif has_own_forward(module):
        return
    elif hasattr(module, "_diffusers_hook"):
        found, remedy = f"`{path}` has a hook of diffusers (group offload, layerwise casting)", HOOKS["_diffusers_hook"]
    else:
        found, remedy = f"the forward of `{path}` has been replaced", HOOKS["forward"]
    raise GroupError(
        f"{found}, so it can neither be measured nor swapped for its levels. Remove that with {remedy}. {ALLOWED} To "
        "compile a module use module.compile()."
    )


def refuse_hooked_layers(denoiser: nn.Module, groups: Iterable[Group]) -> None:
    """GroupError if a layer or norm of these groups is offloaded by itself."""
    for group in groups:
        layers = [part.path for part in group.producers] + [part.path for part in group.consumers]
        for path in (*layers, *group.companions):
            refuse_hooked(path, denoiser.get_submodule(path))
