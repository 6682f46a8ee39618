"""Train the checker on rendered scenes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shapes.scenes import Layout, draw_layouts, render
from stageprune.core.evaluation.scene_checker import CELL, SceneChecker
from training import Descent, log

BATCH = 64


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Some blur and noise, as a decoder leaves them: the checker must judge content, not crispness."""
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.04 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (torch.lerp(images, soft, blur) + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def loss_of(checker: SceneChecker, images: Tensor, layout: Layout) -> Tensor:
    """Objectness at every cell but the neighbours of a centre; shape, colour and size at the centres."""
    objects, *kinds = checker(images)
    target, weight = torch.zeros_like(objects), torch.ones_like(objects)
    scene, thing = torch.nonzero(torch.arange(2) < layout.count[:, None], as_tuple=True)
    column, row = (layout.centre[scene, thing] / CELL).long().unbind(-1)
    target[scene, row, column] = 1
    near = F.max_pool2d(target[:, None], 3, stride=1, padding=1)[:, 0]
    weight[(near > 0) & (target == 0)] = 0
    weight[target > 0] = 8
    loss = F.binary_cross_entropy_with_logits(objects, target, weight)
    for maps, wanted in zip(kinds, (layout.shape, layout.colour, layout.size), strict=True):
        loss = loss + F.cross_entropy(maps[scene, :, row, column], wanted[scene, thing])
    return loss


def train_checker(steps: int, seed: int = 0, held: int = 2000, reference: int = 8000) -> SceneChecker:
    """A checker that has seen training captions only, measured on scenes of held-out captions."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    checker = SceneChecker().train()
    descend = Descent(checker, steps, 3e-3, 0.02)
    for step in range(steps):
        if step % 50 == 0:
            pool = draw_layouts(BATCH * 50, generator)
        layout = pool[torch.arange(BATCH) + BATCH * (step % 50)]
        loss = loss_of(checker, spoil(render(layout, generator), generator), layout)
        descend(loss)
        if step % 250 == 0:
            log.info("checker step %d/%d loss %.4f", step, steps, loss.item())
    checker.eval().requires_grad_(False)
    layout = draw_layouts(held, generator, held=True)
    captions = [str(scene) for scene in layout.scenes()]
    parts = [
        checker.hits(render(part, generator), names)
        for part, names in zip(_split(layout), _chunks(captions), strict=True)
    ]
    checker.held_out_accuracy, checker.held_out_images = float(torch.cat(parts).double().mean()), held
    # What is judged shows two objects; scenes of one would put a floor under every distance.
    pairs = draw_layouts(2 * reference, generator, None)
    pairs = pairs[torch.nonzero(pairs.count == 2).flatten()[:reference]]
    checker.fit_reference(torch.cat([render(part, generator) for part in _split(pairs)]))
    return checker


def _split(layout: Layout, size: int = 500) -> list[Layout]:
    return [layout[part] for part in torch.arange(len(layout.count)).split(size)]


def _chunks(names: list[str], size: int = 500) -> list[list[str]]:
    return [names[begin : begin + size] for begin in range(0, len(names), size)]
