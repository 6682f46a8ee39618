"""Which denoiser a calibration or a bank belongs to: its architecture exactly, its weights by a few sampled values.

Sampled values are compared with a tolerance, so a model loaded in half precision still matches its float32 original.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 8
TOLERANCE = 0.02  # bfloat16 keeps 8 bits: values move by up to 0.4 %


@dataclass(frozen=True)
class Fingerprint:
    """Architecture hash (parameter names and shapes) and sampled weight values, shape (tensors, 8)."""

    architecture: str
    samples: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, denoiser: nn.Module, paths: Sequence[str]) -> Fingerprint:
        """Fingerprint of `denoiser`; values are sampled from the weights of the layers at `paths`."""
        state = denoiser.state_dict()
        text = "\n".join(f"{name}:{tuple(tensor.shape)}" for name, tensor in sorted(state.items()))
        samples = tuple(tuple(_sample(state[f"{path}.weight"])) for path in sorted(set(paths)))
        return cls(hashlib.sha256(text.encode()).hexdigest(), samples)

    def mismatch(self, other: Fingerprint) -> str | None:
        """Why `other` is another denoiser, or None if it is the same."""
        if self.architecture != other.architecture:
            return "parameter names or shapes differ"
        if len(self.samples) != len(other.samples):
            return "the pruned layers differ"
        mine, theirs = torch.tensor(self.samples), torch.tensor(other.samples)
        scale = mine.abs().mean(dim=1, keepdim=True)
        differ = ~((mine - theirs).abs() <= TOLERANCE * (mine.abs() + scale)).all(dim=1)  # NaN differs from everything
        if bool(differ.any()):
            return (
                f"the weights differ ({int(differ.sum())} of {len(differ)} sampled tensors; perhaps another fine-tune)"
            )
        return None

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {"architecture": self.architecture, "samples": [list(row) for row in self.samples]}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Fingerprint:
        """Inverse of `to_dict`; ValueError if the data have another form."""
        architecture, samples = data.get("architecture"), data.get("samples")
        if not isinstance(architecture, str) or not isinstance(samples, list):
            raise ValueError("a fingerprint needs `architecture` (text) and `samples` (lists of numbers).")
        try:
            rows = tuple(tuple(float(value) for value in row) for row in samples)
        except OverflowError:
            raise ValueError("a fingerprint's `samples` must be finite numbers.") from None
        if any(not math.isfinite(value) for row in rows for value in row):
            raise ValueError("a fingerprint's `samples` must be finite numbers.")
        if any(len(row) != SAMPLES_PER_TENSOR for row in rows):
            raise ValueError(f"each row of a fingerprint's `samples` needs {SAMPLES_PER_TENSOR} numbers.")
        return cls(architecture, rows)


def _sample(tensor: Tensor) -> list[float]:
    """Values at evenly spaced places, rounded so that JSON holds them exactly."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).round().long()
    return [round(value, 6) for value in flat[places.to(flat.device)].cpu().double().tolist()]
