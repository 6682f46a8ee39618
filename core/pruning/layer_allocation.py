"""Measuring what each group is worth to the samples, and dividing every level among the groups by it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .. import progress
from ..calibration import Calibration
from ..errors import BankError, StagePruneError
from ..groups import DenoiserCost, Group, consumer_sites
from ..host import Host
from .bank import Consumer, ConsumerKey
from .layerwise import POWERS, UNIFORM, Sensitivity, choose, grid_counts, spread
from .levels import Widths
from .replay import Replay
from .solver import Solver

logger = logging.getLogger(__name__)

LayerAllocation = Literal["measured", "uniform"]

NOISE_LEVELS = 5
"""Steps of the dense trajectories on which errors are measured."""

Counts = Mapping[str, tuple[int, ...]]
"""Group name -> kept units at each level."""


class LayerPlan(NamedTuple):
    """How each level is divided among the groups.

    Args:
        counts: group name -> kept units at each level.
        consumers: the pooled consumers of these levels.
        record: how it was found, plain data.
    """

    counts: dict[str, tuple[int, ...]]
    consumers: dict[ConsumerKey, Consumer]
    record: dict[str, Any]


def replay_for(host: Host, calibration: Calibration | None, prompts: int) -> Replay:
    """Dense calls on the calibration's first prompts, steps and guidance; on the host's own defaults without one.

    Args:
        host: the pipeline.
        calibration: what the bank is made from.
        prompts: how many.

    Raises:
        BankError: the host cannot sample.
    """
    made: Mapping[str, Any] = calibration.provenance if calibration is not None else {}
    try:
        known = list(made.get("prompts") or host.default_prompts())
        chosen = [known[i % len(known)] for i in range(prompts)]
        guidance = made.get("guidance", host.default_guidance)
        return Replay(host, chosen, made.get("seed", 0), made.get("steps", 25), guidance, NOISE_LEVELS)
    except StagePruneError as error:
        raise BankError(f"layers cannot be measured: {error} Or give `layer_allocation` 'uniform'.") from None


def allocate_layers(
    solver: Solver,
    orders: Mapping[str, Tensor],
    cost: DenoiserCost,
    sparsities: Sequence[float],
    widths: Widths,
    uniform: Counts,
    replay: Replay,
) -> LayerPlan:
    """Divide every level among the groups: by the sensitivities of the groups, adding errors up in two ways, or one
    share for all; whichever the samples bear best with all groups pruned together.

    Args:
        solver: makes consumers.
        orders: group name -> its pooled order.
        cost: MACs of the denoiser.
        sparsities: of the levels, rising, the first 0.
        widths: which are allowed.
        uniform: kept units with one share for all.
        replay: measures errors.
    """
    consumers = dict(_consumers(solver, orders, uniform))
    middle = max(len(sparsities) // 2, 1)
    replay.weigh(solver.widened_level(orders, uniform, consumers, middle))
    errors = {UNIFORM: _errors(solver, orders, uniform, consumers, replay)}
    candidates: dict[str, Counts] = {UNIFORM: uniform}
    sensitivity = measure_sensitivity(solver, orders, widths, replay)
    for name, power in progress.track(POWERS.items(), "comparing layer allocations"):
        counts = spread(solver.groups, cost, sparsities, sensitivity, power, widths)
        made = dict(_consumers(solver, orders, counts))
        candidates[name], errors[name] = counts, _errors(solver, orders, counts, made, replay)
        if choose(errors) == name:  # only the best so far is held: consumers are a good part of the model
            consumers = made
    best = choose(errors)
    logger.info("layers divided by %s; errors of the samples: %s", best, errors)
    record = {"layer_allocation": best, "layer_errors": {name: [*map(_short, each)] for name, each in errors.items()}}
    return LayerPlan(dict(candidates[best]), consumers, record)


def measure_sensitivity(solver: Solver, orders: Mapping[str, Tensor], widths: Widths, replay: Replay) -> Sensitivity:
    """What the samples lose when one group alone keeps fewer units, its consumers compensated.

    Arguments as for `allocate_layers`.
    """
    counts = {group.name: grid_counts(group, widths) for group in solver.groups}
    errors = {
        group.name: (0.0, *_errors_alone(solver, orders, group, counts[group.name], replay))
        for group in progress.track(solver.groups, "measuring layers")
    }
    return Sensitivity(counts, errors)


def _errors_alone(
    solver: Solver, orders: Mapping[str, Tensor], group: Group, counts: tuple[int, ...], replay: Replay
) -> Iterator[float]:
    """Error with one group at each of `counts` but the first, the others whole."""
    alone = {other.name: (other.size,) * len(counts) for other in solver.groups} | {group.name: counts}
    paths = [consumer.path for consumer in group.consumers]
    made = dict(_consumers(solver, orders, alone, paths))
    for level in range(1, len(counts)):
        yield replay.error(solver.widened_level(orders, alone, made, level, paths))


def _errors(
    solver: Solver,
    orders: Mapping[str, Tensor],
    counts: Counts,
    consumers: Mapping[ConsumerKey, Consumer],
    replay: Replay,
) -> list[float]:
    """Error of every level above 0, all groups pruned."""
    levels = len(next(iter(counts.values())))
    return [replay.error(solver.widened_level(orders, counts, consumers, level)) for level in range(1, levels)]


def _consumers(
    solver: Solver, orders: Mapping[str, Tensor], counts: Counts, paths: Sequence[str] | None = None
) -> Iterator[tuple[ConsumerKey, Consumer]]:
    """Pooled consumers of every level above 0: all, or those at `paths`."""
    for path in consumer_sites(solver.groups) if paths is None else paths:
        yield from solver.consumers(path, None, orders, counts)


def _short(error: float) -> float:
    return float(f"{error:.4g}")
