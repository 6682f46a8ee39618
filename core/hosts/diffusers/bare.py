"""A denoiser without its pipeline as a `Host`: enough to prune without data, to benchmark, and to enable a bundle."""

from __future__ import annotations

from typing import Any, NoReturn

import diffusers
import torch
from torch import nn

from ...errors import StagePruneError
from ...groups import family_of
from ...host import InputSize, TauReader
from .timesteps import reader_for


class DenoiserHost:
    """A bare denoiser. Whatever needs a sampler, prompts or a decoder is refused.

    Args:
        denoiser: a denoiser of a supported family.
        input_size: what it is to be called with, for counting MACs; the family's default by default.
    """

    def __init__(self, denoiser: nn.Module, input_size: InputSize | None = None) -> None:
        family_of(denoiser)
        self.input_size = input_size
        self._denoiser = denoiser
        self.component = "unet" if "UNet" in type(denoiser).__name__ else "transformer"

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser."""
        return self._denoiser

    @property
    def tau_reader(self) -> TauReader:
        """Reader of the denoiser's timestep argument, for 1000 training timesteps."""
        return reader_for(self._denoiser)

    def describe(self) -> dict[str, Any]:
        """Class and versions."""
        return {
            "pipeline": None,
            "model": type(self._denoiser).__name__,
            "component": self.component,
            "versions": {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__},
        }

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StagePruneError(
            f"a bare {type(self._denoiser).__name__} has no sampler, prompts or decoder: pass its pipeline instead."
        )

    taus = visiting = noise_levels = target = default_prompts = encode = start = advance = decode = _refuse
    default_guidance = property(_refuse)
