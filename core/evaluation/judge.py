"""Judges: small independent networks that score generated images.

A demo pipeline is only worth pruning if the damage can be measured. A judge answers two questions about a batch of
images: do they show what was asked for, and how far are they from real ones (Fréchet distance in the judge's own
feature space, whose 32 dimensions need far fewer samples than Inception's 2048). It is trained on real images only and
never sees a generated one.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import StagePruneError
from ..host import Conditions, Prompt

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_REPAIR = "give a judge's folder, restore it from the repository, or train a new judge with the script in `demo/`"
_KINDS: dict[str, type[Judge]] = {}

J = TypeVar("J", bound="type[Judge]")


def register_judge(cls: J) -> J:
    """Class decorator: let `Judge.load` find the class under its `kind`."""
    _KINDS[cls.kind] = cls
    return cls


class Judge(nn.Module, ABC):
    """What all judges have: a feature space, the real images' statistics in it, and files.

    Images are `(B, 3, H, W)` in [0, 1].

    Args:
        held_out_accuracy: share of held-out real images that it got right.
        held_out_images: how many those were.
        reference_images: how many real images the statistics come from.
    """

    kind: ClassVar[str]
    measures: ClassVar[str]
    """What `hits` counts, for tables."""
    num_features = 32
    real_mean: Tensor
    real_cov: Tensor

    def __init__(self, held_out_accuracy: float | None, held_out_images: int, reference_images: int) -> None:
        super().__init__()
        self.held_out_accuracy, self.held_out_images = held_out_accuracy, held_out_images
        self.reference_images = reference_images
        self.register_buffer("real_mean", torch.zeros(self.num_features, dtype=torch.float64))
        self.register_buffer("real_cov", torch.eye(self.num_features, dtype=torch.float64))

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The feature vectors `(B, 32)` of images."""

    @abstractmethod
    def wanted(self, prompts: Sequence[Prompt], conditions: Conditions) -> list[Prompt] | None:
        """What each image should show, in the judge's terms; None if the prompts are of a sort that it cannot check.

        Raises:
            StagePruneError: a prompt is of the right sort, but unknown to the judge.
        """

    @abstractmethod
    def hits(self, images: Tensor, wanted: Sequence[Prompt]) -> Tensor:
        """Whether each image shows what was asked for, shape (B,), bool, on the CPU. One that is not `finite` does not,
        whatever a network makes of it.
        """

    @property
    def device(self) -> torch.device:
        """Where the judge is."""
        return self.real_mean.device

    @torch.no_grad()
    def frechet(self, images: Tensor) -> float:
        """The squared Fréchet distance of images to the real ones; small samples (under 200) overstate it."""
        return frechet_distance(*feature_statistics(self.features(images)), self.real_mean, self.real_cov)

    @torch.no_grad()
    def fit_reference(self, images: Tensor) -> None:
        """Take `images` as the real ones that `frechet` compares with."""
        features = torch.cat([self.features(part) for part in torch.split(images, 512)])
        self.real_mean, self.real_cov = feature_statistics(features)
        self.reference_images = len(images)

    def config(self) -> dict[str, Any]:
        """What `config.json` holds besides the kind: the arguments of `__init__`."""
        return {
            "held_out_accuracy": self.held_out_accuracy,
            "held_out_images": self.held_out_images,
            "reference_images": self.reference_images,
        }

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"kind": self.kind, **self.config(), "num_features": self.num_features}, indent=2)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a judge of any kind that `save` wrote, in evaluation mode; StagePruneError names the file at fault."""
        folder = Path(folder)
        judge = _from_config(folder / CONFIG_NAME)
        if not isinstance(judge, cls):
            raise StagePruneError(
                f"{folder} holds a judge of kind {judge.kind!r}, not a {cls.__name__}; give the folder of one, or read "
                "a judge of any kind with Judge.load."
            )
        path = folder / WEIGHTS_NAME
        if not path.is_file():
            raise StagePruneError(f"{path} is missing; {_REPAIR}")
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise StagePruneError(f"{path} is not a readable safetensors file ({error}); {_REPAIR}") from error
        _check_state(path, state, judge.state_dict())
        judge.load_state_dict(state)
        return judge.eval().requires_grad_(False)


def _from_config(path: Path) -> Judge:
    """An untrained judge as `config.json` describes it."""
    if not path.is_file():
        raise StagePruneError(f"{path} is missing; {_REPAIR}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StagePruneError(f"{path} is not readable JSON ({error}); {_REPAIR}") from error
    kind = config.pop("kind", None) if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise StagePruneError(f"{path}: `kind` must be one of {', '.join(sorted(_KINDS))}, got {kind!r}; {_REPAIR}")
    cls = _KINDS[kind]
    expected = {*cls().config(), "num_features"}  # type: ignore[call-arg]
    if set(config) != expected:
        raise StagePruneError(f"{path} must hold the keys {sorted(expected)}, found {sorted(config)}; {_REPAIR}")
    if config.pop("num_features") != cls.num_features:
        raise StagePruneError(f"{path}: num_features must be {cls.num_features}; {_REPAIR}")
    try:
        return cls(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StagePruneError(f"{path} does not describe a judge ({error}); {_REPAIR}") from error


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors that the architecture does not have, lacks, or has in another shape, and non-finite ones."""
    if set(state) != set(expected):
        missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        raise StagePruneError(f"{path} does not fit its {CONFIG_NAME}: missing {missing}, unknown {unknown}; {_REPAIR}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            found, wanted = (tuple(tensor.shape), tensor.dtype), (tuple(expected[name].shape), expected[name].dtype)
            raise StagePruneError(f"{path}: tensor {name!r} is {found} where the judge needs {wanted}; {_REPAIR}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StagePruneError(f"{path}: tensor {name!r} holds values that are not finite; {_REPAIR}")


def finite(samples: Tensor) -> Tensor:
    """Whether each of some images or latents holds finite values only, shape (B,), bool, on the CPU."""
    return samples.flatten(1).isfinite().all(1).cpu()


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of feature vectors `(B, D)`, in float64; a covariance needs two vectors at least."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"feature statistics need at least 2 feature vectors, got shape {tuple(features.shape)}")
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The squared Fréchet (2-Wasserstein) distance between two Gaussians, in float64.

    The trace of the covariances' geometric mean is taken from the eigenvalues of the symmetric product
    `sqrt(A) B sqrt(A)`: no general matrix root, so no complex numbers appear for rank-deficient covariances. NaN if
    anything is not finite, as the features of images are that a broken model made.
    """
    mean_a, cov_a, mean_b, cov_b = (tensor.double().cpu() for tensor in (mean_a, cov_a, mean_b, cov_b))
    if not all(bool(tensor.isfinite().all()) for tensor in (mean_a, cov_a, mean_b, cov_b)):
        return math.nan
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))
