"""FluxPipeline: packed latents, guidance as an input of the model or as a second call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....host import Conditions, Prompt
from .adapter import Sampler, register_pipeline
from .flow import shift_for
from .text import TextAdapter, decoded, length_for, texts


@register_pipeline
class FluxAdapter(TextAdapter):
    """FLUX.1. What `guidance` means depends on the model.

    Models that take guidance as an input (`guidance_embeds`, FLUX.1-dev) get it there: it is the pipeline's
    `guidance_scale`. Others (FLUX.1-schnell) take none: above 1 it is the pipeline's `true_cfg_scale`, a second call of
    the transformer with the empty prompt.
    """

    pipelines = ("FluxPipeline",)

    def default_guidance(self, pipe: Any) -> float:
        """That of the pipeline: as an input 3.5, as a second call none."""
        return 3.5 if pipe.transformer.config.guidance_embeds else 1.0

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Texts, and as many empty ones if the model may need them."""
        chosen = texts(pipe, prompts)
        embeds, pooled = self._encode(pipe, chosen)
        if pipe.transformer.config.guidance_embeds:
            return Conditions({"embeds": embeds, "pooled": pooled})
        negative, negative_pooled = self._encode(pipe, [""] * len(chosen))
        return Conditions(
            {"embeds": embeds, "pooled": pooled, "negative_embeds": negative, "negative_pooled": negative_pooled}
        )

    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """Texts as a list, and how much of them T5 reads; a negative prompt is what switches the second call on."""
        arguments = {"prompt": texts(pipe, prompts), "max_sequence_length": _text_length(pipe)}
        arguments |= self.size_arguments()
        if pipe.transformer.config.guidance_embeds:
            return {**arguments, "guidance_scale": guidance}
        return {**arguments, "true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}

    def own_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Before packing, at the pipeline's own size; sides are even."""
        side = pipe.default_sample_size // 2 * 2
        return (pipe.transformer.config.in_channels // 4, side, side)

    def multiple(self, pipe: Any) -> int:
        """2 x 2 pixels of the latent make a token."""
        return 2 * self.scale(pipe)

    def text_tokens(self, pipe: Any) -> int | None:
        """T5's; CLIP gives one vector, which is no token."""
        return _text_length(pipe)

    def set_timesteps(self, pipe: Any, scheduler: Any, steps: int) -> None:
        """Even noise levels, shifted for the image's size."""
        from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps  # noqa: PLC0415  # needs transformers

        sigmas = None if getattr(scheduler.config, "use_flow_sigmas", False) else np.linspace(1.0, 1 / steps, steps)
        _, height, width = self.latent_shape(pipe)
        shift = shift_for(scheduler, height * width // 4, 1.15)
        retrieve_timesteps(scheduler, steps, pipe._execution_device, sigmas=sigmas, mu=shift)
        scheduler.set_begin_index(0)

    def time_argument(self, pipe: Any, timestep: Tensor) -> Tensor:
        """From 0 to 1, in the model's precision."""
        return timestep.to(pipe.transformer.dtype) / 1000

    def first_latents(self, pipe: Any, scheduler: Any, noise: Tensor) -> Tensor:
        """Packed: 2 x 2 pixels make a token."""
        packed: Tensor = pipe._pack_latents(noise, *noise.shape)
        return packed

    def step(
        self, pipe: Any, sampler: Sampler, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """One call, or two with the unconditional one last."""
        embedded = pipe.transformer.config.guidance_embeds
        output = self._call(pipe, latents, timestep, conditions, "", guidance if embedded else None)
        if guidance > 1 and not embedded:
            negative = self._call(pipe, latents, timestep, conditions, "negative_", None)
            output = negative + guidance * (output - negative)
        return sampler.step(output, timestep, latents)

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Unpack, and decode with the pipeline's VAE."""
        config, (height, width) = pipe.vae.config, self.pixels(pipe)
        unpacked = pipe._unpack_latents(latents, height, width, self.scale(pipe))
        return decoded(pipe, unpacked / config.scaling_factor + config.shift_factor)

    def _encode(self, pipe: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, pooled, _ = pipe.encode_prompt(
            prompts, None, device=pipe._execution_device, max_sequence_length=_text_length(pipe)
        )
        return embeds, pooled

    def _call(
        self,
        pipe: Any,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        which: str,
        guidance: float | None,
    ) -> Tensor:
        """One call of the transformer, on the texts or (`which` = `negative_`) on the empty ones."""
        embeds, pooled = conditions.tensors[which + "embeds"], conditions.tensors[which + "pooled"]
        batch, (_, height, width) = len(latents), self.latent_shape(pipe)
        scale = None if guidance is None else torch.full([batch], guidance, device=latents.device, dtype=torch.float32)
        output: Tensor = pipe.transformer(
            hidden_states=latents,
            timestep=self.time_argument(pipe, timestep).expand(batch),
            guidance=scale,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, embeds.dtype),
            return_dict=False,
        )[0]
        return output


def _text_length(pipe: Any) -> int:
    """Tokens that T5 reads: the pipeline's 512, less for a shorter tokenizer."""
    return length_for(pipe.tokenizer_2, 512)
