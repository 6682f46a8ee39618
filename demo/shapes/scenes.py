"""Captioned synthetic scenes for the shapes demos: one or two objects on a textured background, 64x64 pixels.

Everything is drawn with signed distances in torch, whole batches at a time, so that training data are fresh for every
step and nothing is stored.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stageprune.core.evaluation.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing

SIDE = 64
LATENT_SIDE = SIDE // 4
RADII = {"small": (6.0, 8.0), "large": (11.0, 14.0)}
PALETTE = torch.tensor(
    [[0.90, 0.12, 0.12], [0.10, 0.75, 0.20], [0.12, 0.25, 0.95], [0.95, 0.85, 0.10], [0.97, 0.97, 0.97]]
)
HELD_OUT = 10
"""One two-object caption in ten is never trained on."""

CELL_FACTS = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1)
"""Classes of a latent position: the shape, colour and size of what covers it; the last class is the background."""

_TRIES = 24  # positions drawn for each scene; the first that fits is taken


def held_out(scene: Scene) -> bool:
    """Whether a scene's caption is kept for evaluation, whatever sizes it names. Scenes of one object never are."""
    bare = Scene(tuple(Thing(thing.shape, thing.colour) for thing in scene.things), scene.relation)
    return scene.relation is not None and zlib.crc32(str(bare).encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class Layout:
    """A batch of scenes as numbers: index tensors, centres and radii of up to two objects.

    Args:
        count: objects of each scene, shape (N,).
        shape, colour, size: shape (N, 2).
        named: whether the caption names the size, shape (N, 2).
        relation: shape (N,).
        centre: in pixels (x, y), shape (N, 2, 2).
        radius: in pixels, shape (N, 2).
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    named: Tensor
    relation: Tensor
    centre: Tensor
    radius: Tensor

    def __getitem__(self, picked: Tensor) -> Layout:
        return Layout(*(getattr(self, name)[picked] for name in self.__dataclass_fields__))

    def scenes(self) -> list[Scene]:
        """What the captions say."""
        result = []
        for i, count in enumerate(self.count.tolist()):
            things = tuple(
                Thing(SHAPES[self.shape[i, j]], COLOURS[self.colour[i, j]], SIZES[self.size[i, j]] if named else None)
                for j, named in enumerate(self.named[i, :count].tolist())
            )
            result.append(Scene(things, RELATIONS[self.relation[i]] if count == 2 else None))
        return result


def draw_layouts(count: int, generator: torch.Generator, held: bool | None = False) -> Layout:
    """Random scenes: a quarter have one object; sizes are named for 85 % of the objects.

    Args:
        count: scenes.
        generator: source of randomness.
        held: only held-out captions (True), none of them (False), or both (None).
    """
    parts: list[Layout] = []
    while sum(len(part.count) for part in parts) < count:
        drawn = _draw(2 * count if held is not True else 12 * count, generator)
        keep = torch.tensor([held is None or held_out(scene) == held for scene in drawn.scenes()])
        parts.append(drawn[keep & (drawn.radius[:, 0] > 0)])
    whole = Layout(*(torch.cat([getattr(part, name) for part in parts]) for name in Layout.__dataclass_fields__))
    return whole[torch.arange(count)]


def _draw(count: int, generator: torch.Generator) -> Layout:
    def pick(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    objects = 1 + (torch.rand(count, generator=generator) < 0.75).long()
    size, relation = pick(2, count, 2), pick(4, count)
    low, high = torch.tensor([RADII[name] for name in SIZES])[size].unbind(-1)
    radius = low + (high - low) * torch.rand(count, 2, generator=generator)
    centre, fits = _place(objects, radius, relation, generator)
    named = torch.rand(count, 2, generator=generator) < 0.85
    radius = torch.where(fits[:, None], radius, 0)
    return Layout(objects, pick(4, count, 2), pick(5, count, 2), size, named, relation, centre, radius)


def _place(objects: Tensor, radius: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres inside the picture, apart from each other, and mostly in the direction that the relation names."""
    count = len(objects)
    margin = (radius + 2)[:, None, :, None]
    centres = margin + (SIDE - 2 * margin) * torch.rand(count, _TRIES, 2, 2, generator=generator)
    right, down = (centres[:, :, 0] - centres[:, :, 1]).unbind(-1)
    directions = torch.stack([-down, down, -right, right], dim=-1)
    along = directions.gather(-1, relation[:, None, None].expand(-1, _TRIES, 1))[..., 0]
    across = torch.where(relation[:, None] < 2, right, down).abs()
    good = (along > radius.sum(1)[:, None] + 3) & (along > 1.3 * across)
    good |= (objects == 1)[:, None]
    first = good.float().argmax(1)
    return centres[torch.arange(count), first], good.any(1)


def render(layout: Layout, generator: torch.Generator) -> Tensor:
    """Images (N, 3, 64, 64) in [0, 1]."""
    images = _backgrounds(len(layout.count), generator)
    for j in range(2):
        jitter = 0.05 * torch.randn(len(images), 3, generator=generator)
        colour = (PALETTE[layout.colour[:, j]] + jitter).clamp(0, 1)[:, :, None, None]
        images = torch.lerp(images, colour.expand_as(images), _cover(layout, j)[:, None])
    return images


def cells(layout: Layout) -> Tensor:
    """What covers most of each latent position, as classes of `CELL_FACTS`; uint8, shape (N, 3, 16, 16)."""
    facts = torch.tensor(CELL_FACTS, dtype=torch.uint8) - 1
    result = facts[None, :, None, None].repeat(len(layout.count), 1, LATENT_SIDE, LATENT_SIDE)
    for j in range(2):
        here = F.avg_pool2d(_cover(layout, j)[:, None], SIDE // LATENT_SIDE) > 0.5
        known = torch.stack([layout.shape[:, j], layout.colour[:, j], layout.size[:, j]], 1)
        result = torch.where(here, known[:, :, None, None].to(torch.uint8), result)
    return result


def _cover(layout: Layout, j: int) -> Tensor:
    """How much of each pixel the object `j` covers, (N, 64, 64); 0 where a scene has no such object."""
    grid = torch.arange(SIDE) + 0.5
    x = grid[None, None, :] - layout.centre[:, j, 0, None, None]
    y = grid[None, :, None] - layout.centre[:, j, 1, None, None]
    distance = _distance(x, y, layout.radius[:, j, None, None], layout.shape[:, j])
    return (0.5 - distance).clamp(0, 1) * (layout.count > j)[:, None, None]


def _distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance in pixels to the outline of each scene's shape, negative inside; shapes (N, 64, 64)."""
    side, arm = 0.86 * radius, 0.36 * radius
    tip = 1.15 * radius
    wide = torch.maximum(x.abs() - radius, y.abs() - arm)
    tall = torch.maximum(y.abs() - radius, x.abs() - arm)
    every = torch.stack(
        [
            (x.square() + y.square()).sqrt() - radius,
            torch.maximum(x.abs(), y.abs()) - side,
            torch.maximum(y - tip / 2, 0.866 * x.abs() - y / 2 - tip / 2),
            torch.minimum(wide, tall),
        ]
    )
    return every[shape, torch.arange(len(shape))]


def _backgrounds(count: int, generator: torch.Generator) -> Tensor:
    """Two muted colours mixed by a smooth pattern: a gradient, stripes, checks or clouds."""
    base = 0.22 + 0.28 * torch.rand(count, 2, 1, generator=generator)
    colours = (base + 0.05 * torch.randn(count, 2, 3, generator=generator)).clamp(0.05, 0.6)
    grid = torch.linspace(-1, 1, SIDE)
    angle, phase = (torch.rand(2, count, 1, 1, generator=generator) * 6.2832).unbind(0)
    frequency = 5 + 6 * torch.rand(count, 1, 1, generator=generator)
    u = angle.cos() * grid[None, None, :] + angle.sin() * grid[None, :, None]
    v = -angle.sin() * grid[None, None, :] + angle.cos() * grid[None, :, None]
    clouds = torch.rand(count, 1, 5, 5, generator=generator)
    patterns = torch.stack(
        [
            0.5 + 0.5 * u / 1.4142,
            0.5 + 0.5 * (frequency * u + phase).sin(),
            0.5 + 0.5 * (frequency * u + phase).sin() * (frequency * v).sin(),
            F.interpolate(clouds, size=(SIDE, SIDE), mode="bicubic", align_corners=False)[:, 0].clamp(0, 1),
        ]
    )
    kind = torch.randint(0, len(patterns), (count,), generator=generator)
    mix = patterns[kind, torch.arange(count)][:, None]
    return torch.lerp(colours[:, 0, :, None, None].expand(-1, -1, SIDE, SIDE), colours[:, 1, :, None, None], mix)
