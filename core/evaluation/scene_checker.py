"""The checker of the shapes demos: it finds the objects in a picture and compares them with a caption.

A picture is right if it shows exactly the objects that its caption names, with their colours, shapes and sizes, in the
relation that it names: all or nothing, as GenEval (Ghosh et al., 2023) scores a prompt. The checker is a small
convolutional detector, trained on rendered scenes alone; it never sees a generated picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import Conditions, Prompt
from .judge import Judge, finite, register_judge
from .scene import COLOURS, SHAPES, SIZES, Scene, Thing

CELL = 4
"""Pixels of one cell of the detector's map: a cell says whether an object's centre lies in it."""

_PEAK = 5  # cells: the neighbourhood in which only the strongest cell counts
_SLACK = CELL  # pixels by which a centre may be off when relations are read


@dataclass(frozen=True)
class Found:
    """An object in a picture: what it is, and where its centre is in pixels."""

    thing: Thing
    x: float
    y: float


@register_judge
class SceneChecker(Judge):
    """A detector with a 32-dimensional feature space and the real scenes' statistics in it.

    Images are `(B, 3, 64, 64)` in [0, 1].
    """

    kind = "scenes"
    measures = "prompt fidelity"
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        width: int = 48,
        held_out_accuracy: float | None = None,
        held_out_images: int = 0,
        reference_images: int = 0,
    ) -> None:
        super().__init__(held_out_accuracy, held_out_images, reference_images)
        self.width = width
        self.body = nn.Sequential(
            _conv(3, width // 2, stride=2),
            _conv(width // 2, width, stride=2),
            _conv(width, width),
            _conv(width, width, dilation=2),
            _conv(width, width, dilation=4),
            _conv(width, self.num_features),
        )
        self.heads = nn.Conv2d(self.num_features, 1 + len(SHAPES) + len(COLOURS) + len(SIZES), 1)
        self.register_buffer("feature_mean", torch.zeros(self.num_features))
        self.register_buffer("feature_std", torch.ones(self.num_features))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps of logits: objectness (B, h, w); shape, colour and size (B, classes, h, w)."""
        maps = self.heads(self.body(images * 2 - 1))
        objects, *kinds = maps.split([1, len(SHAPES), len(COLOURS), len(SIZES)], dim=1)
        return objects[:, 0], *kinds

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, 32), each scaled to unit variance over the real scenes."""
        pooled = self.body(images * 2 - 1).mean(dim=(2, 3))
        scaled: Tensor = (pooled - self.feature_mean) / self.feature_std
        return scaled

    @torch.no_grad()
    def fit_reference(self, images: Tensor) -> None:
        """Take `images` as the real ones: they set the features' scale and what `frechet` compares with."""
        self.feature_mean.zero_()
        self.feature_std.fill_(1)
        features = torch.cat([self.features(part) for part in torch.split(images, 256)])
        self.feature_mean, self.feature_std = features.mean(0), features.std(0).clamp_min(1e-6)
        super().fit_reference(images)

    @torch.no_grad()
    def find(self, images: Tensor) -> list[list[Found]]:
        """The objects of each picture, the surest first."""
        objects, shapes, colours, sizes = self(images)
        peaks = F.max_pool2d(objects[:, None], _PEAK, stride=1, padding=_PEAK // 2)[:, 0]
        shown: list[list[tuple[float, Found]]] = [[] for _ in images]
        for index, row, column in ((objects == peaks) & (objects > 0)).nonzero().tolist():
            kinds = (maps[index, :, row, column].argmax() for maps in (shapes, colours, sizes))
            shape, colour, size = (int(kind) for kind in kinds)
            thing = Thing(SHAPES[shape], COLOURS[colour], SIZES[size])
            found = Found(thing, (column + 0.5) * CELL, (row + 0.5) * CELL)
            shown[index].append((-float(objects[index, row, column]), found))
        return [[found for _, found in sorted(entries, key=lambda entry: entry[0])] for entries in shown]

    def wanted(self, prompts: Sequence[Prompt], conditions: Conditions) -> list[Prompt] | None:
        """The captions, all of which must be of the scenes' language."""
        for prompt in prompts:
            Scene.parse(str(prompt))
        return list(prompts)

    def hits(self, images: Tensor, wanted: Sequence[Prompt]) -> Tensor:
        """Whether each image shows exactly what its caption asks for."""
        scenes = [Scene.parse(str(caption)) for caption in wanted]
        found = self.find(images.to(self.device))
        right = [shows(things, scene) for things, scene in zip(found, scenes, strict=True)]
        return torch.tensor(right, dtype=torch.bool) & finite(images)

    def config(self) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return {"width": self.width, **super().config()}


def shows(found: Sequence[Found], scene: Scene) -> bool:
    """Whether these are exactly the objects of `scene`, in its relation."""
    if len(found) != len(scene.things):
        return False
    if len(found) == 1:
        return _matches(found[0].thing, scene.things[0])
    return any(
        _matches(first.thing, scene.things[0])
        and _matches(second.thing, scene.things[1])
        and related(first, second, scene.relation or "")
        for first, second in (found, reversed(found))
    )


def related(first: Found, second: Found, relation: str) -> bool:
    """Whether `first` stands in this relation to `second`: mostly in that direction, and clearly so."""
    right, down = first.x - second.x, first.y - second.y
    along, across = {
        "above": (-down, right),
        "below": (down, right),
        "left of": (-right, down),
        "right of": (right, down),
    }[relation]
    return along > _SLACK and along >= abs(across) - _SLACK


def _matches(thing: Thing, wanted: Thing) -> bool:
    same = (thing.shape, thing.colour) == (wanted.shape, wanted.colour)
    return same and wanted.size in (None, thing.size)


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
