"""Train the autoencoder that both shapes pipelines share: 64x64x3 to 16x16x4, no attention."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shapes.scenes import SIDE, draw_layouts, render
from training import Descent, log, standardise

BATCH = 32
POOL = 6400  # scenes that are rendered at once


def new_autoencoder() -> AutoencoderKL:
    """Two halvings; FLUX needs `shift_factor`, SDXL must not upcast."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
        shift_factor=0.0,
        force_upcast=False,
    )


def train_autoencoder(steps: int, seed: int = 1) -> tuple[AutoencoderKL, float]:
    """The autoencoder, with latents of zero mean and unit variance, and its PSNR in dB on fresh scenes."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vae = new_autoencoder()
    descend = Descent(vae, steps, 2e-3)
    for step in range(steps):
        begin = step * BATCH % POOL
        if begin == 0:
            pool = render(draw_layouts(POOL, generator), generator) * 2 - 1
        target = pool[begin : begin + BATCH]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(target)).float()
            mean, logvar = moments.chunk(2, dim=1)
            logvar = logvar.clamp(-20, 10)
            latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            error = vae.decode(latents).sample.float() - target
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-3 * kl
        descend(loss)
        if step % 100 == 0:
            log.info("vae step %d/%d loss %.4f kl %.3f", step, steps, loss.item(), kl.item())
    vae.eval().requires_grad_(False)
    fresh = render(draw_layouts(1024, generator), generator)
    standardise(vae, encode(vae, fresh))
    vae.register_to_config(scaling_factor=1.0)
    return vae, psnr(vae, fresh)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (the posterior's mean) of images in [0, 1]."""
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(128)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in latents.split(128)])


def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Of the reconstructions, in dB."""
    return round(float(-10 * (decode(vae, encode(vae, images)) - images).square().mean().log10()), 1)
