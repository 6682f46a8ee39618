"""Allocation by measurement: error table, exact dynamic programming, real runs of the best few on held-out seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ... import progress
from ...errors import AllocationError
from ..allocation import Allocation, Candidate, Request, register_strategy
from ..best_levels import best_levels
from ..final import race, rounds_for
from ..fitness import fitness_of
from ..interactions import best_together
from ..probes import Probes
from ..sampling import Sampling
from ..table import ErrorTable, check_table, measure_error_table

INTERACTION = 0.5
"""Share of what the table says about two stages that choices are made by: less than all of it chooses better for other
probes (`benchmarks/interactions.py`).
"""

BEGIN = 16
"""Best choices by the exact models that descents begin at."""


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
    """Level choices worth a real run: those of `ranked_choices`, beside one level throughout."""
    uniform = request.budget.uniform_level()
    choices = {"uniform": (uniform,) * len(request.stages.stages)}
    for name, levels in ranked_choices(request, table).items():
        if levels not in choices.values():
            choices[name] = levels
    return choices


def ranked_choices(
    request: Request, table: ErrorTable, share: float = INTERACTION, count: int = 2
) -> dict[str, tuple[float, ...]]:
    """The best choices by each of three models of how the errors of stages add up.

    As squares (independent), exactly; as vectors (see `interactions`), by descents from the best of the two others; as
    lengths (all pushing one way), exactly. That of vectors tells nearly exactly what the very probes of the table do;
    for others half of what it says about two stages makes the best choices.

    Args:
        request: the budget, and calls of each stage.
        table: of these stages.
        share: of what it says about two stages, for vectors.
        count: of choices by each model.
    """
    costs = [[calls * request.budget.costs[sparsity] for sparsity in table.sparsities] for calls in request.calls]
    finite = [[math.inf if math.isnan(error) else error for error in row] for row in table.errors]
    squares = best_levels(costs, finite, request.limit, BEGIN)
    lengths = best_levels(costs, [[error**0.5 for error in row] for row in finite], request.limit, BEGIN)
    vectors = best_together(costs, table.interactions(share), request.limit, (*squares, *lengths), count)
    models = {"vectors": vectors, "squares": squares, "lengths": lengths}
    return {
        f"{model} {rank}": tuple(table.sparsities[level] for level in picked)
        for model, best in models.items()
        for rank, picked in enumerate(best[:count], 1)
    }


def _race(
    request: Request, table: ErrorTable, choices: dict[str, tuple[float, ...]], held_out: Sampling
) -> tuple[Candidate, ...]:
    """The choices, the best first, as they run on held-out probes, and on fresh ones until one is clearly ahead.

    Raises:
        AllocationError: none of them gives finite samples.
    """
    levels, first = [*choices.values()], dict[int, float]()
    rounds = rounds_for(len(held_out.prompts))
    with progress.bar(len(choices) * rounds, "running schedules", "schedule") as bar:

        def errors_of(numbers: Sequence[int], index: int) -> list[Tensor]:
            probes = probes_of(request, held_out.fresh(index - 1) if index else held_out)
            found = []
            for number in numbers:
                errors = probes.errors(levels[number])
                first.setdefault(number, float(errors.mean()))
                found.append(errors[:, None])
                bar.update(1)
            return found

        ranked = race(len(choices), errors_of, fitness_of("latent_mse"), rounds)
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
            probes_of(request, request.sampling.part(0, half)), request.bank.sparsities, request.sampling.steps
        )
    check_table(request.table, request.stages, request.bank, request.sampling)
    return request.table


def probes_of(request: Request, sampling: Sampling | None = None) -> Probes:
    """Dense trajectories of the request's prompts and seeds, or of others."""
    sampling = sampling or request.sampling
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
