"""What differs between pipelines: how prompts are encoded, the denoiser is called with guidance, and latents decoded.

Each adapter makes exactly the calls that its pipeline makes, so that trajectories are bit-equal to `pipe(...)`; a test
holds every adapter to that. Add a pipeline by adding a class and decorating it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...errors import StagePruneError
from ...host import Conditions, Prompt


class PipelineAdapter(Protocol):
    """What a pipeline class needs to be driven step by step."""

    pipelines: tuple[str, ...]

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Encode prompts on the pipeline's device."""

    def default_prompts(self, pipe: Any) -> list[Prompt]:
        """Prompts to calibrate on when the user gives none."""

    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """How the pipeline's own `__call__` takes prompts."""

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        """Shape of one sample's latents."""

    def begin_step(self, scheduler: Any, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents that the pipeline hands to the scheduler's step: for most pipelines the ones it got."""

    def predict(
        self, pipe: Any, scheduler: Any, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """The guided model output that the scheduler's step takes. `latents` come from `begin_step`."""

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Images in [0, 1], (batch, 3, height, width)."""


_ADAPTERS: dict[str, PipelineAdapter] = {}

A = TypeVar("A")


def register_pipeline(cls: type[A]) -> type[A]:
    """Class decorator: drive the pipelines that the class lists."""
    adapter: Any = cls()
    for name in adapter.pipelines:
        _ADAPTERS[name] = adapter
    return cls


def adapter_for(pipe: Any) -> PipelineAdapter:
    """The adapter of a pipeline, searched along its class's bases."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in _ADAPTERS:
            return _ADAPTERS[cls.__name__]
    known = ", ".join(sorted(_ADAPTERS))
    raise StagePruneError(
        f"{type(pipe).__name__} cannot be calibrated or evaluated yet; supported pipelines: {known}. "
        "Enabling an existing bundle needs only a supported denoiser."
    )


@register_pipeline
class DiTAdapter:
    """Class-conditional DiT. Class 1000 is the null class: DiTPipeline hard-codes it."""

    pipelines = ("DiTPipeline",)
    null_class = 1000

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Class labels as integers, or as the texts that the pipeline knows them by."""
        labels = []
        for prompt in prompts:
            if isinstance(prompt, str) and not prompt.isdigit():
                if prompt not in pipe.labels:
                    known = ", ".join(list(pipe.labels)[:12]) or "none: give numbers"
                    raise StagePruneError(f"prompt {prompt!r} is no class of this pipeline; its labels are {known}.")
                prompt = pipe.labels[prompt]
            label = int(prompt)
            if not 0 <= label < pipe.transformer.config.num_embeds_ada_norm:
                raise StagePruneError(
                    f"class label {label} is out of range: the model knows 0 to "
                    f"{pipe.transformer.config.num_embeds_ada_norm - 1}."
                )
            labels.append(label)
        return Conditions({"class_labels": torch.tensor(labels, device=pipe._execution_device)})

    def default_prompts(self, pipe: Any) -> list[Prompt]:
        """All classes that the pipeline has names for, or all that its tables hold."""
        return sorted(set(pipe.labels.values())) or list(range(pipe.transformer.config.num_embeds_ada_norm))

    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Class labels as a list."""
        return {"class_labels": self.encode(pipe, prompts).tensors["class_labels"].tolist()}

    def latent_shape(self, pipe: Any) -> tuple[int, ...]:
        """Channels and side of the latents."""
        config = pipe.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def begin_step(self, scheduler: Any, latents: Tensor, timestep: Tensor) -> Tensor:
        """Scaled: DiTPipeline overwrites its latents with the scheduler's scaled input and steps from there."""
        scaled: Tensor = scheduler.scale_model_input(latents, timestep)
        return scaled

    def predict(
        self, pipe: Any, scheduler: Any, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """Both passes of guidance in one batch."""
        labels = conditions.tensors["class_labels"]
        guided = guidance > 1
        inputs = torch.cat([latents] * 2) if guided else latents
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        times = timestep[None].to(inputs.device).expand(len(inputs))
        output: Tensor = pipe.transformer(inputs, timestep=times, class_labels=labels).sample
        output = output[:, : latents.shape[1]]  # the rest is a learned variance, which the sampler does not use
        if not guided:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Decode with the pipeline's VAE."""
        images = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents).sample
        shown: Tensor = (images / 2 + 0.5).clamp(0, 1)
        return shown
