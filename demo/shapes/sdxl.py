"""The UNet of `demo/sdxl-shapes`: SDXL's parts at a size that trains on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from shapes.alignment import LayoutReader
from shapes.scenes import LATENT_SIDE, SIDE
from shapes.text import WIDTH

COMPONENT = "unet"
TIME_IDS = 16  # channels of each of SDXL's six micro-conditioning numbers


def new_unet() -> UNet2DConditionModel:
    """ResNets alone at 16x16; self- and cross-attention with GEGLU at 8x8, two transformer blocks deep on the way
    down, as SDXL puts its depth into the lower resolutions.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(4, 8),  # the number of heads, as SDXL's configuration misnames it
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS,
        projection_class_embeddings_input_dim=WIDTH + 6 * TIME_IDS,
    )


def layout_reader(unet: UNet2DConditionModel) -> LayoutReader:
    """After the last attention."""
    return LayoutReader(unet.up_blocks[0], lambda features: features, unet.config.block_out_channels[-1], LATENT_SIDE)


def new_scheduler() -> DDIMScheduler:
    """Velocity prediction down to pure noise (zero terminal SNR, Lin et al., 2024), so that 4 steps suffice."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=True,
    )


class Loss:
    """Squared error of the predicted velocity, with the caption replaced by SDXL's empty prompt one time in ten."""

    def __init__(self) -> None:
        self.scheduler = new_scheduler()
        self.time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)

    def __call__(self, unet: Any, latents: Tensor, text: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """For latents (B, 4, 16, 16) and encoded captions, at random times."""
        count = len(latents)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (count,), generator=generator)
        keep = (torch.rand(count, generator=generator) >= 0.1).float()
        # StableDiffusionXLPipeline gives zeros for an empty negative prompt (force_zeros_for_empty_prompt).
        states, pooled = text["states"] * keep[:, None, None], text["pooled"] * keep[:, None]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(count, -1)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = unet(noisy, timesteps, states, added_cond_kwargs=added).sample
        return F.mse_loss(velocity.float(), self.scheduler.get_velocity(latents, noise, timesteps))


def pipeline(unet: UNet2DConditionModel, parts: dict[str, Any]) -> StableDiffusionXLPipeline:
    """The whole pipeline."""
    return StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer"],
        unet=unet,
        scheduler=new_scheduler(),
        add_watermarker=False,
    )


def encode_text(parts: dict[str, Any], ids: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both CLIP encoders' states side by side, and the second one's projection."""
    first = parts["text_encoder"](ids["clip"], output_hidden_states=True).hidden_states[-2]
    second = parts["text_encoder_2"](ids["clip"], output_hidden_states=True)
    return {"states": torch.cat([first, second.hidden_states[-2]], -1), "pooled": second.text_embeds}
