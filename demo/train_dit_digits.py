"""Train the demo host `demo/dit-digits` from nothing: a judge, an autoencoder and a diffusion transformer.

The data are the 1,797 handwritten digits that ship with scikit-learn, so nothing is downloaded. Run

    python demo/train_dit_digits.py all

or one stage of it (`judge`, `vae`, `dit`, `measure`), in this order. Every stage is seeded, takes two CPU threads
and writes its part of the folder; `measure` reads the saved files back and prints every figure of the README.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stageprune.core.evaluation.class_judge import ClassJudge
from training import Average, Descent, batches, log, publish, record, standardise

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NULL_CLASS = 1000  # DiTPipeline hard-codes this id for "no class"
IMAGE_SIZE = 32


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, apart from the code."""

    out: Path
    work: Path
    seed: int = 0
    judge_steps: int = 1500
    vae_steps: int = 1500
    dit_steps: int = 6200
    batch: int = 64
    copies: int = 24  # augmented copies of each digit whose latents are precomputed
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    per_class: int = 50  # generated images per class in `measure`
    guidance: float = 1.5


def digits() -> tuple[Tensor, Tensor]:
    """All digits as `(N, 1, 8, 8)` in [0, 1] (the data set counts ink from 0 to 16), and their classes."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target, dtype=torch.long)


def split(labels: Tensor) -> list[Tensor]:
    """Indices of the judge's training images (80 %) and of its held-out images, stratified, the same every time."""
    return train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)


def enlarge(images: Tensor) -> Tensor:
    """The 8x8 digits as 32x32 images: bicubic, then clamped because bicubic interpolation overshoots."""
    return F.interpolate(images, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Randomly rotated (8 degrees), scaled (5 %) and shifted (half an original pixel) 32x32 versions.

    Sampling straight from the 8x8 originals interpolates once; without a transform it equals `enlarge`.
    """
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit * strength

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.05)
    shift = 0.5 / images.shape[-1] * 2  # affine_grid's axis runs from -1 to 1
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack([cos, -sin, uniform(shift), sin, cos, uniform(shift)], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)


def to_model(images: Tensor) -> Tensor:
    """Grey images in [0, 1] as the autoencoder takes them: three equal channels in [-1, 1]."""
    return images.expand(-1, 3, -1, -1) * 2 - 1


def train_judge(settings: Settings) -> None:
    """Train the judge on 80 % of the real digits, and store the real digits' statistics with it."""
    generator = torch.Generator().manual_seed(settings.seed)
    images, labels = digits()
    train, held = split(labels)
    judge = ClassJudge()
    descend = Descent(judge.train(), settings.judge_steps, 3e-3, 0.05)
    for step, picked in enumerate(batches(len(train), 64, settings.judge_steps, generator)):
        picked = train[picked]
        # Twice the generator's augmentation: the judge must not mistake a slanted digit for a wrong one.
        loss = F.cross_entropy(judge(augment(images[picked], generator, 2.0)), labels[picked], label_smoothing=0.05)
        descend(loss)
        if step % 250 == 0:
            log.info("judge step %d/%d loss %.4f", step, settings.judge_steps, loss.item())
    judge.eval().requires_grad_(False)
    judge.held_out_accuracy = recognised(judge, enlarge(images[held]), labels[held])
    judge.held_out_images = len(held)
    judge.fit_reference(torch.cat([augment(images, generator) for _ in range(16)]))
    publish(settings.out / "judge", judge.save)


def train_vae(settings: Settings) -> None:
    """Train a small autoencoder (one halving, no attention) whose latents have zero mean and unit variance."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    images, _ = digits()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    descend = Descent(vae, settings.vae_steps, 2e-3)
    for step, picked in enumerate(batches(len(images), settings.batch, settings.vae_steps, generator)):
        target = to_model(augment(images[picked], generator))
        posterior = vae.encode(target).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        error = vae.decode(latents).sample - target
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + error.square().mean() + 5e-4 * kl
        descend(loss)
        if step % 250 == 0:
            log.info("vae step %d/%d loss %.4f kl %.3f", step, settings.vae_steps, loss.item(), kl.item())
    vae.eval().requires_grad_(False)
    standardise(vae, encode(vae, augment(images, generator)))
    vae.register_to_config(scaling_factor=round(float(1 / encode(vae, enlarge(images)).std()), 4))
    publish(settings.out / "vae", vae.save_pretrained)
    record(settings.out, vae_scaling_factor=vae.config.scaling_factor)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Unscaled latents (the posterior's mean) of grey images in [0, 1]."""
    return torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in images.split(256)])


def new_dit() -> DiTTransformer2DModel:
    """The transformer, initialised as DiT is: every block starts as the identity and the output as zero."""
    shape = {"num_attention_heads": 8, "attention_head_dim": 24, "num_layers": 6, "sample_size": IMAGE_SIZE // 2}
    dit = DiTTransformer2DModel(**shape, in_channels=4, out_channels=4, patch_size=2, num_embeds_ada_norm=1000)
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(dit.pos_embed.proj.weight.view(dit.inner_dim, -1))
    for block in dit.transformer_blocks:
        for layer in (block.norm1.emb.timestep_embedder.linear_1, block.norm1.emb.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        nn.init.normal_(table, std=0.02)
        # Rows of classes that do not exist get no gradient and stay zero: they cost nothing once compressed.
        table.data[len(NAMES) : NULL_CLASS] = 0
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(dit.proj_out_1.weight)
    nn.init.zeros_(dit.proj_out_2.weight)
    # In training mode each block would drop labels on its own; the only other use of that mode, dropout, is off.
    return dit.eval()


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling: diffusers' linear betas, 0.0001 to 0.02 in 1,000 steps."""
    return DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)


def save_pipeline(settings: Settings, folder: Path, weights: list[Tensor]) -> None:
    """Write the whole pipeline, with `weights` as the transformer's parameters, stored in float16."""
    dit, vae = new_dit(), AutoencoderKL.from_pretrained(settings.out / "vae")
    vae.register_to_config(_name_or_path="")  # diffusers would write down where it was read from
    for parameter, weight in zip(dit.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    if not all(bool(weight.half().isfinite().all()) for weight in weights):
        raise RuntimeError("a weight does not fit into float16: train with a lower learning rate")
    pipeline = DiTPipeline(transformer=dit.half(), vae=vae, scheduler=new_scheduler())
    pipeline.register_to_config(id2label={str(index): name for index, name in enumerate(NAMES)})
    publish(folder, pipeline.save_pretrained)
    log.info("wrote %s", folder)


def diffusion_loss(dit: nn.Module, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity, with the label dropped for one image in ten."""
    count = len(latents)
    scheduler = new_scheduler()
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    labels = labels.masked_fill(torch.rand(count, generator=generator) < 0.1, NULL_CLASS)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = dit(noisy, timestep=timesteps, class_labels=labels).sample
    return F.mse_loss(velocity.float(), scheduler.get_velocity(latents, noise, timesteps))


def train_dit(settings: Settings) -> None:
    """Train the transformer on precomputed latents; the published weights are a moving average."""
    generator = torch.Generator().manual_seed(settings.seed + 2)
    vae = AutoencoderKL.from_pretrained(settings.out / "vae").eval()
    images, labels = digits()
    copies = [encode(vae, augment(images, generator)) for _ in range(settings.copies)]
    latents, labels = torch.cat(copies) * vae.config.scaling_factor, labels.repeat(settings.copies)
    dit = new_dit()
    descend = Descent(dit, settings.dit_steps, settings.learning_rate, 0.01)
    average = Average(dit, settings.ema_decay)
    for step, picked in enumerate(batches(len(latents), settings.batch, settings.dit_steps, generator), start=1):
        descend(loss := diffusion_loss(dit, latents[picked], labels[picked], generator))
        average.update(step)
        if step % 100 == 0:
            log.info("dit step %d/%d loss %.4f", step, settings.dit_steps, loss.item())
        if step % 1000 == 0:
            save_pipeline(settings, settings.work, average.weights)
    save_pipeline(settings, settings.out, average.weights)


@torch.no_grad()
def generate(settings: Settings, steps: int) -> tuple[Tensor, Tensor]:
    """Grey samples of the saved pipeline, `per_class` of each class, and the classes that were asked for."""
    pipeline = DiTPipeline.from_pretrained(settings.out)  # float32, whatever the files are stored in
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(settings.seed + 3)
    labels = torch.arange(len(NAMES)).repeat(settings.per_class)
    options = {"guidance_scale": settings.guidance, "num_inference_steps": steps, "output_type": "pt"}
    parts = [pipeline(part.tolist(), generator=generator, **options)[0] for part in labels.split(100)]
    return torch.cat(parts).mean(dim=1, keepdim=True), labels


def recognised(judge: ClassJudge, images: Tensor, labels: Tensor) -> float:
    """The share of images that the judge takes for what they should be."""
    return float(judge.hits(images, labels.tolist()).double().mean())


def score(judge: ClassJudge, images: Tensor, labels: Tensor) -> dict[str, float]:
    """How many images the judge recognises as what they should be, and their distance to the real ones."""
    return {"recognised": recognised(judge, images, labels), "frechet": round(judge.frechet(images), 4)}


def measure_copies(settings: Settings, samples: Tensor, fresh: Tensor, order: Tensor) -> None:
    """Root mean square pixel distance to the nearest training image: would copies of the training set stand out?

    Training saw other versions of the digits in `fresh`: they are as near as a copied digit is. With all versions
    of its own digit (`order`) left out, the same image is as near as a new digit should be.
    """
    images, generator = digits()[0], torch.Generator().manual_seed(settings.seed + 2)  # as in train_dit
    copies = torch.cat([augment(images, generator) for _ in range(settings.copies)])
    sampled, real = (torch.cdist(kind.flatten(1), copies.flatten(1)) / IMAGE_SIZE for kind in (samples, fresh))
    other = real.masked_fill(order[:, None] == torch.arange(len(copies)) % len(images), math.inf)
    named = {"samples": sampled, "real": real, "real_without_own_digit": other}
    means = {name: round(float(distances.amin(dim=1).mean()), 4) for name, distances in named.items()}
    record(settings.out, nearest_training_image=means)


def measure_real(settings: Settings, judge: ClassJudge) -> tuple[Tensor, Tensor]:
    """What the judge says of real digits, bare and through the autoencoder; returns those and their indices."""
    images, labels = digits()
    held = split(labels)[1]
    generator = torch.Generator().manual_seed(settings.seed + 4)
    order = torch.randperm(len(images), generator=generator)[: settings.per_class * len(NAMES)]
    fresh = augment(images[order], generator)
    vae = AutoencoderKL.from_pretrained(settings.out / "vae").requires_grad_(False)
    decoded = (vae.decode(encode(vae, fresh)).sample.mean(dim=1, keepdim=True) / 2 + 0.5).clamp(0, 1)
    record(
        settings.out,
        judge_held_out=recognised(judge, enlarge(images[held]), labels[held]),
        real_augmented=score(judge, fresh, labels[order]),
        real_through_vae=score(judge, decoded, labels[order]),
        vae_psnr_db=round(-10 * math.log10(float((decoded - fresh).square().mean())), 1),
    )
    return fresh, order


def measure(settings: Settings) -> None:
    """Every figure of the README, from the saved files."""
    judge = ClassJudge.load(settings.out / "judge")
    fresh, order = measure_real(settings, judge)
    rows = [enlarge(digits()[0][:20])]  # the data set begins 0 1 2 3 4 5 6 7 8 9 twice, as the samples do
    for steps in (20, 8, 4):
        samples, wanted = generate(settings, steps)
        record(settings.out, **{f"samples_{steps}_steps": score(judge, samples, wanted)})
        rows += [samples[start : start + 20] for start in (range(0, 80, 20) if steps == 20 else (0,))]
        if steps == 20:
            measure_copies(settings, samples, fresh, order)
    sheet = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows]).mul(255).round().byte()
    picture = Image.fromarray(sheet.numpy()).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST)
    picture.save(settings.out / "samples.png", optimize=True)
    files = [path for path in settings.out.rglob("*") if path.is_file()]
    record(settings.out, folder_megabytes=round(sum(path.stat().st_size for path in files) / 1e6, 2))


STAGES = {"judge": train_judge, "vae": train_vae, "dit": train_dit, "measure": measure}


def main() -> None:
    """Run one stage, or all of them."""
    parser = argparse.ArgumentParser(description="Train the demo host demo/dit-digits from nothing.")
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("dit-digits"), help="the host's folder")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "dit-digits"), help="for checkpoints")
    parser.add_argument("--dit-steps", type=int, default=Settings.dit_steps, help="optimiser steps of the transformer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)  # denormal numbers, frequent in small gradients, are slow on CPUs
    settings = Settings(out=arguments.out, work=arguments.work, dit_steps=arguments.dit_steps)
    for stage in STAGES if arguments.stage == "all" else [arguments.stage]:
        torch.manual_seed(settings.seed)
        started = time.perf_counter()
        STAGES[stage](settings)
        record(settings.out, **{f"{stage}_seconds": round(time.perf_counter() - started, 1)})


if __name__ == "__main__":
    main()
