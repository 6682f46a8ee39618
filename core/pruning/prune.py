"""From calibration to bank: order every group's units, then compensate every consumer at every level."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import progress
from ..calibration import Calibration
from ..errors import BankError
from ..groups import DenoiserCost, Group, consumer_sites, find_groups, measure_cost
from ..groups.layer import layer_at
from ..host import Host
from .bank import Bank, Consumer, ConsumerKey, Sharing, fingerprint_of
from .layer_allocation import LayerAllocation, LayerPlan, allocate_layers, replay_for
from .levels import DEFAULT_LEVELS, Widths, check_sparsities, kept_blocks, kept_counts, leave_out, select_groups
from .methods import WIDTH_KINDS, Method, find_method
from .predecessors import Predecessors, check_predecessors, compensate_for_predecessors, trajectories_of
from .solver import Solver

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
    layer_allocation: LayerAllocation | None = None,
    layer_prompts: int = 4,
    predecessors: Predecessors = "dense",
    predecessor_prompts: int = 32,
    hessian_budget: float | None = None,
    multiple: int = 64,
    minimum: float = 0.0,
    shares: Mapping[str, float] | None = None,
    keep_dense: Sequence[str] = (),
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
        layer_allocation: how a level is divided among the groups. `measured`, the default of methods that compensate:
            by how far samples would move if one group alone were pruned, unless one share for all turns out better.
            `uniform`, the default of the others: one share for all.
        layer_prompts: prompts to measure that with, the calibration's first ones (or the host's default prompts).
        predecessors: what consumers are compensated for: inputs from `dense` predecessors, one solution of all levels;
            or from those that each level has itself (`pruned`: asymmetric compensation, which runs every level beside
            the dense denoiser).
        predecessor_prompts: prompts of these runs, the calibration's first ones.
        hessian_budget: GiB that sums of these runs may take; layers that do not fit go into further packages, each of
            which sees what the packages before it have become. None is one package: all see each other as they were.
        multiple: neurons are kept in multiples of this.
        minimum: share of each group's units that stays at every level.
        shares: unit kind -> how much of a level it takes, relative to the other kinds (see `Widths`); levels are then
            divided uniformly.
        keep_dense: groups to leave alone, by name or with wildcards (`blocks.0.*`); levels are shares of the rest.
        damping: added to the diagonal of each Hessian, relative to its mean.
        seed: for methods that draw.
        kept: units kept in each group at each level, for a bank to compare with another; by default what comes to
            `levels` in MACs of a call of the host's size.

    Raises:
        BankError: an argument is out of range, or the method needs a calibration that is missing.
        CalibrationError: the calibration is of another model, or has too few rows for a Hessian's rank.
    """
    recipe = _check(host, calibration, method, order, consumers, damping)
    widths = Widths(multiple, minimum, dict(shares or {}))
    groups = select_groups(find_groups(host.denoiser), _kinds(method, recipe, calibration, kinds))
    groups = leave_out(groups, keep_dense)
    widths.check_kinds({group.kind for group in groups})
    packages = check_predecessors(predecessors, predecessor_prompts, hessian_budget, host, groups, recipe)
    if packages and not order == consumers == "shared":
        raise BankError("`predecessors` 'pruned' goes with `order` and `consumers` 'shared'.")
    measured = _is_measured(layer_allocation, layer_prompts, recipe, groups, kept, widths)
    sparsities = check_sparsities(levels)
    cost = measure_cost(host.denoiser, size=host.input_size)
    started = time.perf_counter()
    solver = Solver(host.denoiser, groups, recipe, calibration, damping, seed)
    orders = _orders(solver, order)
    counts = _uniform_counts(groups, orders, cost, sparsities, widths) if kept is None else dict(kept)
    plan = LayerPlan(counts, {}, {"layer_allocation": "uniform" if kept is None else "given"})
    if measured and len(sparsities) > 1:
        pooled = orders if order == "shared" else _orders(solver, "shared")
        replay = replay_for(host, calibration, layer_prompts)
        plan = allocate_layers(solver, pooled, cost, sparsities, widths, counts, replay)
    shared = order == consumers == "shared"
    solved = plan.consumers if shared and plan.consumers else _solve(solver, orders, plan.counts, order, consumers)
    if packages and calibration is not None:
        trajectories = trajectories_of(host, calibration, predecessor_prompts)
        solved = compensate_for_predecessors(host, solver, orders, plan.counts, solved, packages, trajectories)
    asymmetric = {
        "predecessors": predecessors,
        "predecessor_prompts": predecessor_prompts,
        "hessian_budget": hessian_budget,
        "packages": len(packages),
    }
    record = {
        "method": method,
        "damping": damping,
        "multiple": multiple,
        "minimum": minimum,
        "shares": dict(widths.shares),
        "keep_dense": list(keep_dense),
        "seed": seed,
        **plan.record,
        **({"layer_prompts": layer_prompts} if measured else {}),
        **(asymmetric if packages else {}),
        "seconds": round(time.perf_counter() - started, 2),
        "calibration": dict(calibration.provenance) if calibration is not None and recipe.needs_data else None,
    }
    edges = calibration.edges if calibration is not None and "stage" in (order, consumers) else (1.0, 0.0)
    return _bank(host, groups, cost, sparsities, plan.counts, orders, solved, edges, record)


def _bank(
    host: Host,
    groups: Sequence[Group],
    cost: DenoiserCost,
    sparsities: tuple[float, ...],
    counts: Mapping[str, tuple[int, ...]],
    orders: Mapping[str, Tensor],
    consumers: Mapping[ConsumerKey, Consumer],
    edges: tuple[float, ...],
    record: Mapping[str, Any],
) -> Bank:
    """The bank, with where it comes from: the host's description, and `record`."""
    bank = Bank(
        denoiser=type(host.denoiser).__name__,
        component=host.component,
        groups=tuple(groups),
        sparsities=sparsities,
        kept=counts,
        orders=orders,
        consumers=consumers,
        edges=edges,
        method=record["method"],
        fingerprint=fingerprint_of(host.denoiser),
        consumer_shapes={path: tuple(layer_at(host.denoiser, path).weight.shape) for path in consumer_sites(groups)},
    )
    described = {key: value for key, value in host.describe().items() if key in ("pipeline", "model", "size")}
    realised = [round(share, 6) for share in bank.realised(cost)]
    return replace(bank, provenance={**described, "realised": realised, **record})


def _orders(solver: Solver, order: Sharing) -> dict[str, Tensor]:
    """Units of each group, most important first: shape (size,), or (stages, size) for an order per stage."""
    orders = {}
    for group in progress.track(solver.groups, "ordering units"):
        parts = [solver.order(group, stage) for stage in solver.order_stages(order)]
        orders[group.name] = torch.stack(parts) if order == "stage" else parts[0]
    return orders


def _uniform_counts(
    groups: Sequence[Group],
    orders: Mapping[str, Tensor],
    cost: DenoiserCost,
    sparsities: Sequence[float],
    widths: Widths,
) -> dict[str, tuple[int, ...]]:
    """Kept units with the same share in every group. What whole blocks cost differs, so these follow their order."""
    blocks = [group for group in groups if group.kind == "block"]
    counts = kept_counts(groups, cost, sparsities, widths)
    return counts | {group.name: kept_blocks(orders[group.name], cost, sparsities) for group in blocks}


def _solve(
    solver: Solver,
    orders: Mapping[str, Tensor],
    counts: Mapping[str, tuple[int, ...]],
    order: Sharing,
    consumers: Sharing,
) -> dict[ConsumerKey, Consumer]:
    """Consumers of every level, for all stages together or for each."""
    solved: dict[ConsumerKey, Consumer] = {}
    sites = consumer_sites(solver.groups)
    for path in progress.track(sites, "compensating" if solver.method.compensates else "slicing"):
        for stage in solver.consumer_stages(order, consumers):
            units = {g.name: orders[g.name][stage or 0] if order == "stage" else orders[g.name] for g, _ in sites[path]}
            solved.update(solver.consumers(path, stage, units, counts))
    return solved


def _is_measured(
    allocation: LayerAllocation | None,
    prompts: int,
    recipe: Method,
    groups: Sequence[Group],
    kept: Mapping[str, tuple[int, ...]] | None,
    widths: Widths,
) -> bool:
    """Whether layers are to be measured. BankError if they cannot be, or the arguments are out of range."""
    if allocation not in (None, "measured", "uniform"):
        raise BankError(f"`layer_allocation` must be 'measured' or 'uniform', got {allocation!r}.")
    if prompts < 1:
        raise BankError(f"`layer_prompts` must be at least 1, got {prompts}.")
    blocks = any(group.kind == "block" for group in groups)
    reasons = {
        "whole blocks are one group": blocks,
        "`kept` says what each group keeps": kept is not None,
        "`shares` says what each kind takes": bool(widths.shares),
    }
    fixed = [reason for reason, holds in reasons.items() if holds]
    if allocation == "measured" and fixed:
        raise BankError(f"`layer_allocation` 'measured' divides a level among groups, but {fixed[0]}: leave it out.")
    return not fixed and (allocation == "measured" or (allocation is None and recipe.compensates))


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
