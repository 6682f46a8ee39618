"""The judge: a small independent classifier that scores generated images.

A demo host is only worth pruning if the damage can be measured. The judge answers two questions about a batch
of images: is the class that was asked for still recognisable, and how far are the images from the real ones
(Fréchet distance in the judge's own feature space, whose 32 dimensions need far fewer samples than Inception's
2048). It is trained on real images only and never sees a generated one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_REPAIR = "restore the folder from the repository, or train a new judge with `demo/train_dit_digits.py judge`"


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    """One convolution with its normalisation and activation; the bias would be undone by the normalisation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Judge(nn.Module):
    """A convolutional classifier with a 32-dimensional feature space and the real images' statistics in it.

    Images are `(B, 3, H, W)` or `(B, 1, H, W)` in [0, 1], of any size. Besides its weights a judge carries
    `real_mean` and `real_cov`, the float64 statistics of real images' features for the Fréchet distance.
    """

    num_features = 32
    real_mean: Tensor
    real_cov: Tensor

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
        super().__init__()
        if input_size % 4 or input_size <= 0:
            raise ValueError(f"input_size must be a positive multiple of 4 (two poolings halve it), got {input_size}")
        self.labels = list(range(10)) if labels is None else list(labels)
        distinct = len(set(self.labels)) == len(self.labels) and all(isinstance(label, int) for label in self.labels)
        if not self.labels or not distinct:
            raise ValueError(f"labels must be distinct class ids and at least one, got {self.labels}")
        self.input_size, self.width = input_size, width
        self.held_out_accuracy, self.held_out_images = held_out_accuracy, held_out_images
        self.reference_images = reference_images
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
        self.register_buffer("real_mean", torch.zeros(self.num_features, dtype=torch.float64))
        self.register_buffer("real_cov", torch.eye(self.num_features, dtype=torch.float64))

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

    @torch.no_grad()
    def recognised(self, images: Tensor, class_ids: Tensor) -> float:
        """The share of images whose predicted class is the one in `class_ids`; an unknown class is wrong."""
        predicted = torch.tensor(self.labels, device=images.device)[self.logits(images).argmax(dim=1)]
        return float((predicted == class_ids.to(predicted.device)).double().mean())

    @torch.no_grad()
    def frechet(self, images: Tensor) -> float:
        """The squared Fréchet distance of images to the real ones; small samples (under 200) overstate it."""
        return frechet_distance(*feature_statistics(self.features(images)), self.real_mean, self.real_cov)

    @torch.no_grad()
    def fit_reference(self, images: Tensor) -> None:
        """Take `images` as the real ones that `frechet` compares with."""
        self.real_mean, self.real_cov = feature_statistics(self.features(images))
        self.reference_images = len(images)

    def config(self) -> dict[str, Any]:
        """What `config.json` holds: the arguments of `__init__`."""
        return {
            "labels": self.labels,
            "input_size": self.input_size,
            "width": self.width,
            "held_out_accuracy": self.held_out_accuracy,
            "held_out_images": self.held_out_images,
            "reference_images": self.reference_images,
        }

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.config(), "num_features": self.num_features}, indent=2)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a judge that `save` wrote, in evaluation mode; a `ValueError` names the file that is at fault."""
        folder = Path(folder)
        judge = cls._from_config(folder / CONFIG_NAME)
        path = folder / WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_REPAIR}")
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); {_REPAIR}") from error
        _check_state(path, state, judge.state_dict())
        judge.load_state_dict(state)
        return judge.eval().requires_grad_(False)

    @classmethod
    def _from_config(cls, path: Path) -> Self:
        """An untrained judge as `config.json` describes it."""
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_REPAIR}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is not readable JSON ({error}); {_REPAIR}") from error
        expected = {*cls().config(), "num_features"}
        if not isinstance(config, dict) or set(config) != expected:
            found = sorted(config) if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"{path} must hold the keys {sorted(expected)}, found {found}; {_REPAIR}")
        if config.pop("num_features") != cls.num_features:
            raise ValueError(f"{path}: num_features must be {cls.num_features}; {_REPAIR}")
        try:
            return cls(**config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not describe a judge ({error}); {_REPAIR}") from error


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors that the architecture does not have, lacks, or has in another shape, and non-finite ones."""
    if set(state) != set(expected):
        missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        raise ValueError(f"{path} does not fit its {CONFIG_NAME}: missing {missing}, unknown {unknown}; {_REPAIR}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            found, wanted = (tuple(tensor.shape), tensor.dtype), (tuple(expected[name].shape), expected[name].dtype)
            raise ValueError(f"{path}: tensor {name!r} is {found} where the judge needs {wanted}; {_REPAIR}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name!r} holds values that are not finite; {_REPAIR}")


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of feature vectors `(B, D)`, in float64; a covariance needs two vectors at least."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"feature statistics need at least 2 feature vectors, got shape {tuple(features.shape)}")
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The squared Fréchet (2-Wasserstein) distance between two Gaussians, in float64.

    The trace of the covariances' geometric mean is taken from the eigenvalues of the symmetric product
    `sqrt(A) B sqrt(A)`: no general matrix root, so no complex numbers appear for rank-deficient covariances.
    """
    mean_a, cov_a, mean_b, cov_b = (tensor.double().cpu() for tensor in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))
