"""A schedule for a measured speed-up: does the whole image run as fast as was asked for?

python benchmarks/latency.py                  # all three demos, into results/latency-<demo>.json
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from common import DEMOS, Subject, write_results
from stageprune import Bundle
from stageprune.core.evaluation.benchmark_image import benchmark_image

SPEEDUPS, STEPS, ROUNDS = (1.2, 1.3), 20, 9


def main() -> None:
    """One demo after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    for name in parser.parse_args().demos:
        rows = measure(Subject(name))
        load = os.getloadavg()[0]
        write_results(f"latency-{name}", {"demo": name, "steps": STEPS, "rounds": ROUNDS, "load": load, "rows": rows})
        for row in rows:
            print(
                f"{name}: asked for {row['asked']}, an image runs {row['image']['speedup']:.3f} times as fast",
                flush=True,
            )


def measure(demo: Subject) -> list[dict[str, Any]]:
    """Schedules by measured time, then whole images, dense and pruned in turn."""
    bank = demo.bank()
    rows = []
    for asked in SPEEDUPS:
        prompts = demo.demo.prompts(demo.recipe.probes)
        found = demo.allocate(bank, f"speedup:{asked}", steps=STEPS, prompts=prompts)
        image = benchmark_image(
            demo.host,
            Bundle(bank, found.schedule).trimmed(),
            prompts[:1],
            steps=STEPS,
            guidance=demo.recipe.guidance,
            rounds=ROUNDS,
        )
        rows.append({"asked": asked, "levels": found.schedule.levels, "macs": found.executed.share, **asdict(image)})
    return rows


if __name__ == "__main__":
    main()
