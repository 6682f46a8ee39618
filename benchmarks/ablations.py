"""One lever of the engine at a time, all others as by default: what each does to the error.

    python benchmarks/ablations.py                # all three demos
    python benchmarks/ablations.py dit-digits --only damping

The same level at all steps, three calibrations with seeds of their own, each judged on images of its own; a variant is
compared with the default seed by seed. All tokens are summed unless the row says otherwise. Writes
results/ablations-<demo>.json after every row, from which it resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import stageprune
from common import DEMOS, RESULTS, Subject, mean_and_spread, write_results
from levers import corrected_output, guided_rows, rounded_rows, unbiased
from provenance import needed, stamped
from stageprune.core.calibration import Calibration
from stageprune.core.errors import CalibrationError
from stageprune.core.groups import find_groups, measure_cost
from stageprune.core.pruning import Bank
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule

TARGETS = (0.67, 0.5)
COUNT, SETS, PROMPTS = 20, 3, 60
STEPS = {"dit-digits": 20, "sdxl-shapes": 8, "flux-shapes": 8}
"""Denoising steps of calibration and images: few where a call is dear."""

STAGES = {20: 5, 8: 4}
"""Steps -> stages: every demo has a step in each."""

FIRST_SEED = 500_000


@dataclass(frozen=True)
class Variant:
    """How one row differs from the default.

    Args:
        calibrate: options of `calibrate`.
        prune: options of `prune`.
        recording: entered while calibrating, given the demo's name.
        change: what is done to the calibration.
        running: entered around the images, given the demo, the bank and the level.
        demos: where it makes sense.
        apart: calibrate with stages kept apart, as many as `STAGES` says.
    """

    calibrate: dict[str, Any] = field(default_factory=dict)
    prune: dict[str, Any] = field(default_factory=dict)
    recording: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
    change: Callable[[Calibration], Calibration] = lambda calibration: calibration
    running: Callable[..., AbstractContextManager[None]] = lambda *_: nullcontext()
    demos: tuple[str, ...] = DEMOS
    apart: bool = False


GUIDED = ("dit-digits", "sdxl-shapes")
JOINT = ("flux-shapes",)
VARIANTS: dict[str, dict[str, Variant]] = {
    "default": {"default": Variant()},
    "layers": {
        "the same share in every layer": Variant(prune={"layer_allocation": "uniform"}),
        "measured with 1 prompt": Variant(prune={"layer_prompts": 1}),
        "measured with 16 prompts": Variant(prune={"layer_prompts": 16}),
    },
    "sharing": {
        "consumers per stage": Variant(prune={"consumers": "stage"}, apart=True),
        "order and consumers per stage": Variant(prune={"order": "stage"}, apart=True),
    },
    "predecessors": {"pruned, in one package": Variant(prune={"predecessors": "pruned"})},
    "bias": {"no bias column": Variant(change=unbiased)},
    "damping": {f"{damping:g}": Variant(prune={"damping": damping}) for damping in (0.0001, 0.001, 0.1)},
    "alpha": {
        name: Variant({"alpha": name})
        for name in ("log-decrease", "log-increase", "linear-decrease", "linear-increase")
    },
    "prompts": {f"{count}": Variant({"count": count}) for count in (8, 16, 32, 128, 256, 512)},
    "tokens": {
        "as many as `calibrate` draws by itself": Variant({"tokens": None}),
        **{f"{share:g} of them": Variant({"tokens": share}) for share in (0.5, 0.25, 0.1)},
    },
    "products": {
        "inputs rounded to TF32": Variant(recording=lambda _: rounded_rows(11)),
        "inputs rounded to bf16": Variant(recording=lambda _: rounded_rows(8)),
    },
    "multiple": {f"{multiple}": Variant(prune={"multiple": multiple}) for multiple in (1, 32, 64)},
    "heads": {"Cholesky diagonal, as OBS-Diff's code": Variant(prune={"method": "obs-diagonal"})},
    "joint attention": {
        "losses over each stream's energy": Variant(prune={"method": "obs-normalised"}, demos=JOINT),
        "ranks of both streams fused, as OBS-Diff": Variant(prune={"method": "obs-fused-ranks"}, demos=JOINT),
    },
    "guidance": {
        "passes weighted as guidance uses them": Variant(recording=guided_rows, demos=GUIDED),
    },
    "output": {"scale and shift per stage and channel": Variant(running=corrected_output)},
    "together": {
        "orders per stage, layers by 16 prompts, 128 prompts": Variant(
            {"count": 128}, {"order": "stage", "layer_prompts": 16}, apart=True
        ),
    },
    "packages": {
        "pruned predecessors, layer after layer": Variant(
            prune={"predecessors": "pruned", "hessian_budget": "least", "predecessor_prompts": 8}, demos=("dit-digits",)
        ),
    },
}
"""Lever -> name of a variant -> how it differs from the default."""


def main() -> None:
    """All rows that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", default=[*DEMOS], help=f"some of {', '.join(DEMOS)}; all by default")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], help="levers")
    parser.add_argument("--again", action="store_true", help="measure rows of another engine again, and say if equal")
    options = parser.parse_args()
    for name in options.demos:
        Runner(name).run(options.only, options.again)


class Runner:
    """One demo: dense images, calibrations and rows."""

    def __init__(self, name: str) -> None:
        self.demo, self.steps = Subject(name), STEPS[name]
        path = RESULTS / f"ablations-{name}.json"
        fresh = {"demo": name, "images": COUNT, "sets": SETS, "steps": self.steps, "prompts": PROMPTS, "rows": {}}
        done = json.loads(path.read_text()) if path.exists() else {}
        same = all(done.get(key) == value for key, value in fresh.items() if key != "rows")
        self.data = done if same else fresh
        self.cost = measure_cost(self.demo.host.denoiser, size=self.demo.host.input_size)
        self.dense = [self.sample(index) for index in range(SETS)]
        self.known: dict[int, Calibration] = {}

    def run(self, levers: list[str], again: bool = False) -> None:
        """Rows of these levers; the default first, with which all are compared."""
        for lever in dict.fromkeys(["default", *levers]):
            for name, variant in VARIANTS[lever].items():
                key = f"{lever}/{name}"
                if self.demo.name not in variant.demos or not needed(self.data["rows"], key, again):
                    continue
                before = self.data["rows"].get(key)
                try:
                    row = self.row(variant)
                except CalibrationError as error:  # too few prompts for the rank of a Hessian
                    row = {"refused": str(error)}
                self.data["rows"][key] = row = stamped(row, before)
                write_results(f"ablations-{self.demo.name}", self.data)
                if "refused" in row:
                    print(self.demo.name, key, row["refused"], flush=True)
                    continue
                base = self.data["rows"]["default/default"]
                told = [f"{t}: {row[str(t)]['mean']:.4f} ({_ratio(row, base, t):.2f} of the default)" for t in TARGETS]
                print(
                    self.demo.name,
                    key,
                    *told,
                    f"{row['seconds']:.0f} s, same again: {row.get('same_again')}",
                    flush=True,
                )

    def row(self, variant: Variant) -> dict[str, Any]:
        """Errors of a variant, set by set."""
        started = time.perf_counter()
        errors: dict[float, list[float]] = {target: [] for target in TARGETS}
        for index in range(SETS):
            with variant.recording(self.demo.name):
                calibration = variant.change(self.calibration(variant, index))
            bank = self.bank(variant, calibration)
            with applied(self.demo.host, bank) as pruner:
                for target, level in zip(TARGETS, bank.sparsities[1:], strict=True):
                    with variant.running(self.demo, pruner, level, calibration):
                        pruner.schedule = StageSchedule.from_levels([level] * bank.stages, bank.edges[1:-1])
                        made = self.sample(index)
                    errors[target].append(float((made - self.dense[index]).square().mean()))
        macs = [bank.macs(self.cost)[level] / self.cost.dense for level in bank.sparsities[1:]]
        row = {
            str(target): {**mean_and_spread(each), "sets": each, "macs": share}
            for (target, each), share in zip(errors.items(), macs, strict=True)
        }
        return {**row, "seconds": time.perf_counter() - started}

    def bank(self, variant: Variant, calibration: Calibration) -> Bank:
        """Of two levels, which execute the targets' MACs."""
        recipe, options = self.demo.recipe, dict(variant.prune)
        groups = [group for group in find_groups(self.demo.host.denoiser) if group.kind in recipe.kinds]
        prunable = sum(self.cost.units[group.name] * group.size for group in groups) / self.cost.dense
        given: dict[str, Any] = {"multiple": recipe.multiple, "kinds": recipe.kinds, **options}
        if options.get("hessian_budget") == "least":
            widest = max(table.shape[-1] for table in calibration.hessians.values())
            given["hessian_budget"] = 2 * 4 * widest**2 / 2**30
        return stageprune.prune(
            self.demo.pipe, calibration, levels=[(1 - target) / prunable for target in TARGETS], **given
        )

    def calibration(self, variant: Variant, index: int) -> Calibration:
        """With the variant's options and the set's seeds; the default's are made once."""
        options = dict(variant.calibrate)
        count = options.pop("count", PROMPTS)
        if variant.apart:
            options["stages"] = STAGES[self.steps]
        default = not variant.calibrate and not variant.apart and variant.recording is Variant.recording
        if default and index in self.known:
            return self.known[index]
        made = stageprune.calibrate(
            self.demo.pipe,
            self.demo.demo.prompts(count),
            steps=self.steps,
            guidance=self.demo.recipe.guidance,
            kinds=self.demo.recipe.kinds,
            seed=10_000 * index,
            **{"tokens": 1.0, **options},
        )
        if default:
            self.known[index] = made
        return made

    @torch.no_grad()
    def sample(self, index: int) -> Tensor:
        """Latents of a seed set, by whatever the denoiser is set to."""
        begin = index * COUNT
        return self.demo.sample(range(FIRST_SEED + begin, FIRST_SEED + begin + COUNT), self.steps, begin)


def _ratio(row: dict[str, Any], base: dict[str, Any], target: float) -> float:
    return float(row[str(target)]["mean"] / base[str(target)]["mean"])


if __name__ == "__main__":
    main()
