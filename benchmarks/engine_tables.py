"""docs/engine.md: every pruning method side by side, and every lever of the engine alone. Called by write_docs.py."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from ablations import VARIANTS
from provenance import told
from quality import show
from stageprune.core.calibration.recorders import INPUTS_PER_COLUMN

Results = dict[str, dict[str, Any]]
"""Demo -> what a benchmark wrote."""

HEAD = """# The engine: methods and levers

Written by `python benchmarks/write_docs.py` from `benchmarks/results/*.json`. The same level at all steps here; what a
level a stage adds is in [results.md](results.md). Errors are latent MSE to the dense model, same seeds."""

METHODS = """
## Methods

`python benchmarks/methods.py`: each method at 20, 35 and 50 % of what it prunes: MACs of heads, neurons (and ResNet
channels, sdxl-shapes), or of whole blocks, or single weights of the same layers. *MACs* are what is executed at 50 %;
zeroed single weights save none by themselves. Time is for all three ratios of a bank, on one thread, without the
calibration that all share. Frechet distance is pooled over the seed sets."""

LEVERS = """
## Levers

`python benchmarks/ablations.py`: one change from the defaults at a time. Each cell is the error over that of the
default, the mean of the sets' ratios and their lowest and highest: three calibrations with seeds of their own, each
judged on images of its own. Below 1 is better than the default."""

DEFAULTS = """
Read ranges, not means: layers' shares are measured anew in every row, so that a row differs from the default by that
choice too. Empty cells were not measured. Where ranges reach over 1 the simplest is the default.

The row *together* is what to take for the least error, if a bank may be larger by the number of its stages and tied to
them: `calibrate` with 128 prompts and 4 or 5 stages, then `prune(order="stage", layer_prompts=16)`. It is not the
default for those two reasons, because rows are then gathered at every switch, and because orders per stage alone were
worse in other runs ([results.md](results.md#shared-or-per-stage))."""

ORDER = """
## The greedy order at full size

`python benchmarks/solver.py order`, one CPU thread, float64. The plain loop updates the inverse after every unit; it is
timed on its first removals only, each of which costs the same; what all of them would take is not measured but
multiplied. *Memory* is the most that the blocked order took beside H and the weights."""


COST = f"""
## What calibrating costs

`python benchmarks/calibration.py`: time over that of just running the pipeline on the same prompts, without decoding;
medians of interleaved rounds, one thread. By default as many inputs are summed as the Hessians need, about
{INPUTS_PER_COLUMN} for each column and stage (`python benchmarks/ablations.py --only tokens` measures what summing all
of them changes)."""


EXACT = """
## Against slow references

`python benchmarks/exactness.py`: random layers with independent, low-rank, repeated and dead inputs, beside plain
float64 versions of the same algorithms, which invert H anew at each removal (the greedy order) or column (single
weights). *Difference* is the largest, relative to the largest loss or weight."""


def page(
    methods: Results,
    ablations: Results,
    calibration: Results,
    order: dict[str, Any] | None,
    exactness: dict[str, Any] | None,
) -> str:
    """The whole page."""
    parts = [HEAD]
    if methods:
        parts += [METHODS, f"\n{told(methods)}", *(methods_table(name, data) for name, data in methods.items())]
    if ablations:
        parts += [LEVERS, levers_setup(ablations), levers_table(ablations), *levers_verdict(ablations), DEFAULTS]
    if calibration:
        parts += [COST, cost_table(calibration)]
    if order:
        parts += [ORDER, order_table(order["rows"])]
    if exactness:
        parts += [EXACT, exact_table(exactness)]
    return "\n".join(parts) + "\n"


def methods_table(name: str, data: dict[str, Any]) -> str:
    """One demo: a row a method."""
    rows = data["rows"]
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in rows if key != "dense"))
    dense = rows["dense"]
    lines = [
        f"\n{name}: {data['sets']} seed sets of {data['count']}, {data['steps']} steps. Dense: accuracy "
        f"{dense['accuracy']['mean']:.3f}, Frechet {dense['frechet_pooled']:.2f}. Calibration "
        f"{data['calibrate_seconds']:.0f} s.\n",
        "| method | MACs | error at 20 % | at 35 % | at 50 % | accuracy | | | Frechet | | | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in names:
        cells = [rows.get(f"{method}/{ratio}") for ratio in (0.2, 0.35, 0.5)]
        if not all(cells):  # N:M stands alone
            continue
        lines.append(_method_row(method, [cell for cell in cells if cell]))
    for key, row in rows.items():
        if key.endswith("/2:4"):
            lines.append(
                f"| {key.replace('/2:4', ', 2:4')} | {row['macs']:.2f} | | | {show(row['latent_mse'])} | | | "
                f"{row['accuracy']['mean']:.3f} | | | {row['frechet_pooled']:.2f} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines)


def _method_row(method: str, cells: list[dict[str, Any]]) -> str:
    errors = [show(cell["latent_mse"]) for cell in cells]
    accuracies = [f"{cell['accuracy']['mean']:.3f}" for cell in cells]
    distances = [f"{cell['frechet_pooled']:.2f}" for cell in cells]
    facts = [f"{cells[-1]['macs']:.2f}", *errors, *accuracies, *distances, f"{cells[-1]['seconds']:.0f}"]
    return f"| {method} | {' | '.join(facts)} |"


def levers_table(ablations: Results) -> str:
    """A row a variant, a pair of columns a demo."""
    targets = ("0.67", "0.5")
    head = [f"{name}, {target} of the MACs" for name in ablations for target in targets]
    lines = ["", f"| lever | variant | {' | '.join(head)} |", f"|---|---|{'---|' * len(head)}"]
    for key in (f"{lever}/{name}" for lever, variants in VARIANTS.items() for name in variants):
        if not any(key in data["rows"] for data in ablations.values()):
            continue
        lever, _, variant = key.partition("/")
        cells = [_lever_cell(data["rows"], key, target) for data in ablations.values() for target in targets]
        lines.append(f"| {lever} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def levers_setup(ablations: Results) -> str:
    """How it was measured."""
    facts = [
        f"{name}: {data['steps']} steps, {data['prompts']} prompts, {data['sets']} sets of {data['images']} images"
        for name, data in ablations.items()
    ]
    return f"\n{'; '.join(facts)}. {told(ablations)}"


def levers_verdict(ablations: Results) -> list[str]:
    """Which variants are better or worse than the default wherever they were measured."""
    found: dict[str, list[float]] = {}
    for data in ablations.values():
        for key, row in data["rows"].items():
            if key != "default/default" and "refused" not in row:
                every = [ratio for target in ("0.67", "0.5") for ratio in _ratios(data["rows"], key, target)]
                found.setdefault(key.replace("/", ": ", 1), []).extend(every)

    def listed(wanted: Callable[[list[float]], bool]) -> str:
        return "; ".join(
            f"{name} (to {ratios[0]:.2f} at best, {ratios[-1]:.2f} at worst)" for name, ratios in chosen(wanted)
        )

    def chosen(wanted: Callable[[list[float]], bool]) -> list[tuple[str, list[float]]]:
        return [(name, sorted(ratios)) for name, ratios in found.items() if wanted(ratios)]

    lines = [
        f"\nBetter than the default in every set of every cell: {listed(lambda ratios: max(ratios) < 1) or 'none'}.",
        f"\nWorse in every one: {listed(lambda ratios: min(ratios) > 1) or 'none'}.",
    ]
    mixed = [median(ratios) for _, ratios in chosen(lambda ratios: min(ratios) <= 1 <= max(ratios))]
    if mixed:
        lines.append(
            "\nAll others are better in some sets and worse in others, their medians "
            f"{min(mixed):.2f} to {max(mixed):.2f}."
        )
    return lines


def _ratios(rows: dict[str, Any], key: str, target: str) -> list[float]:
    """Error over the default's, set by set."""
    return [
        ours / default
        for ours, default in zip(rows[key][target]["sets"], rows["default/default"][target]["sets"], strict=True)
    ]


def _lever_cell(rows: dict[str, Any], key: str, target: str) -> str:
    row = rows.get(key)
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    if key == "default/default":
        return show(row[target])
    ratios = _ratios(rows, key, target)
    return f"{sum(ratios) / len(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def cost_table(calibration: Results) -> str:
    """A row a way to calibrate, a column a demo."""
    names = dict.fromkeys(name for data in calibration.values() for name in data["rows"])
    prompts = [f"{name}, {data['prompts']} prompts of {data['steps']} steps" for name, data in calibration.items()]
    lines = ["", f"| what is summed | {' | '.join(prompts)} |", f"|---|{'---|' * len(prompts)}"]
    for name in names:
        cells = [f"{data['rows'][name]['ratio']:.2f}" if name in data["rows"] else "" for data in calibration.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def order_table(rows: list[dict[str, Any]]) -> str:
    """Seconds for all units; the plain loop's are its cost a removal times the units."""
    lines = [
        "",
        "| neurons | outputs | blocked: all units, s | of it the inverse | memory, GiB | of H "
        "| plain loop: a removal, ms | times all units, s | same first units |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = row["plain_cpu_seconds_a_removal"]
        same = "yes" if row["first_removals_equal"] else "no"
        cells = [
            f"{row['neurons']}",
            f"{row['outputs']}",
            f"{row['blocked_cpu_seconds']:.1f}",
            f"{row['inverse_cpu_seconds']:.1f}",
            f"{row['peak_gib']:.2f}",
            f"{row['hessian_gib']:.2f}",
            f"{plain * 1e3:.0f}",
            f"{plain * row['units']:.0f}",
            f"{same} ({row['plain_removals']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def exact_table(exactness: dict[str, Any]) -> str:
    """A row a solver."""
    lines = ["", "| solver | layers | difference | not alike |", "|---|---|---|---|"]
    for row in exactness["rows"]:
        lines.append(
            f"| {row['name']} | {exactness['layers']} | {row['difference']:.0e} "
            f"| {row['different']} of {row['of']} ({row['what']}) |"
        )
    return "\n".join(lines)
