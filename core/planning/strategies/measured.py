"""Allocation by measurement: error table, exact dynamic programming, real runs of the best few on held-out seeds."""

from __future__ import annotations

import math

from torch import Tensor

from ... import progress
from ...errors import AllocationError
from ..allocation import Allocation, Candidate, Request, register_strategy
from ..best_levels import best_levels
from ..final import ROUNDS, race
from ..fitness import fitness_of
from ..probes import Probes
from ..sampling import Sampling
from ..table import ErrorTable, check_table, measure_error_table


@register_strategy("measured")
def measured(request: Request) -> Allocation:
    """Error table, exact choice under the budget, then real runs of the best few on held-out seeds."""
    prompts = request.sampling.prompts
    if len(prompts) < 4:
        raise AllocationError(f"strategy 'measured' needs at least 4 probe prompts, got {len(prompts)}.")
    half = len(prompts) // 2
    table = _table(request, half)
    choices = _choices(request, table)
    candidates = _race(request, table, choices, request.sampling.part(half, len(prompts)))
    return request.allocation("measured", candidates[0].levels, table, candidates)


def _choices(request: Request, table: ErrorTable) -> dict[str, tuple[float, ...]]:
    """Level choices worth a real run.

    Stage errors may add up as squares (independent) or as lengths (all pushing one way); the truth lies between, so the
    best of both models are tried, beside one level throughout.
    """
    costs = [[count * request.budget.costs[sparsity] for sparsity in table.sparsities] for count in request.calls]
    finite = [[math.inf if math.isnan(error) else error for error in row] for row in table.errors]
    models = {"squares": finite, "lengths": [[error**0.5 for error in row] for row in finite]}
    uniform = request.budget.uniform_level()
    choices = {"uniform": tuple([uniform] * len(request.stages.stages))}
    for model, errors in models.items():
        for rank, picked in enumerate(best_levels(costs, errors, request.limit, count=2)):
            levels = tuple(table.sparsities[level] for level in picked)
            if levels not in choices.values():
                choices[f"{model} {rank + 1}"] = levels
    return choices


def _race(
    request: Request, table: ErrorTable, choices: dict[str, tuple[float, ...]], held_out: Sampling
) -> tuple[Candidate, ...]:
    """The choices, the best first, as they run on held-out probes, and on fresh ones until one is clearly ahead.

    Raises:
        AllocationError: none of them gives finite samples.
    """
    levels, rounds, first = [*choices.values()], dict[int, Probes](), dict[int, float]()
    with progress.bar(len(choices) * ROUNDS, "running schedules", "schedule") as bar:

        def errors_of(number: int, index: int) -> Tensor:
            if index not in rounds:
                rounds.clear()  # their cached states
                rounds[index] = _probes(request, held_out.fresh(index - 1) if index else held_out)
            errors = rounds[index].errors(levels[number])
            first.setdefault(number, float(errors.mean()))
            bar.update(1)
            return errors[:, None]

        ranked = race(len(choices), errors_of, fitness_of("latent_mse"))
    if math.isinf(ranked[0][1]):
        raise AllocationError(
            "no schedule's samples are finite: the levels of this bank break the model. Prune anew, with lower "
            "`levels` or a pipeline in float32 or bfloat16."
        )
    names = [*choices]
    return tuple(
        Candidate(
            names[number],
            levels[number],
            table.predict(levels[number]),
            first[number],
            final=None if value == first[number] else value,
        )
        for number, value in ranked
    )


def _table(request: Request, half: int) -> ErrorTable:
    """The request's table if it fits, or a new one."""
    if request.table is None:
        return measure_error_table(
            _probes(request, request.sampling.part(0, half)), request.bank.sparsities, request.sampling.steps
        )
    check_table(request.table, request.stages, request.bank, request.sampling)
    return request.table


def _probes(request: Request, sampling: Sampling) -> Probes:
    return Probes(
        sampling.host,
        request.pruner,
        request.stages,
        sampling.prompts,
        range(sampling.seed, sampling.seed + len(sampling.prompts)),
        steps=sampling.steps,
        guidance=sampling.guidance,
        batch_size=sampling.batch_size,
    )
