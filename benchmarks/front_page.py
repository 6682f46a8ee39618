"""docs/front.md with its pictures: error against cost. Called by write_docs.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from provenance import told
from quality import show

Results = dict[str, dict[str, Any]]
"""`front-<demo>-<solver>` -> what `front.py` wrote."""

HEAD = """# Pruning, fewer steps, or both

Written by `python benchmarks/write_docs.py` from `benchmarks/results/front-*.json`, which `python benchmarks/front.py`
measured. A user who wants images for less can make fewer steps, make them at better noise levels (*better steps*,
`strategy="steps"`), prune all steps (*one level*), prune every stage as far as it bears it (*a level a stage*,
`strategy="measured"`), or choose steps and levels together (`strategy="joint"`): for samples near the dense model's own
(the default), or *by Frechet*, for samples near real images (`fitness="frechet"`, with a judge).

Cost is in denoiser calls of the dense model, by executed MACs; the dense run of 20 steps costs 20. *Error* is the
latent MSE to a dense run of the same solver with 40 steps; *accuracy* the share of images that show what was asked for;
*Frechet* the distance to real images in the judge's features, pooled over the seed sets. Every plan was made on prompts
and seeds of its own. The solver *first* is the demo's own (DDIM; Euler of flow matching), *second* DPM-Solver++(2M)."""

NAMES = {
    "fewer steps": "fewer steps",
    "steps": "better steps",
    "uniform": "one level",
    "measured": "a level a stage",
    "one level": "one level",
    "joint": "steps and levels",
    "steps by Frechet": "better steps, by Frechet",
    "joint by Frechet": "steps and levels, by Frechet",
}
COLOURS = {
    "fewer steps": "#8c8c8c",
    "steps": "#4c72b0",
    "uniform": "#dd8452",
    "measured": "#937860",
    "one level": "#ccb974",
    "joint": "#c44e52",
    "steps by Frechet": "#64b5cd",
    "joint by Frechet": "#55a868",
}
OURS = ("joint", "joint by Frechet")
METRICS = {"error": "latent MSE to 40 dense steps", "accuracy": "accuracy", "frechet": "Frechet distance"}
LOW, HIGH, FEW = 4, 20, 8
SHORT = (2, 4, 8)
"""Budgets of the README's table."""

PRUNED = ("uniform", "measured", "one level")
BY_ERROR = ("fewer steps", "steps", *PRUNED, "joint")
"""Ways that are chosen for samples near the dense model's, or not chosen at all."""

CLEAR = 2.0
"""Standard errors of a paired difference that decide."""
SOLVERS = {"first": "first order", "second": "second order"}


def page(results: Results, docs: Path) -> str:
    """The whole page; pictures go beside it."""
    parts = [HEAD, f"\n{told(results, 'planner')}", verdicts(results), predictions(results)]
    for name in dict.fromkeys(data["demo"] for data in results.values()):
        mine = {data["solver"]: data for data in results.values() if data["demo"] == name}
        picture, few = f"front-{name}.png", f"front-{name}-few.png"
        draw(mine, docs / picture, LOW, HIGH, ["20"])
        draw(mine, docs / few, 2, FEW, ["8", "4"])
        facts = next(iter(mine.values()))
        parts.append(
            f"\n## {name}\n\n{facts['sets']} seed sets of {facts['count']} images; {facts['environment']['cpu']}, "
            f"float32.{_set_probes(mine)}"
            f"\n\n![{name}: error, accuracy and Frechet distance against cost]({picture})\n\nFew steps:\n\n"
            f"![{name}, few steps]({few})"
        )
        parts += [f"\nSolver *{solver}*:\n\n{table(data)}" for solver, data in mine.items()]
    return "\n".join(parts) + "\n"


def value(row: dict[str, Any], metric: str) -> float:
    """One number of a row."""
    return float({"error": row["fine"]["mean"], "accuracy": row["accuracy"]["mean"], "frechet": row["frechet"]}[metric])


def curves(data: dict[str, Any], steps: Sequence[str]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Name of a way -> (budget, row) in rising budgets; of pruning alone the best of these step counts' rows."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for key, row in data["rows"].items():
        calls, _, way = key.partition("/")
        name, _, count = way.partition(", ")
        if "refused" in row or not way or (count and count.removesuffix(" steps") not in (*steps, "any")):
            continue
        line = found.setdefault(f"{name}, {count}" if count else name, [])
        line.append((int(calls), row))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in found.items()}


def draw(solvers: Results, path: Path, low: int, high: int, steps: Sequence[str]) -> None:
    """A row of panels a solver."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(solvers), len(METRICS), figsize=(12, 3.4 * len(solvers)), layout="constrained", squeeze=False
    )
    for row, (solver, data) in zip(axes, solvers.items(), strict=True):
        for panel, (metric, label) in zip(row, METRICS.items(), strict=True):
            for name, line in curves(data, steps).items():
                way, _, count = name.partition(", ")
                points = [(each["calls"], value(each, metric)) for calls, each in line if low <= calls <= high]
                if not points:
                    continue
                style = {"color": COLOURS[way], "ls": "--" if count.startswith("4") else "-", "marker": "o", "ms": 3}
                text = NAMES[way] + (f", {count}" if count else "")
                panel.plot(*zip(*points, strict=True), label=text, lw=2.2 if way in OURS else 1.2, **style)
            if metric == "error":
                panel.set_yscale("log")
            if metric == "accuracy":
                panel.set_ylim(top=1.01)
            panel.set(xlabel="cost in dense calls", title=f"{label} ({solver} order)")
            panel.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def table(data: dict[str, Any]) -> str:
    """A row a budget and way."""
    lines = [
        "| budget | way | calls | steps | error | accuracy | Frechet |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = [key for key, row in data["rows"].items() if "/" in key and "refused" not in row]
    for key in sorted(keys, key=_place):
        row = data["rows"][key]
        calls, _, way = key.partition("/")
        name, _, count = way.partition(", ")
        text = NAMES[name] + (f", {count}" if count else "")
        text = f"**{text}**" if name in OURS else text
        lines.append(
            f"| {calls} | {text} | {row['calls']:.2f} | {row['steps']} | {show(row['fine'])} | "
            f"{row['accuracy']['mean']:.3f} | {row['frechet']:.2f} |"
        )
    return "\n".join(lines)


def verdicts(results: Results) -> str:
    """In how many cells each of ours is no worse than all others, and where it is."""
    lines = [
        "\n## In short\n",
        "Budgets below that of the dense run. *Error*: won, tied or lost against the best of the ways that are not "
        f"chosen by Frechet, by {CLEAR:g} standard errors of the paired differences, image by image; the same schedule "
        "is a tie; empty where rows were measured before errors of single images were kept. "
        "*Accuracy* and *Frechet*: where the row is the best of all ways, or within one image of a hundred "
        "and 2 % of the best. Plans *by Frechet* are chosen by the very distance that they are judged by here, on "
        "other images and the same judge.\n",
        "| demo | solver | way | error: won, tied, lost | accuracy | Frechet "
        "| error over fewer steps (geometric mean) |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in results.values():
        budgets = sorted({int(key.partition("/")[0]) for key in data["rows"] if "/" in key} - {HIGH})
        measured = {key.partition("/")[2] for key in data["rows"]}
        for way in (each for each in (*OURS, "steps by Frechet", "steps", "fewer steps") if each in measured):
            found = [_outcome(_rows(data, calls), way) for calls in budgets]
            decided = ", ".join(str(found.count(outcome)) for outcome in ("won", "tied", "lost")) if any(found) else ""
            counts = " | ".join(
                f"{sum(_wins(data, calls, way, metric) for calls in budgets)} of {len(budgets)}"
                for metric in ("accuracy", "frechet")
            )
            ratio = _mean_ratio(data, budgets, way)
            lines.append(f"| {data['demo']} | {data['solver']} | {NAMES[way]} | {decided} | {counts} | {ratio:.2f} |")
    return "\n".join(lines)


def predictions(results: Results) -> str:
    """What prices of single jumps say of whole plans, solver by solver."""
    lines = [
        "\n## What the prices of jumps miss\n",
        "A plan's price is what each jump of a first-order solver would cost if all others were perfect, added up. The "
        "best plans by several prices, and small changes of the best, are then really run, by the sampler's own "
        "solver. The error of the plan that was chosen, over its price:\n",
        "| demo | solver | plans | lowest | median | highest |",
        "|---|---|---|---|---|---|",
    ]
    for data in results.values():
        ratios = sorted(
            row["fine"]["mean"] / row["predicted"]
            for key, row in data["rows"].items()
            if row.get("predicted") and key.partition("/")[2] in ("steps", "joint")
        )
        if ratios:
            told = f"{ratios[0]:.2f} | {median(ratios):.2f} | {ratios[-1]:.2f}"
            lines.append(f"| {data['demo']} | {data['solver']} | {len(ratios)} | {told} |")
    return "\n".join(lines)


def _place(key: str) -> tuple[int, int]:
    """By budget, then as in `NAMES`; a way's step counts stay in the order in which they ran."""
    calls, _, way = key.partition("/")
    return int(calls), [*NAMES].index(way.partition(", ")[0])


def short(results: Results) -> str:
    """The README's table: error and Frechet distance of each way at a few budgets."""
    lines = [
        f"Error (latent MSE to 40 dense steps) / Frechet distance to real images; cost in dense denoiser calls; "
        f"{', '.join(_sets(results))} (`python benchmarks/front.py`):\n",
        "| pipeline, solver | cost | fewer steps | better steps | best of pruning alone, each | steps and levels "
        "| the same, by Frechet |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in results.values():
        for calls in SHORT:
            rows = _rows(data, calls)
            alone = [row for way, row in rows.items() if way.startswith(PRUNED)]
            single = [rows.get(way) for way in ("fewer steps", "steps", *OURS)]
            found = [[row] if row else [] for row in single]
            if rows:
                cells = " | ".join(_cell(each) for each in (*found[:2], alone, *found[2:]))
                lines.append(f"| {data['demo']}, {SOLVERS[data['solver']]} | {calls} | {cells} |")
    return "\n".join(lines)


def _set_probes(solvers: Results) -> str:
    """On how many prompts plans by Frechet distance were made."""
    rows = [row for data in solvers.values() for key, row in data["rows"].items() if key.endswith("by Frechet")]
    counts = sorted({row["probes"] for row in rows if "probes" in row})
    told = " or ".join(map(str, counts))
    return f" Plans by Frechet distance were made on {told} prompts, half of them held out." if counts else ""


def _sets(results: Results) -> list[str]:
    return [f"{data['sets']} x {data['count']} images of {data['demo']}" for data in _by_demo(results).values()]


def _by_demo(results: Results) -> Results:
    return {data["demo"]: data for data in results.values()}


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    """The least error and the least Frechet distance."""
    if not rows:
        return ""
    return f"{min(value(row, 'error') for row in rows):.4f} / {min(value(row, 'frechet') for row in rows):.2f}"


def _rows(data: dict[str, Any], calls: int) -> dict[str, dict[str, Any]]:
    """Way -> row, of those that a budget allows."""
    rows = {key.partition("/"): row for key, row in data["rows"].items() if "refused" not in row}
    return {way: row for (budget, _, way), row in rows.items() if way and budget == str(calls)}


def _outcome(rows: dict[str, dict[str, Any]], way: str) -> str | None:
    """Whether a way has clearly less error than all others, as little as the best, or clearly more; None if it has no
    row, or rows are of a time when errors of single images were not kept.
    """
    others = [row for name, row in rows.items() if name != way and name.partition(", ")[0] in BY_ERROR]
    if way not in rows or not others or any("images" not in row for row in (rows[way], *others)):
        return None
    margins = [_margin(rows[way], row) for row in others]
    return "lost" if min(margins) < -CLEAR else "won" if min(margins) > CLEAR else "tied"


def _margin(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """By how many standard errors mine has less error, image by image."""
    differences = [theirs - own for own, theirs in zip(mine["images"], other["images"], strict=True)]
    if not any(differences):
        return 0.0
    return mean(differences) / (stdev(differences) / math.sqrt(len(differences)) + 1e-12)


def _wins(data: dict[str, Any], calls: int, way: str, metric: str) -> bool:
    rows = _rows(data, calls)
    if way not in rows:
        return False
    mine, all_ways = value(rows[way], metric), [value(row, metric) for row in rows.values()]
    return mine >= max(all_ways) - 0.01 if metric == "accuracy" else mine <= 1.02 * min(all_ways)


def _mean_ratio(data: dict[str, Any], budgets: Sequence[int], way: str) -> float:
    rows = data["rows"]
    pairs = [(rows.get(f"{calls}/{way}"), rows[f"{calls}/fewer steps"]) for calls in budgets]
    ratios = [value(mine, "error") / value(fewer, "error") for mine, fewer in pairs if mine and "refused" not in mine]
    product = 1.0
    for ratio in ratios:
        product *= ratio
    return product ** (1 / len(ratios)) if ratios else float("nan")
