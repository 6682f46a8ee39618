"""A classifier as judge, for class-conditional pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StagePruneError
from ..host import Conditions, Prompt
from .judge import Judge, finite, register_judge


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    """One convolution with its normalisation and activation; the bias would be undone by the normalisation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@register_judge
class ClassJudge(Judge):
    """A convolutional classifier: is the class that was asked for recognisable?

    Images are `(B, 3, H, W)` or `(B, 1, H, W)` in [0, 1], of any size.
    """

    kind = "classes"
    measures = "class accuracy"

    def __init__(
        self,
        labels: list[int] | None = None,
        input_size: int = 16,
        width: int = 24,
        held_out_accuracy: float | None = None,
        held_out_images: int = 0,
        reference_images: int = 0,
    ) -> None:
        """Build an untrained judge; `labels[i]` is the class id that logit `i` stands for."""
        super().__init__(held_out_accuracy, held_out_images, reference_images)
        if input_size % 4 or input_size <= 0:
            raise ValueError(f"input_size must be a positive multiple of 4 (two poolings halve it), got {input_size}")
        self.labels = list(range(10)) if labels is None else list(labels)
        distinct = len(set(self.labels)) == len(self.labels) and all(isinstance(label, int) for label in self.labels)
        if not self.labels or not distinct:
            raise ValueError(f"labels must be distinct class ids and at least one, got {self.labels}")
        self.input_size, self.width = input_size, width
        self.body = nn.Sequential(
            _conv(1, width),
            _conv(width, width),
            nn.MaxPool2d(2),
            _conv(width, 2 * width),
            _conv(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * (input_size // 4) ** 2, self.num_features, bias=False),
            # Without a scale of their own the features' Fréchet distance would mean nothing between two trainings:
            # a normalisation without affine parameters fixes each dimension's variance at about one.
            nn.BatchNorm1d(self.num_features, affine=False),
        )
        self.head = nn.Linear(self.num_features, len(self.labels))

    def features(self, images: Tensor) -> Tensor:
        """The penultimate feature vectors `(B, 32)` of images in [0, 1]."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"the judge takes images of shape (B, 3, H, W) or (B, 1, H, W), got {list(images.shape)}")
        grey = images.to(self.head.weight.dtype).mean(dim=1, keepdim=True)
        if grey.shape[-2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            grey = F.interpolate(grey, size=size, mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = self.body(grey)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """The unnormalised scores `(B, classes)`; column `i` stands for class id `labels[i]`."""
        logits: Tensor = self.head(F.relu(self.features(images)))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Same as `logits`."""
        return self.logits(images)

    def wanted(self, prompts: Sequence[Prompt], conditions: Conditions) -> list[Prompt] | None:
        """The class ids; None for prompts that are no classes."""
        class_ids = conditions.tensors.get("class_labels")
        if class_ids is None:
            return None
        unknown = sorted(set(class_ids.tolist()) - set(self.labels))
        if unknown:
            raise StagePruneError(
                f"the judge does not know class {unknown[0]}; it knows {self.labels}. Give `prompts` of these classes, "
                "or no judge."
            )
        return list(class_ids.tolist())

    @torch.no_grad()
    def hits(self, images: Tensor, wanted: Sequence[Prompt]) -> Tensor:
        """Whether the predicted class is the one asked for; an unknown class is wrong, and so is what is no image."""
        predicted = torch.tensor(self.labels)[self.logits(images.to(self.device)).argmax(dim=1).cpu()]
        return (predicted == torch.tensor([int(label) for label in wanted])) & finite(images)

    def config(self) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return {"labels": self.labels, "input_size": self.input_size, "width": self.width, **super().config()}
