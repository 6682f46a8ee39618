"""StableDiffusionPipeline: one text encoder, a UNet, guidance in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import StagePruneError
from ....host import Conditions, Prompt
from .adapter import Sampler, register_pipeline
from .text import TextAdapter, decoded, guide, paired, texts


@register_pipeline
class StableDiffusionAdapter(TextAdapter):
    """Stable Diffusion 1 and 2. Models distilled with guidance as an input (LCM) get it there, in one pass."""

    pipelines: tuple[str, ...] = ("StableDiffusionPipeline",)

    def default_guidance(self, pipe: Any) -> float:
        """That of the pipeline."""
        return 7.5

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Texts, and as many empty ones."""
        embeds, negative = pipe.encode_prompt(texts(pipe, prompts), pipe._execution_device, 1, True)
        return Conditions({"embeds": embeds, "negative_embeds": negative})

    def own_shape(self, pipe: Any) -> tuple[int, int, int]:
        """That of the UNet's own size."""
        size = pipe.unet.config.sample_size
        if size is None:
            raise StagePruneError(
                "the UNet's configuration has no `sample_size`, so the pipeline has no size of its own; set it with "
                "pipe.unet.register_to_config(sample_size=...) to the latent's height and width."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return (pipe.unet.config.in_channels, height, width)

    def multiple(self, pipe: Any) -> int:
        """The pipeline asks for 8, whatever its VAE."""
        return math.lcm(8, self.scale(pipe))

    def text_tokens(self, pipe: Any) -> int | None:
        """Every text is padded to the tokenizer's length."""
        return None if pipe.tokenizer is None else int(pipe.tokenizer.model_max_length)

    def first_latents(self, pipe: Any, scheduler: Any, noise: Tensor) -> Tensor:
        """Noise at the scheduler's scale."""
        scaled: Tensor = noise * scheduler.init_noise_sigma
        return scaled

    def step(
        self, pipe: Any, sampler: Sampler, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """Both passes of guidance in one batch, the unconditional one first."""
        guided = guidance > 1 and pipe.unet.config.time_cond_proj_dim is None
        inputs = torch.cat([latents] * 2) if guided else latents
        output = pipe.unet(
            sampler.scheduler.scale_model_input(inputs, timestep),
            timestep,
            encoder_hidden_states=paired(conditions, "embeds", guided),
            timestep_cond=_embedded(pipe, guidance, latents),
            added_cond_kwargs=self._added(conditions, guided),
            return_dict=False,
        )[0]
        if guided:
            output = guide(output, guidance)
        return sampler.step(output, timestep, latents, eta=0.0)

    def _added(self, conditions: Conditions, guided: bool) -> dict[str, Tensor] | None:
        """What the UNet takes besides the texts."""
        return None

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Decode with the pipeline's VAE."""
        return decoded(pipe, latents / pipe.vae.config.scaling_factor)


def _embedded(pipe: Any, guidance: float, latents: Tensor) -> Tensor | None:
    """Guidance as an input of the UNet, for models that take it so."""
    width = pipe.unet.config.time_cond_proj_dim
    if width is None:
        return None
    scale = torch.tensor(guidance - 1).repeat(len(latents))
    embedding: Tensor = pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
    return embedding.to(device=latents.device, dtype=latents.dtype)
