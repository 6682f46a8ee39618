"""From calibration to bank: order every group's units, then compensate every consumer at every level."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import progress
from ..calibration import Calibration
from ..errors import BankError
from ..groups import Group, consumer_sites, find_groups, measure_cost
from ..groups.layer import inputs_of, layer_at, matrix_columns, matrix_of, taps_of
from ..host import Host
from .bank import Bank, Consumer, ConsumerKey, Sharing, fingerprint_of
from .compensate import compensate, damp, finite, with_bias
from .levels import DEFAULT_LEVELS, check_sparsities, kept_blocks, kept_counts, select_groups
from .methods import WIDTH_KINDS, ConsumerProblem, GroupProblem, Method, find_method

logger = logging.getLogger(__name__)

DEFAULT_KINDS = ("head", "neuron")


@torch.no_grad()
def prune(
    host: Host,
    calibration: Calibration | None = None,
    *,
    method: str = "obs",
    levels: Sequence[float] = DEFAULT_LEVELS,
    kinds: Sequence[str] | None = None,
    order: Sharing = "shared",
    consumers: Sharing = "shared",
    multiple: int = 64,
    damping: float = 0.01,
    seed: int = 0,
    kept: Mapping[str, tuple[int, ...]] | None = None,
) -> Bank:
    """Make a bank of levels for the denoiser of `host`. The denoiser is not changed.

    Args:
        host: the pipeline.
        calibration: Hessians of this denoiser; `obs`, `wanda` and `activation` need it, others ignore it.
        method: one of `stageprune.methods()`.
        levels: sparsities, in [0, 1); dense is always added.
        kinds: unit kinds to prune; by default those that were calibrated, or else heads and neurons. `["block"]`, for
            `depth`, `depth-output` and `random`, skips whole blocks.
        order: `shared`, one order for all stages (prefix views, free switches), or `stage`, one for each stage of the
            calibration (gathered at a switch).
        consumers: `shared`, one compensated consumer a level, or `stage`, one a level and stage of the calibration.
        multiple: neurons are kept in multiples of this.
        damping: added to the diagonal of each Hessian, relative to its mean.
        seed: for methods that draw.
        kept: units kept in each group at each level, for a bank to compare with another; by default what comes to
            `levels` in MACs of a call of the host's size.

    Raises:
        BankError: an argument is out of range, or the method needs a calibration that is missing.
        CalibrationError: the calibration is of another model, or has too few rows for a Hessian's rank.
    """
    recipe = _check(host, calibration, method, order, consumers, damping)
    groups = select_groups(find_groups(host.denoiser), _kinds(method, recipe, calibration, kinds))
    sparsities = check_sparsities(levels)
    cost = measure_cost(host.denoiser, size=host.input_size)
    counts = kept_counts(groups, cost, sparsities, multiple) if kept is None else dict(kept)
    started = time.perf_counter()
    solver = _Solver(host.denoiser, groups, recipe, calibration, damping, seed)
    orders: dict[str, Tensor] = {}
    for group in progress.track(groups, "ordering units"):
        parts = [solver.order(group, stage) for stage in solver.order_stages(order)]
        orders[group.name] = torch.stack(parts) if order == "stage" else parts[0]
        if group.kind == "block" and kept is None:  # what blocks cost differs, so their order comes first
            counts[group.name] = kept_blocks(orders[group.name], cost, sparsities)
    solved: dict[ConsumerKey, Consumer] = {}
    sites = consumer_sites(groups)
    for path in progress.track(sites, "compensating" if recipe.compensates else "slicing"):
        for stage in solver.consumer_stages(order, consumers):
            units = {
                g.name: (orders[g.name][stage or 0] if order == "stage" else orders[g.name]) for g, _ in sites[path]
            }
            solved.update(solver.consumers(path, stage, units, counts))
    bank = Bank(
        denoiser=type(host.denoiser).__name__,
        component=host.component,
        groups=tuple(groups),
        sparsities=sparsities,
        kept=counts,
        orders=orders,
        consumers=solved,
        edges=calibration.edges if calibration is not None and "stage" in (order, consumers) else (1.0, 0.0),
        method=method,
        fingerprint=fingerprint_of(host.denoiser),
        consumer_shapes={path: tuple(layer_at(host.denoiser, path).weight.shape) for path in sites},
    )
    return replace(
        bank,
        provenance={
            **{key: value for key, value in host.describe().items() if key in ("pipeline", "model", "size")},
            "realised": [round(share, 6) for share in bank.realised(cost)],
            "method": method,
            "damping": damping,
            "multiple": multiple,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 2),
            "calibration": dict(calibration.provenance) if calibration is not None and recipe.needs_data else None,
        },
    )


def calibrated_kinds(calibration: Calibration | None) -> Sequence[str]:
    """Unit kinds that a calibration was made for; without one, heads and neurons."""
    known: Sequence[str] = calibration.provenance.get("kinds", DEFAULT_KINDS) if calibration else DEFAULT_KINDS
    return [kind for kind in known if kind != "block"] or DEFAULT_KINDS


def _kinds(method: str, recipe: Method, calibration: Calibration | None, kinds: Sequence[str] | None) -> Sequence[str]:
    """Unit kinds to prune. Whole blocks go by themselves: their levels are other levels."""
    if kinds is None:
        return [kind for kind in calibrated_kinds(calibration) if kind in recipe.kinds] or ["block"]
    if "block" in kinds and len(set(kinds)) > 1:
        raise BankError(f"`kinds` must be whole blocks alone, or others without them; got {sorted(kinds)}.")
    wrong = [kind for kind in kinds if kind in (*WIDTH_KINDS, "block") and kind not in recipe.kinds]
    if wrong:
        raise BankError(f"method {method!r} orders units of kind {', '.join(recipe.kinds)}; got `kinds` {list(kinds)}.")
    return kinds


def _check(
    host: Host, calibration: Calibration | None, method: str, order: Sharing, consumers: Sharing, damping: float
) -> Method:
    """Validate the arguments before any work."""
    recipe = find_method(method)
    for name, value in (("order", order), ("consumers", consumers)):
        if value not in ("shared", "stage"):
            raise BankError(f"`{name}` must be 'shared' or 'stage', got {value!r}.")
    if not 0 < damping < 1:
        raise BankError(f"`damping` must be in (0, 1), got {damping}.")
    if not recipe.needs_data:
        if "stage" in (order, consumers):
            raise BankError(f"method {method!r} looks at no data, so it has nothing per stage; use 'shared'.")
        return recipe
    if not recipe.compensates and (order, consumers) == ("shared", "stage"):
        raise BankError(f"method {method!r} does not compensate: with one order, its consumers are the same per stage.")
    if calibration is None:
        raise BankError(f"method {method!r} needs a `calibration`; make one with stageprune.calibrate.")
    calibration.check_denoiser(fingerprint_of(host.denoiser))
    if "stage" in (order, consumers):
        if calibration.stages < 2:
            raise BankError("orders or consumers per stage need a calibration with `stages` of at least 2.")
        calibration.check_rank(per_stage=True)
    calibration.check_rank(per_stage=False)
    return recipe


@dataclass
class _Solver:
    """Holds what ordering and compensating share: weights, Hessians (damped when asked for) and the method."""

    denoiser: nn.Module
    groups: Sequence[Group]
    method: Method
    calibration: Calibration | None
    damping: float
    seed: int

    def order_stages(self, order: Sharing) -> list[int | None]:
        """Stages to order for; None is all stages pooled."""
        return [None] if order == "shared" or self.calibration is None else list(range(self.calibration.stages))

    def consumer_stages(self, order: Sharing, consumers: Sharing) -> list[int | None]:
        """Stages to compensate for. An order per stage has consumers per stage, since their columns differ."""
        return self.order_stages("stage" if "stage" in (order, consumers) else "shared")

    def hessian(self, path: str, stage: int | None) -> Tensor | None:
        """Hessian in float64 where the layer is, damped if it is to be inverted; None for data-free methods."""
        if self.calibration is None or not self.method.needs_data:
            return None
        hessian = self.calibration.hessian(path, stage).to(layer_at(self.denoiser, path).weight.device)
        return damp(hessian, self.damping) if self.method.compensates else finite(hessian)

    def order(self, group: Group, stage: int | None) -> Tensor:
        """Units of `group`, most important first."""
        every = torch.arange(group.size)
        problems = []
        for consumer in group.consumers:
            layer = layer_at(self.denoiser, consumer.path)
            columns = matrix_columns(group.columns(every, consumer.offset), taps_of(layer)).reshape(group.size, -1)
            hessian = self.hessian(consumer.path, stage)
            problems.append(ConsumerProblem(matrix_of(layer), layer.bias, hessian, columns))
        matrices = [(matrix_of(layer_at(self.denoiser, p.path)), p.blocks) for p in group.producers]
        producers = [
            matrix[group.rows(every, blocks)].view(blocks, group.size, -1, matrix.shape[1])
            for matrix, blocks in matrices
        ]
        rows = [part.movedim(0, 1).flatten(1, 2) for part in producers]
        seed = self.seed + zlib.crc32(group.name.encode())
        scores = self.calibration.scores_of(group.name, stage) if self.calibration and self.method.needs_data else {}
        return self.method.order(GroupProblem(group, problems, rows, seed, scores)).units

    def consumers(
        self, path: str, stage: int | None, units: Mapping[str, Tensor], counts: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[ConsumerKey, Consumer]]:
        """The consumer at `path` for every level above 0."""
        layer = layer_at(self.denoiser, path)
        entries = consumer_sites(self.groups)[path]
        levels = len(counts[entries[0][0].name])
        hessian = self.hessian(path, stage) if self.method.compensates else None
        dense = matrix_of(layer).detach()
        channels, kept_places = nested_columns(entries, units, counts, inputs_of(layer))
        columns = matrix_columns(channels, taps_of(layer)).to(dense.device)
        places = [matrix_columns(place, taps_of(layer)) for place in kept_places]
        kept = [len(place) for place in places]
        if hessian is not None:
            solutions = compensate(with_bias(dense, layer.bias), hessian, columns, kept)
        else:
            shift = dense.new_zeros(len(dense)) if layer.bias is None else layer.bias.detach()
            solutions = [(dense[:, columns[:count]], shift) for count in kept]
        for level in range(1, levels):
            weight, bias = solutions[level]
            ordered = weight[:, places[level].to(weight.device)].to(dense.dtype).contiguous()
            shaped = ordered.view(len(dense), -1, *layer.weight.shape[2:])
            yield ConsumerKey(path, level, stage or 0), Consumer(shaped, bias.to(dense.dtype).clone())


def nested_columns(
    entries: Sequence[tuple[Group, int]],
    units: Mapping[str, Tensor],
    counts: Mapping[str, tuple[int, ...]],
    columns: int,
) -> tuple[Tensor, list[Tensor]]:
    """A consumer's input channels so ordered that every level is a prefix, even where several groups share it.

    Returns:
        The permutation, shape (columns,); and per level the places in it of the kept ones, in the order in which the
        sliced producers deliver them (segment after segment).
    """
    levels = len(counts[entries[0][0].name])
    delivered, survives, end = [], [], 0
    for group, offset in entries:
        delivered += [torch.arange(end, offset), group.columns(units[group.name], offset)]
        kept = torch.tensor(counts[group.name]) * group.width
        survives += [torch.full((offset - end,), levels), (torch.arange(group.channels)[:, None] < kept).sum(1)]
        end = offset + group.channels
    delivered.append(torch.arange(end, columns))  # columns of no pruned group stay at every level
    survives.append(torch.full((columns - end,), levels))
    lasts, order = torch.cat(survives).sort(descending=True, stable=True)
    place = order.argsort()
    return torch.cat(delivered)[order], [
        place[(lasts.new_tensor(level) < torch.cat(survives))] for level in range(levels)
    ]
