"""The transformer of `demo/flux-shapes`: FLUX's double and single blocks, trained as a rectified flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from shapes.alignment import LayoutReader
from shapes.text import LENGTH, WIDTH

COMPONENT = "transformer"
PATCHES = 8  # a side: 16x16 latents in 2x2 patches
TRAINING_SHIFT = 3.0
"""Towards noise (Esser et al., 2024, equation 23): large objects still show through nine parts of noise in ten, so what
stands where is decided there.
"""


def new_transformer() -> FluxTransformer2DModel:
    """Two double and four single blocks, 8 heads of 24; every block starts as the identity and the output as zero."""
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=24,
        num_attention_heads=8,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 10, 10),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
                nn.init.zeros_(module.weight)
    return model


def layout_reader(model: FluxTransformer2DModel) -> LayoutReader:
    """After the second of the four single blocks, which return the text's states and the picture's."""
    width = model.inner_dim
    return LayoutReader(
        model.single_transformer_blocks[1],
        lambda states: states[1].mT.unflatten(2, (PATCHES, PATCHES)),
        width,
        PATCHES,
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along straight paths, more of them at high noise, where the layout is decided."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=False)


class Loss:
    """Squared error of the predicted velocity from data to noise, with an empty caption one time in ten."""

    def __init__(self, parts: dict[str, Any], empty: dict[str, Tensor]) -> None:
        self.empty = encode_text(parts, empty)
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, PATCHES, PATCHES, "cpu", torch.float32)
        self.text_ids = torch.zeros(LENGTH, 3)

    def __call__(
        self, transformer: Any, latents: Tensor, text: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """For latents (B, 4, 16, 16) and encoded captions, at random times."""
        count = len(latents)
        packed = FluxPipeline._pack_latents(latents, count, latents.shape[1], *latents.shape[2:])
        noise = torch.randn(packed.shape, generator=generator)
        sigma = torch.randn(count, generator=generator).sigmoid()  # logit-normal, as in SD3 (Esser et al., 2024)
        sigma = TRAINING_SHIFT * sigma / (1 + (TRAINING_SHIFT - 1) * sigma)
        sigma = torch.where(torch.rand(count, generator=generator) < 0.2, torch.rand(count, generator=generator), sigma)
        drop = torch.rand(count, generator=generator) < 0.1
        states = torch.where(drop[:, None, None], self.empty["states"], text["states"])
        pooled = torch.where(drop[:, None], self.empty["pooled"], text["pooled"])
        noisy = torch.lerp(packed, noise, sigma[:, None, None])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = transformer(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
            ).sample
        return F.mse_loss(velocity.float(), noise - packed)


def pipeline(transformer: FluxTransformer2DModel, parts: dict[str, Any]) -> FluxPipeline:
    """The whole pipeline."""
    return FluxPipeline(
        scheduler=new_scheduler(),
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        text_encoder_2=parts["t5"],
        tokenizer_2=parts["t5_tokenizer"],
        transformer=transformer,
    )


def encode_text(parts: dict[str, Any], ids: dict[str, Tensor]) -> dict[str, Tensor]:
    """T5's states and the first CLIP's pooled output."""
    return {"states": parts["t5"](ids["t5"])[0], "pooled": parts["text_encoder"](ids["clip"]).pooler_output}
