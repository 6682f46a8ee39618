"""From a calibration to a static sparse model, layer by layer, all from the dense model's own inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .. import progress
from ..calibration import Calibration
from ..errors import BankError
from ..groups import Group, consumer_sites, find_groups, input_sites, layer_paths, width_groups
from ..groups.layer import Layer, inputs_of, layer_at, matrix_of, taps_of
from ..host import Host
from ..pruning import NM, Pattern, fingerprint_of, parse_pattern
from ..pruning.compensate import finite, with_bias
from ..pruning.levels import select_groups
from ..pruning.prune import calibrated_kinds
from .methods import LayerProblem, SparseMethod, find_sparsifier
from .model import SparseLayer, StaticModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def sparsify(
    host: Host,
    calibration: Calibration | None = None,
    *,
    pattern: str | float | Pattern = "2:4",
    method: str = "obs",
    kinds: Sequence[str] | None = None,
    keep_dense: Sequence[str] = (),
    damping: float = 0.01,
) -> StaticModel:
    """Zero single weights of the layers around prunable units. The denoiser is not changed.

    Which layers: those whose inputs the calibration has recorded, so the consumers, and with `layers="all"` the
    producers too. A method that needs no data takes all of them, or those of a calibration that is given. Layers that
    read the timestep once a sample are left alone.

    Args:
        host: the pipeline.
        calibration: Hessians of this denoiser; `obs` and `wanda` need it.
        pattern: `"2:4"` or any N:M (of every M weights of a row N are kept), or the share of zeros in each layer. N:M
            runs along a Linear's inputs, and along a convolution's input channels at each place of its kernel.
        method: one of `sparsifiers()`.
        kinds: unit kinds whose layers are meant; by default those that were calibrated, or else heads and neurons.
        keep_dense: layers to leave alone, by path or with wildcards (`transformer_blocks.0.*`).
        damping: added to the diagonal of each Hessian, relative to its mean.

    Returns:
        The static model. Layers whose width is no multiple of M are dense in it, and listed.

    Raises:
        BankError: an argument is out of range, or the method needs a calibration that is missing.
        CalibrationError: the calibration is of another model, or has too few rows for a Hessian's rank.
    """
    wanted, recipe = parse_pattern(pattern), find_sparsifier(method)
    _check(host, calibration, method, recipe, damping)
    chosen = calibrated_kinds(calibration) if kinds is None else kinds
    groups = select_groups(width_groups(find_groups(host.denoiser)), chosen)
    left, layers = _left(host, groups, calibration, wanted, keep_dense), {}
    started = time.perf_counter()
    paths = [path for path in layer_paths(groups) if path not in left]
    for path in progress.track(paths, "sparsifying"):
        layer = layer_at(host.denoiser, path)
        hessian = calibration.hessian(path) if calibration is not None and recipe.needs_data else None
        layers[path] = _solve(layer, hessian, recipe, wanted, damping)
    return StaticModel(
        denoiser=type(host.denoiser).__name__,
        component=host.component,
        pattern=wanted,
        method=method,
        layers=layers,
        left=left,
        fingerprint=fingerprint_of(host.denoiser),
        provenance={
            **{key: value for key, value in host.describe().items() if key in ("pipeline", "model", "size")},
            "damping": damping,
            "kinds": sorted(chosen),
            "seconds": round(time.perf_counter() - started, 2),
            "calibration": dict(calibration.provenance) if calibration is not None and recipe.needs_data else None,
        },
    )


def _check(host: Host, calibration: Calibration | None, method: str, recipe: SparseMethod, damping: float) -> None:
    """Validate the arguments before any work."""
    if not 0 < damping < 1:
        raise BankError(f"`damping` must be in (0, 1), got {damping}.")
    if recipe.needs_data and calibration is None:
        raise BankError(
            f'method {method!r} needs a `calibration`; make one with stageprune.calibrate, with `layers="all"` if the '
            "layers that produce units are meant too."
        )
    if calibration is not None:
        calibration.check_denoiser(fingerprint_of(host.denoiser))
        calibration.check_rank(per_stage=False)


def _left(
    host: Host,
    groups: Sequence[Group],
    calibration: Calibration | None,
    pattern: Pattern,
    keep_dense: Sequence[str],
) -> dict[str, str]:
    """Path of each layer that stays dense -> why."""
    paths = layer_paths(groups)
    left = _unknown(host, groups, calibration)
    if isinstance(pattern, NM):
        for path in paths:
            width = inputs_of(layer_at(host.denoiser, path))
            if width % pattern.of:
                left[path] = f"its {width} input channels are no multiple of {pattern.of}"
    for mark in keep_dense:
        matched = [path for path in paths if fnmatchcase(path, mark)]
        if not matched:
            raise BankError(
                f"`keep_dense` {mark!r} matches no layer of the pruned groups; their paths are such as {paths[0]}."
            )
        left |= dict.fromkeys(matched, f"asked for: `keep_dense` {mark!r}")
    return left


def _unknown(host: Host, groups: Sequence[Group], calibration: Calibration | None) -> dict[str, str]:
    """Layers about whose inputs nothing is known, and why."""
    sites = input_sites(host.denoiser, layer_paths(groups), host.input_size)
    left = {}
    for path in layer_paths(groups):
        if path not in sites or sites[path].rows < 2:
            left[path] = "it does not read tokens, but what is computed once a sample"
        elif calibration is not None and not calibration.knows(path):
            left[path] = 'its inputs were not calibrated (`layers="all"` records them)'
    if calibration is not None:
        for path in consumer_sites(groups):
            calibration.hessian(path)  # of another kind than was calibrated: its error says what to do
    return left


def _solve(layer: Layer, hessian: Tensor | None, recipe: SparseMethod, pattern: Pattern, damping: float) -> SparseLayer:
    """The layer with its zeros, in its own shape and dtype."""
    dense = with_bias(matrix_of(layer), layer.bias)
    order = channels_last(layer)
    if hessian is not None:
        hessian = finite(hessian.to(dense.device))
        if layer.bias is None:  # its constant-1 input is cut off from the others: nothing may move into a bias
            hessian[-1, :-1] = hessian[:-1, -1] = 0
            hessian[-1, -1] = 1
        hessian = hessian[order][:, order]
    weight, bias = recipe.solve(LayerProblem(dense[:, order], hessian, pattern, damping))
    back = order[:-1].argsort()
    shaped = weight[:, back].to(layer.weight.dtype).view(layer.weight.shape).contiguous()
    return SparseLayer(shaped, None if layer.bias is None else bias.to(layer.bias.dtype))


def channels_last(layer: Layer) -> Tensor:
    """Columns of the layer's matrix, and the bias last, with the input channels of each place of the kernel together.

    That is how N:M runs along channels; for a Linear nothing changes.
    """
    taps, columns = taps_of(layer), inputs_of(layer) * taps_of(layer)
    order = torch.arange(columns, device=layer.weight.device).view(-1, taps).T.reshape(-1)
    return torch.cat([order, order.new_tensor([columns])])
