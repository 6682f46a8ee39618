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

from common import DEMOS, Subject, write_results
from stageprune.core.planning import Probes, measure_error_table
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule

STEPS, STAGES, SCHEDULES, PROBES = 10, 5, 60, 16


def main() -> None:
    """One demo after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        found = predict(Subject(name))
        write_results(f"prediction-{name}", {"demo": name, **found})
        told = {model: f"{each['rank']:.3f}" for model, each in found["models"].items()}
        print(name, "rank correlation over", SCHEDULES, "schedules:", told, flush=True)


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
        chosen = [tuple(draws.choice(bank.sparsities) for _ in range(STAGES)) for _ in range(SCHEDULES)]
        measured = torch.tensor([float(others.errors(levels).mean()) for levels in chosen])
    squares = torch.tensor([table.predict(levels) for levels in chosen])
    rows = [
        [row[table.sparsities.index(level)] for row, level in zip(table.errors, levels, strict=True)]
        for levels in chosen
    ]
    lengths = torch.tensor([sum(error**0.5 for error in row) ** 2 for row in rows])
    return {
        "stages": STAGES,
        "steps": STEPS,
        "probes": PROBES,
        "schedules": [list(levels) for levels in chosen],
        "measured": measured.tolist(),
        "models": {"squares": _judged(squares, measured), "lengths": _judged(lengths, measured)},
    }


def _judged(predicted: Tensor, measured: Tensor) -> dict[str, Any]:
    ratios = (measured / predicted).sort().values
    return {
        "predicted": predicted.tolist(),
        "rank": float(spearman_corrcoef(predicted, measured)),
        "measured_over_predicted": [float(ratios[int(share * (len(ratios) - 1))]) for share in (0.1, 0.5, 0.9)],
    }


if __name__ == "__main__":
    main()
