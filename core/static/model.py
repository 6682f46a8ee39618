"""The static sparse model: which weights replace the dense ones, applied in place or saved as a plain model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import BankError
from ..fingerprint import Fingerprint
from ..plain_folder import save_plain
from ..pruning import Pattern, fingerprint_of
from ..version import __version__
from .apply import Applied
from .kernels import Backend, Kernels

FORMAT = "stageprune.static"
FORMAT_VERSION = 1


class SparseLayer(NamedTuple):
    """A layer's weight with its zeros, in the layer's own shape and dtype, and its bias (None if it has none)."""

    weight: Tensor
    bias: Tensor | None

    @property
    def zeros(self) -> float:
        """Share of the weights that are 0."""
        return float((self.weight == 0).float().mean())

    def matrix(self) -> Tensor:
        """The weight (out, columns) as N:M sees it: input channels together, of a convolution at each place."""
        return self.weight.flatten(2).movedim(2, 1).flatten(1) if self.weight.ndim > 2 else self.weight


@dataclass(frozen=True, eq=False)
class StaticModel:
    """A denoiser with single weights zeroed: the same ones at every step, no levels, no stages.

    Args:
        denoiser: class name of the denoiser.
        component: its name in the pipeline.
        pattern: what became 0, `NM(2, 4)` or `Share(0.5)`.
        method: what chose them.
        layers: path -> the layer that replaces the dense one.
        left: path -> why the layer stays dense, for those that the pattern was meant for too.
        fingerprint: of the dense denoiser.
        provenance: plain data on how it was made.

    Example:
        >>> static = stageprune.sparsify(pipe, calibration, pattern="2:4")
        >>> with static.apply(pipe) as running:
        ...     print(running)
        ...     images = pipe([3, 7]).images
        >>> static.save(pipe, "out/sparse")
    """

    denoiser: str
    component: str
    pattern: Pattern
    method: str
    layers: Mapping[str, SparseLayer]
    left: Mapping[str, str]
    fingerprint: Fingerprint
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def realised(self, path: str) -> float:
        """Share of a layer's weights that are 0."""
        return self.layers[path].zeros

    def valid(self, path: str) -> bool:
        """Whether a layer's zeros are the pattern's."""
        return self.pattern.holds(self.layers[path].matrix())

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights of the layers that were sparsified."""
        weights = sum(layer.weight.numel() for layer in self.layers.values())
        zeros = sum(int((layer.weight == 0).sum()) for layer in self.layers.values())
        return zeros / weights if weights else 0.0

    def apply(self, target: Any, kernels: Kernels = "auto", backend: Backend | None = None) -> Applied:
        """Put the sparse layers in place of the dense ones.

        Args:
            target: the pipeline or its denoiser.
            kernels: `auto` multiplies 2:4 layers by torch's semi-structured kernels where the device has them and they
                were timed to be faster; `dense` multiplies zeros like other numbers, which costs what the dense model
                does.
            backend: the semi-structured kernels; torch's by default.

        Returns:
            What runs, and how each layer does. Its `restore()`, or the end of a `with` block, gives the dense model
            back, bit for bit.

        Raises:
            BankError: the denoiser is not the one that this was made from.
            StagePruneError: stage pruning is enabled on it, or a static model is applied already.
        """
        return Applied(self, self.denoiser_of(target), kernels, backend)

    def save(self, target: Any, folder: str | Path) -> Path:
        """Write a plain model folder in safetensors that needs no stageprune to load, and a JSON of how it was made.

        Args:
            target: the pipeline, which is written whole, or its denoiser, of which a denoiser folder is written; its
                class must have `save_pretrained`. It is sparse while it is written, and dense again at the end.
            folder: where to; an earlier one is replaced, anything else is not.

        Example:
            >>> static.save(pipe.transformer, "out/sparse")
            >>> DiTTransformer2DModel.from_pretrained("out/sparse")  # weights with zeros, as large as the dense ones
        """
        with self.apply(target, kernels="dense"):
            return save_plain(folder, target.save_pretrained, self.describe())

    def describe(self) -> dict[str, Any]:
        """What was done to which layer, as plain data."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "base_model": self.provenance.get("model") or "",
            "denoiser": self.denoiser,
            "component": self.component,
            "method": self.method,
            "pattern": str(self.pattern),
            "sparsity": round(self.sparsity, 6),
            "layers": {
                path: {"shape": list(layer.weight.shape), "zeros": round(layer.zeros, 6), "valid": self.valid(path)}
                for path, layer in self.layers.items()
            },
            "left_dense": dict(self.left),
            "provenance": dict(self.provenance),
        }

    def denoiser_of(self, target: Any) -> nn.Module:
        """The denoiser of a pipeline, under torch.compile's wrapper if there is one."""
        module = target if isinstance(target, nn.Module) else getattr(target, self.component, None)
        if not isinstance(module, nn.Module):
            raise BankError(f"the static model is for a `{self.component}`; a {type(target).__name__} has none.")
        inner = getattr(module, "_orig_mod", module)
        return inner if isinstance(inner, nn.Module) else module

    def check_denoiser(self, denoiser: nn.Module) -> None:
        """BankError if `denoiser` is not the dense one that this was made from."""
        if type(denoiser).__name__ != self.denoiser:
            raise BankError(f"the static model is for a {self.denoiser}, got a {type(denoiser).__name__}.")
        why = self.fingerprint.mismatch(fingerprint_of(denoiser))
        if why:
            raise BankError(f"the static model is of another {self.denoiser}: {why}.")

    def __str__(self) -> str:
        invalid = [path for path in self.layers if not self.valid(path)]
        lines = [
            f"Static {self.denoiser}: pattern {self.pattern}, method {self.method}, {len(self.layers)} layers, "
            f"{self.sparsity:.4f} of their weights are 0, masks "
            + (f"INVALID in {', '.join(invalid)}" if invalid else "valid in all"),
        ]
        for path, layer in self.layers.items():
            lines.append(f"  {path}: {' x '.join(map(str, layer.weight.shape))}, zeros {layer.zeros:.4f}")
        lines += [f"  {path}: dense, {why}" for path, why in self.left.items()]
        return "\n".join(lines)
