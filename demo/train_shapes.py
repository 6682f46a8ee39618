"""Train the demo pipelines `demo/sdxl-shapes` and `demo/flux-shapes` from nothing, on rendered scenes with captions.

Run the stages in this order; `sdxl` and `flux` are independent of each other and take one core each:

    python demo/train_shapes.py checker
    python demo/train_shapes.py vae
    python demo/train_shapes.py text
    python demo/train_shapes.py sdxl
    python demo/train_shapes.py flux
    python demo/train_shapes.py measure

`--further` trains published weights for another round; `unpack` first, if the work folder is gone. `sdxl` and `flux`,
which take hours, can be killed: the same command goes on, to the same weights. Every stage is seeded. The parts that
both pipelines share wait in the work folder; `measure` reads the finished pipelines back and writes every figure of
their READMEs, or logs them where a folder has none.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shapes import autoencoder, flux, sdxl, text
from shapes.checker import train_checker
from shapes.measure import measure, write_prompts
from shapes.parts import load_parts, token_ids
from shapes.scenes import cells, draw_layouts, render
from training import Average, Batches, Descent, Progress, log, publish, record

POOL = 2000  # scenes that are rendered and encoded at a time


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, apart from the code."""

    out: Path
    work: Path
    seed: int = 0
    checker_steps: int = 1500
    vae_steps: int = 1600
    text_steps: int = 1000
    sdxl_steps: int = 6000
    flux_steps: int = 8000
    scenes: int = 40_000
    batch: int = 32
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    layout_weight: float = 0.5
    further: bool = False
    compiled: bool = False
    images: int = 500

    def folder(self, name: str) -> Path:
        """Of a finished pipeline."""
        return self.out / f"{name}-shapes"


def checker_stage(settings: Settings) -> None:
    """The checker, into both pipelines' folders."""
    checker = train_checker(settings.checker_steps, settings.seed)
    for name in ("sdxl", "flux"):
        publish(settings.folder(name) / "judge", checker.save)
        record(settings.folder(name), checker_held_out=checker.held_out_accuracy)


def vae_stage(settings: Settings) -> None:
    """The autoencoder."""
    vae, decibels = autoencoder.train_autoencoder(settings.vae_steps, settings.seed + 1)
    publish(settings.work / "vae", vae.save_pretrained)
    for name in ("sdxl", "flux"):
        record(settings.folder(name), vae_psnr_db=decibels)


def text_stage(settings: Settings) -> None:
    """Tokenizers and text encoders; a further round starts from the encoders in the work folder."""
    torch.manual_seed(settings.seed + 2)
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    encoders = {
        "text_encoder": (clip, text.clip_encoder(clip, projected=False), text.clip_states),
        "text_encoder_2": (clip, text.clip_encoder(clip, projected=True), text.clip_states),
        "t5": (t5, text.t5_encoder(t5), text.t5_states),
    }
    publish(settings.work / "tokenizer", clip.save_pretrained)
    publish(settings.work / "t5_tokenizer", t5.save_pretrained)
    for name, (tokenizer, encoder, states) in encoders.items():
        if settings.further:
            encoder.load_state_dict(type(encoder).from_pretrained(settings.work / name).state_dict())
        text.train_reader(tokenizer, encoder, states(encoder), settings.text_steps, settings.seed + 2)
        publish(settings.work / name, encoder.save_pretrained)


def cached_scenes(settings: Settings, parts: dict[str, Any]) -> dict[str, Tensor]:
    """Latents (float16), token ids and layouts of the training scenes, made once and kept in the work folder."""
    path = settings.work / f"scenes-{settings.scenes}.safetensors"
    if path.is_file():
        return load_file(path)
    generator = torch.Generator().manual_seed(settings.seed + 3)
    pools: list[dict[str, Tensor]] = []
    for begin in range(0, settings.scenes, POOL):
        layout = draw_layouts(min(POOL, settings.scenes - begin), generator)
        latents = autoencoder.encode(parts["vae"], render(layout, generator)).half()
        ids = token_ids(parts, [str(scene) for scene in layout.scenes()])
        pools.append({"latents": latents, "cells": cells(layout), **ids})
        log.info("encoded %d of %d scenes", begin + len(latents), settings.scenes)
    result = {name: torch.cat([pool[name] for pool in pools]) for name in pools[0]}
    save_file(result, path)
    return result


def train(settings: Settings, name: str, family: ModuleType, model: torch.nn.Module, loss_of: Any, steps: int) -> None:
    """Train one denoiser on cached latents; what gets published is a moving average of its weights.

    A further round starts from the published weights, with a rate that rises and falls again and with fresh noise.
    """
    parts = load_parts(settings.work)
    rounds = rounds_of(settings.folder(name), name) if settings.further else []
    if rounds:
        published = type(model).from_pretrained(settings.folder(name) / family.COMPONENT)
        model.load_state_dict(published.state_dict())
    generator = torch.Generator().manual_seed(settings.seed + 4 + 100 * len(rounds))
    scenes = cached_scenes(settings, parts)
    latents, cells, ids = scenes.pop("latents"), scenes.pop("cells"), scenes
    reader = family.layout_reader(model)
    if settings.compiled:
        model.compile()
    descend = Descent([*model.parameters(), *reader.parameters()], steps, settings.learning_rate, 0.01)
    average = Average(model, settings.ema_decay)
    drawn = Batches(len(latents), settings.batch, generator)
    deciding = ("seed", "scenes", "batch", "learning_rate", "compiled")
    run = json.dumps([name, rounds, steps, *(getattr(settings, field) for field in deciding)])
    progress = Progress(settings.work / f"{name}-shapes.part.safetensors", run, descend, average, drawn)
    for step in range(progress.load() + 1, steps + 1):
        picked = drawn.draw()
        with torch.no_grad():
            encoded = family.encode_text(parts, {kind: tokens[picked] for kind, tokens in ids.items()})
        # Without fused attention, whose backward pass took more time than everything else together.
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(model, latents[picked].float(), encoded, generator)
            layout = reader.loss(cells[picked])
            descend(loss + settings.layout_weight * layout)
        average.update(step)
        if step % 100 == 0:
            log.info("%s step %d/%d loss %.4f layout %.4f", name, step, steps, loss.item(), layout.item())
        if step % 500 == 0:
            progress.save()
    save(settings.folder(name), family, model, average, settings)
    record(settings.folder(name), **{f"{name}_rounds": [*rounds, steps]})
    progress.path.unlink(missing_ok=True)


def rounds_of(folder: Path, name: str) -> list[int]:
    """Optimiser steps of each round that the published weights have been through."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return list(figures[f"{name}_rounds"])


def save(folder: Path, family: ModuleType, model: torch.nn.Module, average: Average, settings: Settings) -> None:
    """Write the whole pipeline with the averaged weights, denoiser and autoencoder in float16."""
    if not all(bool(weight.half().isfinite().all()) for weight in average.weights):
        raise RuntimeError("a weight does not fit into float16: train with a lower learning rate")
    copy = type(model).from_config(model.config)
    for parameter, weight in zip(copy.parameters(), average.weights, strict=True):
        parameter.data.copy_(weight)
    parts = load_parts(settings.work)
    parts["vae"].half()
    # The text encoders stay in float32: transformers would load them in the files' type, beside a float32 denoiser.
    publish(folder, family.pipeline(copy.half(), parts).save_pretrained)
    log.info("wrote %s", folder)


def sdxl_stage(settings: Settings) -> None:
    """The UNet."""
    torch.manual_seed(settings.seed + 5)
    train(settings, "sdxl", sdxl, sdxl.new_unet(), sdxl.Loss(), settings.sdxl_steps)


def flux_stage(settings: Settings) -> None:
    """The transformer."""
    torch.manual_seed(settings.seed + 6)
    parts = load_parts(settings.work)
    train(settings, "flux", flux, flux.new_transformer(), flux.Loss(parts, token_ids(parts, [""])), settings.flux_steps)


def add_seconds(settings: Settings, name: str, stage: str, seconds: float) -> None:
    """Record how long a stage took, all its rounds together."""
    key, path = f"{stage}_seconds", settings.folder(name) / "figures.json"
    before = json.loads(path.read_text(encoding="utf-8")).get(key, 0) if settings.further else 0
    record(settings.folder(name), **{key: before + round(seconds)})


def unpack_stage(settings: Settings) -> None:
    """Fill the work folder from the published pipelines: enough to train a further round."""
    places = {
        "sdxl": {
            "vae": "vae",
            "tokenizer": "tokenizer",
            **{f"text_encoder{n}": f"text_encoder{n}" for n in ("", "_2")},
        },
        "flux": {"tokenizer_2": "t5_tokenizer", "text_encoder_2": "t5"},
    }
    for name, parts in places.items():
        for component, part in parts.items():
            shutil.copytree(settings.folder(name) / component, settings.work / part, dirs_exist_ok=True)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "sdxl": {"guidance_scale": 4.0},
    "flux": {"true_cfg_scale": 2.0, "max_sequence_length": text.LENGTH},
}
"""What the pipelines are called with, besides captions and steps."""


def measure_stage(settings: Settings) -> None:
    """Captions for calibration and evaluation, and every figure of the READMEs."""
    for name in ("sdxl", "flux"):
        folder = settings.folder(name)
        if (folder / "model_index.json").is_file():
            write_prompts(folder, settings.seed + 7)
            measure(folder, ARGUMENTS[name], settings.images, settings.seed + 9)


STAGES = {
    "checker": checker_stage,
    "vae": vae_stage,
    "text": text_stage,
    "sdxl": sdxl_stage,
    "flux": flux_stage,
    "measure": measure_stage,
    "unpack": unpack_stage,
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description="Train the demo pipelines of shapes from nothing.")
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the pipelines' folders go")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "shapes"), help="for shared parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--further", action="store_true", help="train the published weights for another round")
    parser.add_argument(
        "--compile", action="store_true", help="compile the denoiser, which needs a C++ compiler and takes a third less"
    )
    for name in ("text", "sdxl", "flux"):
        default = getattr(Settings, f"{name}_steps")
        parser.add_argument(f"--{name}-steps", type=int, default=default, help=f"optimiser steps ({default})")
    parser.add_argument("--images", type=int, default=Settings.images, help="generated for a row of `measure`")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # denormal numbers, frequent in small gradients, are slow on CPUs
    settings = Settings(
        out=arguments.out,
        work=arguments.work,
        text_steps=arguments.text_steps,
        sdxl_steps=arguments.sdxl_steps,
        flux_steps=arguments.flux_steps,
        further=arguments.further,
        compiled=arguments.compile,
        images=arguments.images,
    )
    started = time.perf_counter()
    STAGES[arguments.stage](settings)
    for name in ("sdxl", "flux"):
        if arguments.stage in ("checker", "vae", "text", name):
            add_seconds(settings, name, arguments.stage, time.perf_counter() - started)


if __name__ == "__main__":
    main()
