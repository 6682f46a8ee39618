"""How far the last choice of an allocation should go: how good it is, and how many runs it takes, by rules to stop.

    python benchmarks/races.py                    # all three demos, into results/races-<demo>.json

What a table likes best runs on many probes once. Races among these schedules are then drawn again and again from their
errors: what the choice gives on all probes, over what the best of them gives, and how many runs of one probe it took.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common import DEMOS, TARGETS, Subject, write_results
from stageprune.core.planning import ErrorTable, Probes, Request, Sampling, final, measure_error_table
from stageprune.core.planning.costs import Budget
from stageprune.core.planning.fitness import Fitness
from stageprune.core.planning.partitions import divide
from stageprune.core.planning.strategies.measured import probes_of, ranked_choices
from stageprune.core.runtime import applied
from stageprune.core.schedule import Target

STEPS, STAGES, PROBES, MANY, DRAWS = 10, 10, 8, 192, 400
"""Steps, stages, probes of the table, probes that judge, and races drawn for each rule."""

RULES = ((2.0, 4), (2.0, 12), (2.5, 4), (2.5, 12), (None, 4), (None, 12))
"""Standard errors behind at which a candidate is given up, if at all, and rounds at most."""

EACH = (8, 16, 32)
"""Probes of a round."""

FIRST_SEED = 3_000_000


class Mean(Fitness):
    """A mean over probes, whose jackknife has a closed form: it is reckoned many times here."""

    def standard_error(self, statistics: Tensor, beside: Tensor | None = None) -> float:
        """Of the mean, or of the difference of two."""
        values = statistics if beside is None else statistics - beside
        return float(values.std() / len(values) ** 0.5)


MEAN = Mean("latent_mse", lambda made, dense: (made.latents - dense.latents).square().flatten(1).mean(1))


def main() -> None:
    """One demo after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="shares of the dense MACs")
    options = parser.parse_args()
    for name in options.demos:
        found = measure(Subject(name), options.targets)
        facts = {"demo": name, "steps": STEPS, "stages": STAGES, "table_probes": PROBES, "probes": MANY, "draws": DRAWS}
        write_results(f"races-{name}", {**facts, "targets": found})
        print(name, found, flush=True)


@torch.no_grad()
def measure(demo: Subject, targets: Sequence[float]) -> dict[str, Any]:
    """Budget -> errors of the candidates, and what each rule makes of them. One table serves all budgets."""
    bank, guidance = demo.bank(), demo.recipe.guidance
    sampling = Sampling(demo.host, demo.demo.prompts(PROBES), STEPS, guidance, seed=FIRST_SEED - PROBES)
    judges = Sampling(demo.host, demo.demo.prompts(MANY), STEPS, guidance, seed=FIRST_SEED)
    with applied(demo.host, bank) as pruner:
        stages = divide(f"equal-steps:{STAGES}", sampling)
        budgets = {str(target): Budget.of(Target.parse(target), sampling, pruner) for target in targets}
        requests = {target: Request(sampling, bank, each, stages, pruner) for target, each in budgets.items()}
        first = next(iter(requests.values()))
        table, probes = measure_error_table(probes_of(first), bank.sparsities, STEPS), probes_of(first, judges)
        return {target: judged(request, table, probes) for target, request in requests.items()}


def judged(request: Request, table: ErrorTable, probes: Probes) -> dict[str, Any]:
    """What the table likes best under a budget, and which of it each rule chooses."""
    chosen = [*ranked_choices(request, table).values(), *ranked_choices(request, table, share=1.0).values()]
    levels = list(dict.fromkeys(chosen))
    errors = errors_of(probes, levels)
    means = errors.mean(1)
    rules = [drawn(errors, clear, rounds, each) for each in EACH for clear, rounds in RULES]
    return {"levels": levels, "errors": means.tolist(), "any": float(means.mean() / means.min()), "rules": rules}


def errors_of(probes: Probes, levels: Sequence[tuple[float, ...]]) -> Tensor:
    """Of single images, shape (schedules, probes), float64."""
    return torch.stack([probes.errors(each) for each in levels]).double()


def drawn(errors: Tensor, clear: float | None, rounds: int, each: int) -> dict[str, Any]:
    """Races by one rule: mean error of the choice over that of the best, and mean number of runs."""
    draws, means = torch.Generator().manual_seed(0), errors.mean(1)
    choices, runs, usual = [], 0, final.CLEAR
    final.CLEAR = math.inf if clear is None else clear
    try:
        for _ in range(DRAWS):
            picked = torch.randint(errors.shape[1], (rounds, each), generator=draws)
            ran: list[int] = []

            def statistics_of(numbers: Sequence[int], index: int, picked: Tensor = picked, ran: list[int] = ran) -> Any:
                ran.extend(numbers)
                return [errors[number, picked[index], None] for number in numbers]

            ranked = final.race(len(errors), statistics_of, MEAN, rounds)
            choices.append(ranked[0][0])
            runs += len(ran) * each
    finally:
        final.CLEAR = usual
    ratio = float(means[choices].mean() / means.min())
    return {"clear": clear, "rounds": rounds, "each": each, "error": ratio, "runs": runs / DRAWS}


if __name__ == "__main__":
    main()
