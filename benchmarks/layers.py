"""One share in every layer, or what the denoiser's output can best spare: the same MACs, at every stage alike.

python benchmarks/layers.py                   # all three demos, into results/layers-<demo>.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from common import DEMOS, TARGETS, Subject, mean_and_spread, write_results
from stageprune.core.pruning import Bank
from stageprune.core.runtime import applied

STEPS, COUNT, SETS = 20, 20, 3
FIRST_SEED = 300_000
ALLOCATIONS = ("uniform", "measured")


def main() -> None:
    """Both allocations on each demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        rows = list(compare(Subject(name)))
        facts = {"demo": name, "images": COUNT, "sets": SETS, "steps": STEPS, "targets": TARGETS}
        write_results(f"layers-{name}", {**facts, "rows": rows})


def compare(demo: Subject) -> Iterator[dict[str, Any]]:
    """Errors of both at every target, and what each level keeps."""
    calibration = demo.calibrate(100)
    seeds = [list(range(FIRST_SEED + i * COUNT, FIRST_SEED + (i + 1) * COUNT)) for i in range(SETS)]
    dense = [demo.sample(part, STEPS) for part in seeds]
    for allocation in ALLOCATIONS:
        bank = demo.prune(calibration, layer_allocation=allocation)
        for target in TARGETS:
            row = {"allocation": allocation, "target": target, **measure(demo, bank, target, seeds, dense)}
            print(demo.name, {key: value for key, value in row.items() if key != "kept"}, flush=True)
            yield row


def measure(demo: Subject, bank: Bank, target: float, seeds: list[list[int]], dense: list[Any]) -> dict[str, Any]:
    """One level in all stages."""
    uniform = demo.allocate(bank, target, strategy="uniform", steps=STEPS)
    level = bank.level_of(uniform.schedule.levels[0])
    errors, scores = [], []
    with applied(demo.host, bank) as pruner:
        pruner.schedule = uniform.schedule
        for part, reference in zip(seeds, dense, strict=True):
            latents = demo.sample(part, STEPS)
            errors.append(float((latents - reference).square().mean()))
            images = demo.images(latents)
            prompts = demo.prompts(len(part))
            hits = demo.judge.hits(images, demo.judge.wanted(prompts, demo.host.encode(prompts)) or [])
            scores.append(float(hits.double().mean()))
    return {
        "macs": uniform.executed.share,
        "latent_mse": mean_and_spread(errors),
        "accuracy": mean_and_spread(scores),
        "chosen": bank.provenance["layer_allocation"],
        "prune_seconds": bank.provenance["seconds"],
        "kept": {name: counts[level] for name, counts in bank.kept.items()},
    }


if __name__ == "__main__":
    main()
