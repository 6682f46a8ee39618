"""A static model in place of the dense layers, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import StagePruneError
from ..groups import input_sites
from ..groups.layer import layer_at
from ..runtime import pruner_of
from .kernels import Backend, KernelChoice, Kernels, TorchBackend, choose_kernels

if TYPE_CHECKING:
    from .model import StaticModel

_APPLIED = "_stage_static"

BATCH = 2
"""Samples of a call that layers are timed on: one image and its unconditional pass."""


class Applied:
    """A static model that runs on a denoiser. Also a context manager, at whose end the dense model is back.

    The dense Parameters are kept as they are, on their device, so both models are in memory until `restore`.

    Args:
        model: the static model.
        denoiser: the dense denoiser.
        kernels: see `StaticModel.apply`.
        backend: the semi-structured kernels; torch's by default.

    Raises:
        BankError: the denoiser is not the one that the model was made from.
        StagePruneError: an argument is unknown, or the denoiser runs something else already.
    """

    def __init__(
        self, model: StaticModel, denoiser: nn.Module, kernels: Kernels = "auto", backend: Backend | None = None
    ) -> None:
        if kernels not in ("auto", "dense"):
            raise StagePruneError(f"`kernels` must be 'auto' or 'dense', got {kernels!r}.")
        if pruner_of(denoiser) is not None:
            raise StagePruneError("stage pruning is enabled on this denoiser. Call disable_stage_pruning() first.")
        if denoiser.__dict__.get(_APPLIED) is not None:
            raise StagePruneError("a static model is applied to this denoiser already. Call its restore() first.")
        model.check_denoiser(denoiser)
        self.model = model
        self.denoiser = denoiser
        self._dense: list[tuple[nn.Module, str, nn.Parameter]] = []
        backend = backend or TorchBackend()
        self.choices = _choices(model, denoiser, kernels, backend)
        with self._undone_on_error(), torch.no_grad():
            for choice in self.choices:
                self._replace(choice, backend)
        denoiser.__dict__[_APPLIED] = self

    def restore(self) -> None:
        """Give the dense model back: the very Parameters that were there before, with the dtype and on the device that
        the denoiser has by now. Does nothing the second time.
        """
        for module, name, parameter in self._dense:
            _follow(parameter, getattr(module, name))
            setattr(module, name, parameter)
        self._dense = []
        if self.denoiser.__dict__.get(_APPLIED) is self:
            del self.denoiser.__dict__[_APPLIED]

    def _replace(self, choice: KernelChoice, backend: Backend) -> None:
        layer, sparse = layer_at(self.denoiser, choice.path), self.model.layers[choice.path]
        # Copies, so that nothing that happens to the Parameters reaches the static model.
        weight = sparse.weight.to(layer.weight.device, layer.weight.dtype, copy=True)
        new: Mapping[str, Tensor | None] = {
            "weight": backend.compress(weight) if choice.sparse else weight,
            "bias": None if sparse.bias is None else sparse.bias.to(weight, copy=True),
        }
        for name, tensor in new.items():
            if tensor is not None:
                dense = getattr(layer, name)
                self._dense.append((layer, name, dense))
                setattr(layer, name, nn.Parameter(tensor, requires_grad=dense.requires_grad and not choice.sparse))

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the denoiser is a model of its own, with nothing to go back to

    def __str__(self) -> str:
        sparse = sum(choice.sparse for choice in self.choices)
        lines = [
            f"Static {self.model.denoiser}, pattern {self.model.pattern}: {sparse} of {len(self.choices)} layers run "
            "by semi-structured kernels, the others as dense ones with zeros"
        ]
        for choice in self.choices:
            how = "semi-structured" if choice.sparse else "dense"
            lines.append(f"  {choice.path}: zeros {self.model.realised(choice.path):.4f}, {how}, {choice.why}")
        lines += [f"  {path}: dense, no zeros, {why}" for path, why in self.model.left.items()]
        return "\n".join(lines)


def _follow(parameter: nn.Parameter, running: nn.Parameter) -> None:
    """Bring a Parameter that no module holds to where the one in its place has been taken, unchanged if nowhere: the
    denoiser's `.to()` did not reach it. The meta device has no values, so there it stays what it is.
    """
    if not running.is_meta:
        parameter.data = parameter.data.to(running.device, running.dtype)


def _choices(model: StaticModel, denoiser: nn.Module, kernels: Kernels, backend: Backend) -> list[KernelChoice]:
    if kernels == "dense":
        return [KernelChoice(path, False, "asked for: `kernels` is 'dense'") for path in model.layers]
    sites = input_sites(denoiser, list(model.layers))
    return choose_kernels(model, denoiser, {path: BATCH * site.rows for path, site in sites.items()}, backend)
