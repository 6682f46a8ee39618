"""Measuring what each group is worth to the denoiser's output, and dividing every level among the groups by it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .. import progress
from ..calibration import Calibration
from ..errors import BankError, StagePruneError
from ..groups import DenoiserCost, Group, consumer_sites
from ..groups.layer import layer_at
from ..host import Host
from .bank import Consumer, ConsumerKey
from .layerwise import POWERS, UNIFORM, Sensitivity, choose, grid_counts, spread
from .replay import Replay
from .solver import Solver, widened

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
    multiple: int,
    uniform: Counts,
    replay: Replay,
) -> LayerPlan:
    """Divide every level among the groups: by the sensitivities of the groups, adding errors up in two ways, or one
    share for all; whichever the denoiser's output bears best with all groups pruned together.

    Args:
        solver: makes consumers.
        orders: group name -> its pooled order.
        cost: MACs of the denoiser.
        sparsities: of the levels, rising, the first 0.
        multiple: neurons are kept in multiples of this.
        uniform: kept units with one share for all.
        replay: measures the output.
    """
    sensitivity = measure_sensitivity(solver, orders, multiple, replay)
    candidates: dict[str, Counts] = {UNIFORM: uniform}
    for name, power in POWERS.items():
        candidates[name] = spread(solver.groups, cost, sparsities, sensitivity, power, multiple)
    errors: dict[str, list[float]] = {}
    consumers: dict[ConsumerKey, Consumer] = {}
    for name in progress.track(candidates, "comparing layer allocations"):
        made = dict(_consumers(solver, orders, candidates[name]))
        errors[name] = [
            replay.error(_widened(solver, orders, candidates[name], made, level)) for level in range(1, len(sparsities))
        ]
        if choose(errors) == name:  # only the best so far is held: consumers are a good part of the model
            consumers = made
    best = choose(errors)
    logger.info("layers divided by %s; errors of the output: %s", best, errors)
    record = {"layer_allocation": best, "layer_errors": {name: [*map(_short, each)] for name, each in errors.items()}}
    return LayerPlan(dict(candidates[best]), consumers, record)


def measure_sensitivity(solver: Solver, orders: Mapping[str, Tensor], multiple: int, replay: Replay) -> Sensitivity:
    """What the denoiser's output loses when one group alone keeps fewer units, its consumers compensated.

    Arguments as for `allocate_layers`.
    """
    counts = {group.name: grid_counts(group, multiple) for group in solver.groups}
    errors = {
        group.name: (0.0, *_errors_alone(solver, orders, group, counts[group.name], replay))
        for group in progress.track(solver.groups, "measuring layers")
    }
    return Sensitivity(counts, errors)


def _errors_alone(
    solver: Solver, orders: Mapping[str, Tensor], group: Group, counts: tuple[int, ...], replay: Replay
) -> Iterator[float]:
    """Error of the output with one group at each of `counts` but the first, the others whole."""
    alone = {other.name: (other.size,) * len(counts) for other in solver.groups} | {group.name: counts}
    paths = [consumer.path for consumer in group.consumers]
    made = dict(_consumers(solver, orders, alone, paths))
    for level in range(1, len(counts)):
        yield replay.error(_widened(solver, orders, alone, made, level, paths))


def _consumers(
    solver: Solver, orders: Mapping[str, Tensor], counts: Counts, paths: Sequence[str] | None = None
) -> Iterator[tuple[ConsumerKey, Consumer]]:
    """Pooled consumers of every level above 0: all, or those at `paths`."""
    for path in consumer_sites(solver.groups) if paths is None else paths:
        yield from solver.consumers(path, None, orders, counts)


def _widened(
    solver: Solver,
    orders: Mapping[str, Tensor],
    counts: Counts,
    consumers: Mapping[ConsumerKey, Consumer],
    level: int,
    paths: Sequence[str] | None = None,
) -> dict[str, Consumer]:
    """Consumers of a level in the dense shapes: removing units equals zeroing them."""
    sites = consumer_sites(solver.groups)
    return {
        path: widened(
            consumers[ConsumerKey(path, level, 0)],
            layer_at(solver.denoiser, path),
            sites[path],
            orders,
            counts,
            level,
        )
        for path in (sites if paths is None else paths)
    }


def _short(error: float) -> float:
    return float(f"{error:.4g}")
