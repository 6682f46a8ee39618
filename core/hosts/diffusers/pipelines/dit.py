"""DiTPipeline: class labels, guidance in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import StagePruneError
from ....host import Conditions, Prompt
from .adapter import PipelineAdapter, Sampler, register_pipeline


@register_pipeline
class DiTAdapter(PipelineAdapter):
    """Class-conditional DiT. Class 1000 is the null class: DiTPipeline hard-codes it."""

    pipelines = ("DiTPipeline",)
    null_class = 1000

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Class labels as integers, or as the texts that the pipeline knows them by."""
        labels = []
        for prompt in prompts:
            if isinstance(prompt, str) and not prompt.isdecimal():
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

    def read_prompt(self, text: str) -> Prompt:
        """Numbers are class labels."""
        return int(text) if text.isdecimal() else text

    def default_prompts(self, pipe: Any) -> list[Prompt]:
        """All classes that the pipeline has names for, or all that its tables hold."""
        return sorted(set(pipe.labels.values())) or list(range(pipe.transformer.config.num_embeds_ada_norm))

    def default_guidance(self, pipe: Any) -> float:
        """Light: 1.5 is what DiT's paper reports its best scores with."""
        return 1.5

    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """Class labels as a list."""
        labels = self.encode(pipe, prompts).tensors["class_labels"].tolist()
        return {"class_labels": labels, "guidance_scale": guidance}

    def own_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Channels and side of the latents."""
        config = pipe.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def scale(self, pipe: Any) -> int:
        """DiTPipeline does not tell."""
        return 8 if pipe.vae is None else 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    def multiple(self, pipe: Any) -> int:
        """There is one size only."""
        return self.own_shape(pipe)[1] * self.scale(pipe)

    def check_size(self, pipe: Any) -> None:
        """The positions are those of one size."""
        own = self.multiple(pipe)
        if self.size not in (None, (own, own)):
            height, width = self.size
            raise StagePruneError(
                f"`size` must be {own} x {own} pixels, the one that this DiT is made for; got {height} x {width}."
            )

    def step(
        self, pipe: Any, sampler: Sampler, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """DiTPipeline overwrites its latents with the scheduler's scaled input, and steps from there."""
        latents = sampler.scheduler.scale_model_input(latents, timestep)
        labels, guided = conditions.tensors["class_labels"], guidance > 1
        inputs = torch.cat([latents] * 2) if guided else latents
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null_class)])
        times = timestep[None].to(inputs.device).expand(len(inputs))
        output: Tensor = pipe.transformer(inputs, timestep=times, class_labels=labels).sample
        output = output[:, : latents.shape[1]]  # the rest is a learned variance, which the sampler does not use
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        return sampler.step(output, timestep, latents)

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Decode with the pipeline's VAE."""
        images = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents).sample
        shown: Tensor = (images / 2 + 0.5).clamp(0, 1)
        return shown
