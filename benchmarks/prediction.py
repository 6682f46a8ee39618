"""How well an error table tells the errors of whole schedules: random ones, run on prompts and seeds of their own.

python benchmarks/prediction.py               # all three demos, into results/prediction-<demo>.json
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from common import DEMOS, TARGETS, Subject, write_results
from stageprune.core.planning import Probes, measure_error_table
from stageprune.core.planning.search.space import Space
from stageprune.core.runtime import StagePruner, applied
from stageprune.core.schedule import StageSchedule, executed_calls

STEPS, STAGES, EACH, PROBES = 10, 5, 20, 16
"""Sampling steps, stages, schedules of each budget, and probes."""


def main() -> None:
    """One demo after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        found = predict(Subject(name))
        write_results(f"prediction-{name}", {"demo": name, **found})
        told = {model: (each["rank"], each["within"]) for model, each in found["models"].items()}
        print(
            name,
            f"rank correlation over {EACH} schedules of each budget:",
            told,
            "by MACs",
            found["by_macs"],
            flush=True,
        )


@torch.no_grad()
def predict(demo: Subject) -> dict[str, Any]:
    """Predicted and measured error of random schedules."""
    bank = demo.bank()
    stages, draws = StageSchedule.from_levels([0.0] * STAGES), random.Random(0)
    prompts = demo.demo.prompts(2 * PROBES)
    options: dict[str, Any] = {"steps": STEPS, "guidance": demo.recipe.guidance}
    with applied(demo.host, bank) as pruner:
        first = Probes(demo.host, pruner, stages, prompts[:PROBES], range(30_000, 30_000 + PROBES), **options)
        table = measure_error_table(first, bank.sparsities, STEPS)
        others = Probes(demo.host, pruner, stages, prompts[PROBES:], range(31_000, 31_000 + PROBES), **options)
        spaces = [space_of(demo, pruner, stages, target) for target in TARGETS]
        genomes = [(space, space.draw(draws)) for space in spaces for _ in range(EACH)]
        chosen = [space.levels(genome) for space, genome in genomes]
        macs = torch.tensor([float(space.cost(genome)) for space, genome in genomes])
        measured = torch.tensor([float(others.errors(levels).mean()) for levels in chosen])
    vectors = torch.tensor([table.predict(levels) for levels in chosen])
    rows = [
        [row[table.sparsities.index(level)] for row, level in zip(table.errors, levels, strict=True)]
        for levels in chosen
    ]
    squares = torch.tensor([sum(row) for row in rows])
    lengths = torch.tensor([sum(error**0.5 for error in row) ** 2 for row in rows])
    models = {"squares": squares, "lengths": lengths, "vectors": vectors}
    return {
        "stages": STAGES,
        "steps": STEPS,
        "probes": PROBES,
        "schedules": [list(levels) for levels in chosen],
        "measured": measured.tolist(),
        "models": {name: _judged(predicted, measured) for name, predicted in models.items()},
        "by_macs": float(spearman_corrcoef(-macs, measured)),
    }


def space_of(demo: Subject, pruner: StagePruner, stages: StageSchedule, target: float) -> Space:
    """Schedules that fill a budget."""
    macs = pruner.bank.macs(pruner.cost)
    calls, costs = executed_calls(stages, demo.host.taus(STEPS)), tuple(macs[level] for level in pruner.bank.sparsities)
    return Space(pruner.bank.sparsities, costs, calls, int(target * sum(calls) * costs[0]))


def _judged(predicted: Tensor, measured: Tensor) -> dict[str, Any]:
    ratios = (measured / predicted).sort().values
    return {
        "predicted": predicted.tolist(),
        "rank": float(spearman_corrcoef(predicted, measured)),
        "within": [
            float(spearman_corrcoef(*pair)) for pair in zip(predicted.split(EACH), measured.split(EACH), strict=True)
        ],
        "measured_over_predicted": [float(ratios[int(share * (len(ratios) - 1))]) for share in (0.1, 0.5, 0.9)],
    }


if __name__ == "__main__":
    main()
