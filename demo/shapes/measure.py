"""Every figure of the shapes demos' READMEs, from the saved files, and the sheet of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from shapes.autoencoder import decode, encode
from shapes.scenes import LATENT_SIDE, Layout, draw_layouts, render
from stageprune.core.evaluation.scene_checker import SceneChecker
from training import log, record

STEPS = (20, 8, 4)
SHOWN = 12  # pictures in a row of the sheet
BATCH = 50
MARKS = ("<!-- figures: train_shapes.py measure -->", "<!-- /figures -->")


def captions(count: int, held: bool, seed: int) -> list[str]:
    """Captions drawn as the scenes are."""
    layout = draw_layouts(count, torch.Generator().manual_seed(seed), held)
    return [str(scene) for scene in layout.scenes()]


def write_prompts(folder: Path, seed: int) -> None:
    """`prompts.json`: captions to calibrate on, which training has seen, and held-out ones to judge with."""
    prompts = {"calibration": captions(100, False, seed), "held_out": captions(250, True, seed + 1)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


def generate(pipe: Any, prompts: list[str], steps: int, arguments: dict[str, Any], seed: int) -> Tensor:
    """One picture a prompt, (N, 3, 64, 64) in [0, 1]."""
    parts = []
    for begin in range(0, len(prompts), BATCH):
        part = prompts[begin : begin + BATCH]
        seeds = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))]
        extra = {"negative_prompt": [""] * len(part)} if "true_cfg_scale" in arguments else {}
        parts.append(
            pipe(part, num_inference_steps=steps, generator=seeds, output_type="pt", **extra, **arguments).images
        )
    return torch.cat(parts).float()


def score(checker: SceneChecker, images: Tensor, prompts: list[str]) -> dict[str, Any]:
    """Share of pictures that are right, by the number of objects too, and the Fréchet distance to real scenes."""
    hits = torch.cat([checker.hits(part, names) for part, names in _together(images, prompts)]).double()
    several = torch.tensor([" of " in name or " above " in name or " below " in name for name in prompts])
    figures = {"right": round(float(hits.mean()), 4), "frechet": round(checker.frechet(images), 4)}
    for name, chosen in (("one_object", ~several), ("two_objects", several)):
        if bool(chosen.any()):
            figures[name] = round(float(hits[chosen].mean()), 4)
    return figures


def measure(folder: Path, arguments: dict[str, Any], count: int, seed: int) -> None:
    """Real scenes first, as they are and through the autoencoder; then samples of held-out captions."""
    checker = SceneChecker.load(folder / "judge")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size"):  # FluxPipeline takes all models for 1024 pixels wide
        pipe.default_sample_size = LATENT_SIDE
    real, names = _real(count, seed)
    through = decode(pipe.vae, encode(pipe.vae, real))
    record(
        folder,
        real=score(checker, real, names),
        real_through_vae=score(checker, through, names),
        vae_psnr_db=round(float(-10 * (through - real).square().mean().log10()), 1),
        arguments=arguments,
        images=count,
    )
    held = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["held_out"]
    prompts = (held * (count // len(held) + 1))[:count]
    rows = []
    for steps in STEPS:
        images = generate(pipe, prompts, steps, arguments, seed)
        record(folder, **{f"samples_{steps}_steps": score(checker, images, prompts)})
        rows += [images[begin : begin + SHOWN] for begin in ((0, SHOWN, 2 * SHOWN) if steps == STEPS[0] else (0,))]
    single = captions(count // 4, None, seed + 2)
    single = [name for name in single if " a " not in name][:100]
    record(folder, samples_one_object=score(checker, generate(pipe, single, STEPS[0], arguments, seed), single))
    sheet(rows, folder / "samples.png")
    for number, name in enumerate(prompts[: 3 * SHOWN]):
        log.info("row %d, picture %d: %s", number // SHOWN + 1, number % SHOWN + 1, name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    record(folder, folder_megabytes=round(sum(path.stat().st_size for path in files) / 1e6, 2))
    write_figures(folder)


def write_figures(folder: Path) -> None:
    """Put the figures between the marks of the folder's README, or into the log where there is none."""
    lines = figure_lines(json.loads((folder / "figures.json").read_text(encoding="utf-8")))
    path = folder / "README.md"
    if not path.is_file():
        log.info("%s:\n%s", folder, "\n".join(lines))
        return
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    path.write_text("\n".join([before + MARKS[0], *lines, MARKS[1] + rest.split(MARKS[1])[1]]), encoding="utf-8")


def figure_lines(figures: dict[str, Any]) -> list[str]:
    """A table of the figures, and a paragraph."""
    lines = ["| Pictures | Right | with one object | with two | Fréchet |", "|---|---|---|---|---|"]
    rows = {
        "held-out scenes, rendered (the floor)": "real",
        "the same through the autoencoder": "real_through_vae",
        **{f"samples of held-out captions, {steps} steps": f"samples_{steps}_steps" for steps in STEPS},
        f"samples of one object, {STEPS[0]} steps": "samples_one_object",
    }
    for label, key in rows.items():
        found = figures[key]
        parts = [f"{found[part]:.1%}" if part in found else "" for part in ("right", "one_object", "two_objects")]
        # The reference shows two objects: the distance of pictures of one says nothing.
        distance = f"{found['frechet']:.2f}" if "two_objects" in found else ""
        lines.append(f"| {label} | {' | '.join(parts)} | {distance} |")
    times = ", ".join(
        f"{part} {figures[key] / 60:.0f} min"
        for part in ("checker", "vae", "text", "sdxl", "flux")
        if (key := f"{part}_seconds") in figures
    )
    held_out = f"{figures['checker_held_out']:.2%} of 2,000 rendered scenes of held-out captions"
    lines += [
        f"\n{figures['images']} pictures a row. The checker is right on {held_out}; the autoencoder gives "
        f"{figures['vae_psnr_db']} dB. Training took, one core each and with other work beside: {times}. The folder "
        f"has {figures['folder_megabytes']} MB."
    ]
    return lines


def sheet(rows: list[Tensor], path: Path) -> None:
    """The pictures as one PNG."""
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(whole.permute(1, 2, 0).mul(255).round().byte().numpy()).save(path, optimize=True)


def _real(count: int, seed: int) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    layout: Layout = draw_layouts(count, generator, held=True)
    return render(layout, generator), [str(scene) for scene in layout.scenes()]


def _together(images: Tensor, prompts: list[str]) -> list[tuple[Tensor, list[str]]]:
    return [(images[i : i + 250], prompts[i : i + 250]) for i in range(0, len(prompts), 250)]
