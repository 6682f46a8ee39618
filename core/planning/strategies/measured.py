"""Allocation by measurement: error table, exact dynamic programming, real runs of the best few on held-out seeds."""

from __future__ import annotations

import math

from ...errors import AllocationError
from ..allocation import Allocation, Candidate, Request, register_strategy
from ..best_levels import best_levels
from ..probes import Probes
from ..table import ErrorTable, check_table, measure_error_table


@register_strategy("measured")
def measured(request: Request) -> Allocation:
    """Error table, exact choice under the budget, then real runs of the best few on held-out seeds."""
    prompts = request.sampling.prompts
    if len(prompts) < 4:
        raise AllocationError(f"strategy 'measured' needs at least 4 probe prompts, got {len(prompts)}.")
    half = len(prompts) // 2
    uniform = request.budget.uniform_level()
    table = _table(request, half)
    choices = _choices(request, table)
    choices.setdefault("uniform", tuple([uniform] * len(request.stages.stages)))
    held_out = _probes(request, half, len(prompts))
    candidates = sorted(
        (
            Candidate(name, levels, table.predict(levels), float(held_out.errors(levels).mean()))
            for name, levels in choices.items()
        ),
        key=lambda candidate: math.inf if math.isnan(candidate.measured) else candidate.measured,
    )
    return request.allocation("measured", candidates[0].levels, table, tuple(candidates))


def _choices(request: Request, table: ErrorTable) -> dict[str, tuple[float, ...]]:
    """Level choices worth a real run.

    Stage errors may add up as squares (independent) or as lengths (all pushing one way); the truth lies between, so the
    best of both models are tried.
    """
    costs = [[count * request.budget.costs[sparsity] for sparsity in table.sparsities] for count in request.calls]
    finite = [[math.inf if math.isnan(error) else error for error in row] for row in table.errors]
    models = {"squares": finite, "lengths": [[error**0.5 for error in row] for row in finite]}
    choices: dict[str, tuple[float, ...]] = {}
    for model, errors in models.items():
        for rank, picked in enumerate(best_levels(costs, errors, request.limit, count=2)):
            levels = tuple(table.sparsities[level] for level in picked)
            if levels not in choices.values():
                choices[f"{model} {rank + 1}"] = levels
    return choices


def _table(request: Request, half: int) -> ErrorTable:
    """The request's table if it fits, or a new one."""
    if request.table is None:
        return measure_error_table(_probes(request, 0, half), request.bank.sparsities, request.sampling.steps)
    check_table(request.table, request.stages, request.bank, request.sampling)
    return request.table


def _probes(request: Request, begin: int, end: int) -> Probes:
    sampling = request.sampling
    return Probes(
        sampling.host,
        request.pruner,
        request.stages,
        sampling.prompts[begin:end],
        list(range(sampling.seed + begin, sampling.seed + end)),
        steps=sampling.steps,
        guidance=sampling.guidance,
        batch_size=sampling.batch_size,
    )
