"""What a pipeline adapter is, and which there are.

An adapter makes exactly the calls that its pipeline makes, so that trajectories are bit-equal to `pipe(...)`; a test
holds every adapter to that. Add a pipeline by adding a file with a class, and decorating it.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ....errors import StagePruneError
from ....host import Conditions, InputSize, Prompt
from .size import Pixels


@dataclass(frozen=True)
class Sampler:
    """A scheduler on its way, and the generators that a stochastic one draws from.

    Args:
        scheduler: a copy of the pipeline's, with its timesteps set.
        generators: one a sample, as they are after the first noise was drawn.
    """

    scheduler: Any
    generators: list[torch.Generator]

    def copy(self) -> Sampler:
        """An independent twin, which gives the same results."""
        return Sampler(copy.deepcopy(self.scheduler), [generator.clone_state() for generator in self.generators])

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Tensor:
        """The scheduler's step, with those of `options`, and the generators, that its class takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {
            name: value for name, value in (options | {"generator": self.generators}).items() if name in accepted
        }
        result: Tensor = self.scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
        return result


class PipelineAdapter(ABC):
    """What a pipeline class needs to be driven step by step.

    Args:
        size: of the images, in pixels; None is what the pipeline makes by itself.
    """

    pipelines: tuple[str, ...]
    """Names of the classes that it drives."""

    def __init__(self, size: Pixels | None = None) -> None:
        self.size = size

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Encode prompts on the pipeline's device, with whatever guidance needs beside them."""

    def read_prompt(self, text: str) -> Prompt:
        """A prompt from how it is written in a list of them: here, a text as it stands."""
        return text

    @abstractmethod
    def default_prompts(self, pipe: Any) -> list[Prompt]:
        """Prompts to calibrate on when the user gives none."""

    @abstractmethod
    def default_guidance(self, pipe: Any) -> float:
        """The guidance that the pipeline's models are used with."""

    @abstractmethod
    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """How the pipeline's own `__call__` takes prompts and guidance, and the size if one was asked for."""

    @abstractmethod
    def own_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Channels, height and width of one sample's noise, for the size that the pipeline makes by itself."""

    @abstractmethod
    def multiple(self, pipe: Any) -> int:
        """What the sides of an image, in pixels, must be multiples of."""

    def text_tokens(self, pipe: Any) -> int | None:
        """Tokens of text that `encode` gives the denoiser; None if it takes none, or nobody can tell."""
        return None

    def scale(self, pipe: Any) -> int:
        """Pixels of the image to one of the latent, along a side."""
        return int(pipe.vae_scale_factor)

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Channels, height and width of one sample's noise."""
        if self.size is None:
            return self.own_shape(pipe)
        channels, scale = self.own_shape(pipe)[0], self.scale(pipe)
        return channels, self.size[0] // scale, self.size[1] // scale

    def pixels(self, pipe: Any) -> Pixels:
        """Height and width of the images."""
        _, height, width = self.latent_shape(pipe)
        return height * self.scale(pipe), width * self.scale(pipe)

    def input_size(self, pipe: Any) -> InputSize:
        """What the denoiser is given in each call."""
        _, height, width = self.latent_shape(pipe)
        return InputSize(height, width, self.text_tokens(pipe))

    def check_size(self, pipe: Any) -> None:
        """StagePruneError if the pipeline cannot make images of this size."""
        if self.size is None or self.size == type(self)().pixels(pipe):
            return
        multiple = self.multiple(pipe)
        if any(side < 1 or side % multiple for side in self.size):
            raise StagePruneError(
                f"`size` must be multiples of {multiple} pixels (height x width) for this {type(pipe).__name__}, "
                f"got {self.size[0]} x {self.size[1]}."
            )

    def set_timesteps(self, pipe: Any, scheduler: Any, steps: int) -> None:
        """Set `scheduler` to `steps` as the pipeline does."""
        scheduler.set_timesteps(steps, device=pipe._execution_device)

    def time_argument(self, pipe: Any, timestep: Tensor) -> Tensor:
        """What the denoiser is told at one of the scheduler's timesteps, a scalar."""
        return timestep

    def first_latents(self, pipe: Any, scheduler: Any, noise: Tensor) -> Tensor:
        """The latents that the loop starts from."""
        return noise

    @abstractmethod
    def step(
        self, pipe: Any, sampler: Sampler, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """One pass of the pipeline's loop: latents to latents."""

    @abstractmethod
    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Images in [0, 1], (batch, 3, height, width); no safety checker, no watermark."""


_ADAPTERS: dict[str, type[PipelineAdapter]] = {}

A = TypeVar("A", bound=type[PipelineAdapter])


def register_pipeline(cls: A) -> A:
    """Class decorator: drive the pipelines that the class lists."""
    for name in cls.pipelines:
        _ADAPTERS[name] = cls
    return cls


def find_adapter(pipe: Any, size: Pixels | None = None) -> PipelineAdapter | None:
    """The adapter of a pipeline, searched along its class's bases; None if there is none."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in _ADAPTERS:
            return _ADAPTERS[cls.__name__](size)
    return None


def adapter_for(pipe: Any, size: Pixels | None = None) -> PipelineAdapter:
    """The adapter of a pipeline. StagePruneError lists the pipelines that have one."""
    adapter = find_adapter(pipe, size)
    if adapter is not None:
        return adapter
    known = ", ".join(sorted(_ADAPTERS))
    raise StagePruneError(
        f"{type(pipe).__name__} cannot be calibrated or evaluated yet; supported pipelines: {known}. Enabling an "
        "existing bundle needs only a supported denoiser: make the bundle with one of these, for instance from "
        "`pipe.components`."
    )
