"""What the aim does to the schedule: searched for latent error, for SSIM and for Frechet distance, each judged by all.

python benchmarks/fitness.py                  # all three demos, into results/fitness-<demo>.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import stageprune
from common import DEMOS, Subject, write_results
from stageprune.core.evaluation.metrics import frechet, mse, ssim
from stageprune.core.planning import SearchSettings
from stageprune.core.runtime import applied

FITNESS = ("latent_mse", "image_ssim", "frechet")
TARGET, STEPS, STAGES, PROBES, COUNT = 0.6, 10, 5, 64, 120
FIRST_SEED = 800_000


def main() -> None:
    """One demo after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--generations", type=int, default=12, help="at most, of each search")
    options = parser.parse_args()
    for name in options.demos:
        demo = Subject(name)
        rows = compare(demo, options.generations)
        facts = {"target": TARGET, "steps": STEPS, "probes": PROBES, "count": COUNT, "generations": options.generations}
        write_results(f"fitness-{name}", {"demo": name, **facts, "rows": rows})
        for aim, row in rows.items():
            print(name, aim, row, flush=True)


@torch.no_grad()
def compare(demo: Subject, generations: int) -> dict[str, Any]:
    """Aim -> its schedule and all metrics, on images that no search has seen."""
    bank = demo.bank()
    seeds = range(FIRST_SEED, FIRST_SEED + COUNT)
    dense = demo.sample(seeds, STEPS)
    pictures = demo.images(dense)
    rows: dict[str, Any] = {}
    for aim in FITNESS:
        result = stageprune.search(
            demo.pipe,
            bank,
            target=TARGET,
            fitness=aim,
            judge=demo.judge,
            settings=SearchSettings(generations=generations, init="uniform"),
            guidance=demo.recipe.guidance,
            steps=STEPS,
            stages=STAGES,
            prompts=demo.prompts(2 * PROBES, begin=COUNT),  # of the law of the judge's real images
            seed=40_000,
        )
        with applied(demo.host, bank) as pruner:
            pruner.schedule = result.schedule
            latents = demo.sample(seeds, STEPS)
        images = demo.images(latents)
        prompts = demo.prompts(COUNT)
        wanted = demo.judge.wanted(prompts, demo.host.encode(prompts)) or []
        rows[aim] = {
            "levels": result.schedule.levels,
            "macs": result.executed.share,
            "latent_mse": float(mse(latents, dense).mean()),
            "ssim": float(ssim(images, pictures).mean()),
            "frechet": frechet(demo.judge, demo.judge.features(images).double()),
            "accuracy": float(demo.judge.hits(images, wanted).double().mean()),
            "denoiser_steps": result.cost.total,
        }
    return rows


if __name__ == "__main__":
    main()
