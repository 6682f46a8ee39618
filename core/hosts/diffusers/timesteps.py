"""Where diffusers' denoisers take the time from, and how it becomes tau."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import StagePruneError
from .known import KnownValues


@dataclass(frozen=True)
class Convention:
    """How a class of denoisers is told the time: the argument, and tau = value / scale.

    Args:
        argument: name of the forward's argument.
        scale: `train` divides by the scheduler's num_train_timesteps; a number divides by that.
        reversed: the value counts from 0 (pure noise) to 1.
    """

    argument: str = "timestep"
    scale: str | float = "train"
    reversed: bool = False


# Per denoiser class; what is not listed follows the first convention. Measured on real pipelines
# (tests/test_timesteps.py).
CONVENTIONS: dict[str, Convention] = {
    "DiTTransformer2DModel": Convention(),
    "UNet2DConditionModel": Convention(),
    "SD3Transformer2DModel": Convention(),
    "FluxTransformer2DModel": Convention(scale=1.0),
}


@dataclass(frozen=True)
class TimestepReader:
    """Reads tau from the arguments of a denoiser call.

    The largest value counts: image-conditioned models pass 0 for clean frames. One of the scheduler's own timesteps,
    as most pipelines pass it, is known without waiting for an accelerator (see `KnownValues`); what a pipeline has
    computed on the device, as FLUX's does, is waited for once a call.

    Args:
        argument: name of the timestep argument.
        position: its place among positional arguments.
        scale: tau = value / scale.
        reversed: tau = 1 - value / scale.
    """

    argument: str
    position: int
    scale: float
    reversed: bool = False
    known: KnownValues = field(default_factory=KnownValues, compare=False, repr=False)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Tau of this call, in [0, 1]."""
        value = kwargs[self.argument] if self.argument in kwargs else args[self.position : self.position + 1]
        if isinstance(value, tuple):
            if not value:
                raise StagePruneError(f"the denoiser was called without `{self.argument}`; its stage cannot be told.")
            value = value[0]
        if isinstance(value, torch.Tensor):
            one = self.known(value)
            value = (value.amin() if self.reversed else value.amax()).item() if one is None else one
        tau = float(value) / self.scale
        if math.isnan(tau):
            raise StagePruneError(f"the denoiser was called with a `{self.argument}` of NaN; its stage cannot be told.")
        return min(max(1 - tau if self.reversed else tau, 0.0), 1.0)


def reader_for(denoiser: nn.Module, train_timesteps: int = 1000) -> TimestepReader:
    """The reader that fits a denoiser's class.

    Args:
        denoiser: a diffusers denoiser.
        train_timesteps: the scheduler's `num_train_timesteps`.
    """
    convention = CONVENTIONS.get(type(denoiser).__name__, Convention())
    parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    if convention.argument not in parameters:
        raise StagePruneError(
            f"{type(denoiser).__name__}.forward has no argument `{convention.argument}` (it has {parameters}); "
            "register its convention in stageprune.core.hosts.diffusers.timesteps.CONVENTIONS."
        )
    scale = float(train_timesteps) if convention.scale == "train" else float(convention.scale)
    return TimestepReader(convention.argument, parameters.index(convention.argument), scale, convention.reversed)
