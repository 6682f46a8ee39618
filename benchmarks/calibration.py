"""What calibrating costs beside just running the pipeline on the same prompts, without decoding.

python benchmarks/calibration.py              # all three demos, into results/calibration-<demo>.json
python benchmarks/calibration.py sdxl-shapes --only consumers "consumers, all tokens"
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import stageprune
from common import DEMOS, RESULTS, Subject, write_results
from provenance import stamped
from stageprune.core.host import sample

STEPS, PROMPTS, ROUNDS = 20, 60, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "consumers": {},
    "consumers, all tokens": {"tokens": 1.0},
    "producers too": {"layers": "all"},
    "five stages": {"stages": 5},
}


def main() -> None:
    """Ratios of medians, rounds interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], help="what is summed")
    options = parser.parse_args()
    for name in options.demos:
        facts = {"demo": name, "prompts": PROMPTS, "steps": STEPS, "rounds": ROUNDS}
        rows = compare(Subject(name), options.only)
        path = RESULTS / f"calibration-{name}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        same = all(done.get(key) == value for key, value in facts.items())
        found = {**done["rows"], **rows} if same else rows  # those that were not asked for stay
        write_results(
            f"calibration-{name}", {**facts, "rows": {each: found[each] for each in VARIANTS if each in found}}
        )
        for variant, row in rows.items():
            print(f"{name}: {variant} {row['seconds']:.2f} s, {row['ratio']:.2f} times just running", flush=True)


def compare(demo: Subject, variants: Sequence[str]) -> dict[str, Any]:
    """Seconds of each calibration, and of the plain run between them."""
    prompts, guidance = demo.demo.prompts(PROMPTS), demo.recipe.guidance

    def plain() -> None:
        sample(demo.host, demo.host.encode(prompts), range(PROMPTS), STEPS, guidance, 16)

    def calibrating(options: dict[str, Any]) -> Callable[[], object]:
        given = {"steps": STEPS, "guidance": guidance, "kinds": demo.recipe.kinds, **options}
        return lambda: stageprune.calibrate(demo.pipe, prompts, **given)

    runs: dict[str, Callable[[], object]] = {"just running": plain}
    runs |= {name: calibrating(VARIANTS[name]) for name in variants}
    times: dict[str, list[float]] = {name: [] for name in runs}
    plain()  # the first is slower
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    base = seconds.pop("just running")
    return {
        name: stamped({"seconds": value, "plain_seconds": base, "ratio": value / base}, None)
        for name, value in seconds.items()
    }


if __name__ == "__main__":
    main()
