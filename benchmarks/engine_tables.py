"""docs/engine.md: every pruning method side by side, and every lever of the engine alone. Called by write_docs.py."""

from __future__ import annotations

from typing import Any

from quality import show

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

ORDER = """
## The greedy order at full size

`python benchmarks/solver.py order`, one CPU thread, float64. The plain loop updates the inverse after every unit; it is
timed on its first removals only, each of which costs the same; what all of them would take is not measured but
multiplied."""


COST = """
## What calibrating costs

`python benchmarks/calibration.py`: time over that of just running the pipeline on the same prompts, without decoding;
medians of interleaved rounds, one thread. By default as many inputs are summed as the Hessians need, about 32 for each
column and stage (`python benchmarks/ablations.py --only tokens` measures what summing all of them changes)."""


def page(methods: Results, ablations: Results, calibration: Results, order: dict[str, Any] | None) -> str:
    """The whole page."""
    parts = [HEAD]
    if methods:
        parts += [METHODS, *(methods_table(name, data) for name, data in methods.items())]
    if ablations:
        parts += [LEVERS, levers_table(ablations)]
    if calibration:
        parts += [COST, cost_table(calibration)]
    if order:
        parts += [ORDER, order_table(order["rows"])]
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
    for key in dict.fromkeys(key for data in ablations.values() for key in data["rows"]):
        lever, _, variant = key.partition("/")
        cells = [_lever_cell(data["rows"], key, target) for data in ablations.values() for target in targets]
        lines.append(f"| {lever} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lever_cell(rows: dict[str, Any], key: str, target: str) -> str:
    row, base = rows.get(key), rows["default/default"]
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    if key == "default/default":
        return show(row[target])
    ratios = [ours / default for ours, default in zip(row[target]["sets"], base[target]["sets"], strict=True)]
    return f"{sum(ratios) / len(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def cost_table(calibration: Results) -> str:
    """A row a way to calibrate, a column a demo."""
    names = dict.fromkeys(name for data in calibration.values() for name in data["rows"])
    prompts = [f"{name}, {data['prompts']} prompts of {data['steps']} steps" for name, data in calibration.items()]
    lines = ["", f"| what is summed | {' | '.join(prompts)} |", f"|---|{'---|' * len(prompts)}"]
    for name in names:
        cells = [f"{data['rows'][name]['ratio']:.2f}" for data in calibration.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def order_table(rows: list[dict[str, Any]]) -> str:
    """Seconds for all units; the plain loop's are its cost a removal times the units."""
    lines = [
        "",
        "| neurons | outputs | blocked: all units, s | of it the inverse | plain loop: a removal, ms "
        "| times all units, s | same first units |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = row["plain_cpu_seconds_a_removal"]
        lines.append(
            f"| {row['neurons']} | {row['outputs']} | {row['blocked_cpu_seconds']:.1f} | "
            f"{row['inverse_cpu_seconds']:.1f} | {plain * 1e3:.0f} | {plain * row['units']:.0f} | "
            f"{'yes' if row['first_removals_equal'] else 'no'} ({row['plain_removals']}) |"
        )
    return "\n".join(lines)
