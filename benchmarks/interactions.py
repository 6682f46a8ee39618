"""How much of what an error table says about two stages should choose levels: those chosen by some probes, on others.

    python benchmarks/interactions.py             # all three demos, into results/interactions-<demo>.json

A table for each of several sets of probes; each chooses by all, half or nothing of its products of different stages.
What a choice gives on the other sets is what their tables say, whole: `prediction.py` says how well these tell it.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from common import DEMOS, TARGETS, Subject, write_results
from stageprune.core.planning import ErrorTable, Probes, Request, Sampling, measure_error_table
from stageprune.core.planning.costs import Budget
from stageprune.core.planning.partitions import divide
from stageprune.core.planning.strategies.measured import ranked_choices
from stageprune.core.runtime import StagePruner, applied
from stageprune.core.schedule import Target

STEPS, STAGES, PROBES, SETS = 10, 10, 16, 8
SHARES = (0.5, 1.0)
FIRST_SEED = 50_000


def main() -> None:
    """One demo after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        found = measure(Subject(name))
        facts = {"demo": name, "steps": STEPS, "stages": STAGES, "probes": PROBES, "sets": SETS}
        write_results(f"interactions-{name}", {**facts, **found})
        print(name, "error over that of the choice by none of it:", found["targets"], flush=True)


@torch.no_grad()
def measure(demo: Subject) -> dict[str, Any]:
    """Per budget and share, the error of choices on other probes, over that of choices by the stages' errors alone."""
    bank, prompts = demo.bank(), demo.demo.prompts(PROBES * SETS)
    sampling = Sampling(demo.host, prompts, STEPS, demo.recipe.guidance, seed=FIRST_SEED)
    stages = divide(f"equal-steps:{STAGES}", sampling)
    with applied(demo.host, bank) as pruner:
        parts = [sampling.part(begin, begin + PROBES) for begin in range(0, PROBES * SETS, PROBES)]
        tables = [table_of(part, pruner, stages) for part in parts]
        budgets = {target: Budget.of(Target.parse(target), sampling, pruner) for target in TARGETS}
        requests = {target: Request(sampling, bank, each, stages, pruner) for target, each in budgets.items()}
        return {"targets": {str(target): chosen(request, tables) for target, request in requests.items()}}


def table_of(sampling: Sampling, pruner: StagePruner, stages: Any) -> ErrorTable:
    """Of one set of probes."""
    seeds = range(sampling.seed, sampling.seed + PROBES)
    options: dict[str, Any] = {"steps": STEPS, "guidance": sampling.guidance}
    probes = Probes(sampling.host, pruner, stages, sampling.prompts, seeds, **options)
    return measure_error_table(probes, pruner.bank.sparsities, STEPS)


def chosen(request: Request, tables: list[ErrorTable]) -> dict[str, Any]:
    """Ratios of a budget, one a set, and their geometric mean."""
    found = {}
    for share in SHARES:
        ratios = []
        for table in tables:
            others = [each for each in tables if each is not table]
            choices = ranked_choices(request, table, share, count=1)
            vectors, squares = (
                sum(each.predict(choices[f"{model} 1"]) for each in others) for model in ("vectors", "squares")
            )
            ratios.append(vectors / squares)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found[str(share)] = {"ratios": ratios, "mean": mean}
    return found


if __name__ == "__main__":
    main()
