"""StableDiffusionXLPipeline: two text encoders, and numbers about the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....host import Conditions, Prompt
from .adapter import register_pipeline
from .sd import StableDiffusionAdapter
from .text import decoded, paired, texts


@register_pipeline
class StableDiffusionXLAdapter(StableDiffusionAdapter):
    """SDXL base and what is distilled from it."""

    pipelines = ("StableDiffusionXLPipeline",)

    def default_guidance(self, pipe: Any) -> float:
        """That of the pipeline."""
        return 5.0

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Texts, and the pipeline's way to have none: zeros, or the empty text."""
        chosen = texts(pipe, prompts)
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            chosen, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        tensors = {
            "embeds": embeds,
            "negative_embeds": negative,
            "pooled": pooled,
            "negative_pooled": negative_pooled,
            "time_ids": self._time_ids(pipe, pooled).to(embeds).repeat(len(chosen), 1),
        }
        return Conditions(tensors)

    def own_shape(self, pipe: Any) -> tuple[int, int, int]:
        """That of the pipeline's own size."""
        return (pipe.unet.config.in_channels, pipe.default_sample_size, pipe.default_sample_size)

    def text_tokens(self, pipe: Any) -> int | None:
        """That of either encoder: their texts lie side by side."""
        tokenizer = pipe.tokenizer_2 or pipe.tokenizer
        return None if tokenizer is None else int(tokenizer.model_max_length)

    def set_timesteps(self, pipe: Any, scheduler: Any, steps: int) -> None:
        """From the first timestep on, which a scheduler would otherwise look for by its value."""
        super().set_timesteps(pipe, scheduler, steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def _time_ids(self, pipe: Any, pooled: Tensor) -> Tensor:
        """Original size, crop and target size of an image as the pipeline makes it: whole."""
        size = self.pixels(pipe)
        second = pipe.text_encoder_2
        width = pooled.shape[-1] if second is None else second.config.projection_dim
        ids: Tensor = pipe._get_add_time_ids(
            size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=int(width)
        )
        return ids

    def _added(self, conditions: Conditions, guided: bool) -> dict[str, Tensor] | None:
        """Pooled text and size."""
        ids = conditions.tensors["time_ids"]
        return {
            "text_embeds": paired(conditions, "pooled", guided),
            "time_ids": torch.cat([ids] * 2) if guided else ids,
        }

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """In float32 if the VAE asks for it: SDXL's overflows in float16."""
        vae, dtype = pipe.vae, pipe.vae.dtype
        if dtype != torch.float16 or not vae.config.force_upcast:
            return decoded(pipe, _unscaled(vae.config, latents))
        vae.to(torch.float32)
        try:
            return decoded(pipe, _unscaled(vae.config, latents.float()))
        finally:
            vae.to(dtype)


def _unscaled(config: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE knows them; some come with a mean and a spread per channel."""
    mean, spread = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or spread is None:
        plain: Tensor = latents / config.scaling_factor
        return plain
    channels = (1, -1, 1, 1)
    scaled: Tensor = latents * torch.tensor(spread).view(channels).to(latents) / config.scaling_factor
    return scaled + torch.tensor(mean).view(channels).to(latents)
