"""What ordering and compensating a denoiser's groups share: weights, Hessians and the method."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..groups import Group, consumer_sites
from ..groups.layer import Layer, inputs_of, layer_at, matrix_columns, matrix_of, taps_of
from .bank import Consumer, ConsumerKey, Sharing
from .compensate import compensate, damp, finite, with_bias
from .methods import ConsumerProblem, GroupProblem, Method


@dataclass
class Solver:
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

    def widened_level(
        self,
        orders: Mapping[str, Tensor],
        counts: Mapping[str, tuple[int, ...]],
        consumers: Mapping[ConsumerKey, Consumer],
        level: int,
        paths: Iterable[str] | None = None,
    ) -> dict[str, Consumer]:
        """Consumers of a level in the dense shapes (see `widened`): all, or those at `paths`."""
        sites = consumer_sites(self.groups)
        return {
            path: widened(
                consumers[ConsumerKey(path, level, 0)],
                layer_at(self.denoiser, path),
                sites[path],
                orders,
                counts,
                level,
            )
            for path in (sites if paths is None else paths)
        }


def widened(
    consumer: Consumer,
    layer: Layer,
    entries: Sequence[tuple[Group, int]],
    units: Mapping[str, Tensor],
    counts: Mapping[str, tuple[int, ...]],
    level: int,
) -> Consumer:
    """A consumer of some level in the shape of its dense layer, with zeros for the inputs that are gone.

    Args:
        consumer: of the level.
        layer: the dense layer.
        entries: the groups that it consumes, with their offsets.
        units: group name -> its order.
        counts: group name -> kept units per level.
        level: which.
    """
    order, places = nested_columns(entries, units, counts, inputs_of(layer))
    weight = torch.zeros_like(layer.weight)
    weight[:, order[places[level]].to(weight.device)] = consumer.weight.to(weight)
    return Consumer(weight, consumer.bias)


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
