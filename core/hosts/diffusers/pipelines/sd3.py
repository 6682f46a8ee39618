"""StableDiffusion3Pipeline: flow matching, up to three text encoders, guidance in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import StagePruneError
from ....host import Conditions, Prompt
from .adapter import Sampler, register_pipeline
from .flow import shift_for
from .text import TextAdapter, decoded, guide, length_for, paired, texts


@register_pipeline
class StableDiffusion3Adapter(TextAdapter):
    """Stable Diffusion 3 and 3.5, with or without the T5 encoder."""

    pipelines = ("StableDiffusion3Pipeline",)

    def default_guidance(self, pipe: Any) -> float:
        """That of the pipeline."""
        return 7.0

    def encode(self, pipe: Any, prompts: Sequence[Prompt]) -> Conditions:
        """Texts, and as many empty ones."""
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            texts(pipe, prompts),
            None,
            None,
            device=pipe._execution_device,
            do_classifier_free_guidance=True,
            max_sequence_length=_text_length(pipe),
        )
        return Conditions(
            {"embeds": embeds, "negative_embeds": negative, "pooled": pooled, "negative_pooled": negative_pooled}
        )

    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """Texts as a list, and how much of them T5 reads."""
        return {**super().call_arguments(pipe, prompts, guidance), "max_sequence_length": _text_length(pipe)}

    def own_shape(self, pipe: Any) -> tuple[int, int, int]:
        """That of the pipeline's own size."""
        return (pipe.transformer.config.in_channels, pipe.default_sample_size, pipe.default_sample_size)

    def multiple(self, pipe: Any) -> int:
        """Patches of the transformer."""
        return self.scale(pipe) * int(pipe.transformer.config.patch_size)

    def text_tokens(self, pipe: Any) -> int | None:
        """CLIP's, then T5's."""
        return int(pipe.tokenizer_max_length) + _text_length(pipe)

    def check_size(self, pipe: Any) -> None:
        """The table of positions bounds it, too."""
        super().check_size(pipe)
        largest = pipe.transformer.config.pos_embed_max_size * self.multiple(pipe)
        if self.size is not None and max(self.size) > largest:
            raise StagePruneError(
                f"`size` must be at most {largest} pixels a side for this {type(pipe).__name__} (its "
                f"pos_embed_max_size), got {self.size[0]} x {self.size[1]}."
            )

    def set_timesteps(self, pipe: Any, scheduler: Any, steps: int) -> None:
        """Shifted for the image's size where the scheduler is configured so."""
        options = {}
        if scheduler.config.get("use_dynamic_shifting", None):
            (_, height, width), patch = self.latent_shape(pipe), pipe.transformer.config.patch_size
            options["mu"] = shift_for(scheduler, (height // patch) * (width // patch), 1.16)
        scheduler.set_timesteps(steps, device=pipe._execution_device, **options)

    def step(
        self, pipe: Any, sampler: Sampler, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
    ) -> Tensor:
        """Both passes of guidance in one batch, the unconditional one first."""
        guided = guidance > 1
        inputs = torch.cat([latents] * 2) if guided else latents
        output = pipe.transformer(
            hidden_states=inputs,
            timestep=timestep.expand(len(inputs)),
            encoder_hidden_states=paired(conditions, "embeds", guided),
            pooled_projections=paired(conditions, "pooled", guided),
            return_dict=False,
        )[0]
        if guided:
            output = guide(output, guidance)
        return sampler.step(output, timestep, latents)

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Decode with the pipeline's VAE."""
        config = pipe.vae.config
        return decoded(pipe, latents / config.scaling_factor + config.shift_factor)


def _text_length(pipe: Any) -> int:
    """Tokens that T5 reads: the pipeline's 256, less for a shorter tokenizer."""
    return length_for(pipe.tokenizer_3, 256)
