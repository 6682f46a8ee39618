"""One share in every layer, or what the samples can best spare: the same MACs, at every stage alike.

python benchmarks/layers.py                   # all three demos, into results/layers-<demo>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from common import DEMOS, RESULTS, TARGETS, Subject, mean_and_spread, write_results
from stageprune.core.groups import find_groups, measure_cost
from stageprune.core.pruning import Bank, prune
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule

STEPS, COUNT, SETS = 20, 20, 3
FIRST_SEED = 300_000
ALLOCATIONS = ("uniform", "measured")


def main() -> None:
    """Both allocations on each demo, by OBS and by magnitude; rows that are there already are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        path = RESULTS / f"layers-{name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        demo = Subject(name)
        facts = {"demo": name, "images": COUNT, "sets": SETS, "steps": STEPS, "targets": TARGETS}
        for row in compare(demo, rows):
            rows.append(row)
            write_results(path.stem, {**facts, "rows": rows})
            print(name, {key: value for key, value in row.items() if key != "kept"}, flush=True)


def compare(demo: Subject, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Errors of OBS with both allocations at every target; then of magnitude at the very same widths."""
    seeds = [list(range(FIRST_SEED + i * COUNT, FIRST_SEED + (i + 1) * COUNT)) for i in range(SETS)]
    dense = [demo.sample(part, STEPS) for part in seeds]
    done = {(row["method"], row["allocation"], row["target"]): row for row in known}
    calibration = (
        None if all(("obs", each, t) in done for each in ALLOCATIONS for t in TARGETS) else demo.calibrate(100)
    )
    for allocation in ALLOCATIONS if calibration is not None else ():
        bank = demo.prune(calibration, layer_allocation=allocation)
        for target in TARGETS:
            level = demo.allocate(bank, target, strategy="uniform", steps=STEPS).schedule.levels[0]
            row = {"method": "obs", "allocation": allocation, "target": target}
            row |= measure(demo, bank, level, seeds, dense)
            done["obs", allocation, target] = row
            yield row
    sizes = {group.name: group.size for group in find_groups(demo.host.denoiser)}
    for allocation in ALLOCATIONS:
        for target in TARGETS:
            if ("magnitude", allocation, target) in done:
                continue
            kept = {name: (sizes[name], count) for name, count in done["obs", allocation, target]["kept"].items()}
            bank = prune(demo.host, method="magnitude", kinds=demo.recipe.kinds, levels=[0.5], kept=kept)
            row = {"method": "magnitude", "allocation": allocation, "target": target}
            yield row | measure(demo, bank, 0.5, seeds, dense)


def measure(demo: Subject, bank: Bank, level: float, seeds: list[list[int]], dense: list[Any]) -> dict[str, Any]:
    """One level in all stages."""
    errors, scores = [], []
    with applied(demo.host, bank) as pruner:
        pruner.schedule = StageSchedule.uniform(level)
        for part, reference in zip(seeds, dense, strict=True):
            latents = demo.sample(part, STEPS)
            errors.append(float((latents - reference).square().mean()))
            images = demo.images(latents)
            prompts = demo.prompts(len(part))
            hits = demo.judge.hits(images, demo.judge.wanted(prompts, demo.host.encode(prompts)) or [])
            scores.append(float(hits.double().mean()))
    cost = measure_cost(demo.host.denoiser, size=demo.host.input_size)
    return {
        "macs": bank.macs(cost)[bank.sparsities[bank.level_of(level)]] / cost.dense,
        "latent_mse": mean_and_spread(errors),
        "accuracy": mean_and_spread(scores),
        "chosen": bank.provenance["layer_allocation"],
        "prune_seconds": bank.provenance["seconds"],
        "kept": {name: counts[bank.level_of(level)] for name, counts in bank.kept.items()},
    }


if __name__ == "__main__":
    main()
