"""docs/stages.md: how a level for each stage is chosen, and what is known of each way. Called by write_docs.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import geometric_mean, median
from typing import Any

from provenance import told
from stageprune.core.planning import final

Results = dict[str, dict[str, Any]]
"""Demo -> what a benchmark wrote."""

HEAD = """# Stages: how levels are chosen

Written by `python benchmarks/write_docs.py` from `benchmarks/results/*.json`; above each table stands the command that
measured it. One bank a demo; errors are latent MSE to the dense run of the same steps, on seeds that nothing was chosen
on. What choosing the steps as well does is in [front.md](front.md)."""

STRATEGIES = """
## Strategies

`python benchmarks/strategies.py`: {steps} steps, {stages} stages, as many search probes as stand below and as many held
out, judged on {sets} x {count} images. What draws at random ran with several seeds: mean and half the range over them.
*Denoiser steps* are calls for one probe, guidance included. *Diff-ES as published* is its loop (20 individuals, 50
generations, 4 survivors, hybrid pool) with the fitness, search probes and steps of ours, and switches of as large a
share of the levels as its own. It chooses by the search probes alone; ours chooses among its best on the held-out ones,
and its warm start races on fresh seeds of those, all of which its steps count. The time of Diff-ES is with shared
states, which its own code has not."""

PREDICTION = """
## What an error table predicts

`python benchmarks/prediction.py`: {schedules} random schedules of {stages} stages, {steps} steps; the table was
measured on {probes} probes, the schedules ran on {probes} others. A third of the schedules fills each of three budgets,
so that ranks *within* them are what allocation needs: there the MACs, by which alone all are ranked well, say nothing.
Errors of stages add up as squares (their sum), as lengths (all one way), or as vectors (what they change in the latents
adds up: the table keeps the product of each two). `allocate` races the best by each."""

INTERACTIONS = """
### How much of the products should choose

`python benchmarks/interactions.py`: tables of {sets} sets of {probes} probes each ({steps} steps, {stages} stages)
choose levels by all, half or none of their products of different stages; what a choice gives is told by the tables of
the other sets. Below: its error over that of the choice by none, geometric mean over the sets, and how many sets gain.
Products of few probes are noisy: choosing by all of them follows the noise too. `allocate` chooses by half, and races
that choice against the one by none of them; `search` begins with the choices by all as well, which its own probes are
best at."""

RACES = """
### How far the last choice should go

`python benchmarks/races.py`: what a table of {table_probes} probes likes best ran on {probes} others; races among these
schedules are then drawn {draws} times from their errors. Below: the error of the choice over that of the best of them,
and runs of one probe that the race took, geometric means over {budgets}; *any*: a schedule taken blindly. A column is a
rule: how many standard errors behind a schedule is given up (of few probes more, as Student's t asks), and rounds at
most. `allocate` and `search` give up at {clear:g}, and take {least} to {most} rounds, the more the fewer probes a round
has ({enough} together)."""

LATENCY = """
## A schedule for a speed-up

`python benchmarks/latency.py`: `target="speedup:1.3"` takes denoiser times at each level, measured on the device; then
whole images run, dense and pruned in turn, {rounds} rounds, medians of ratios. *Load*: processes that wanted the
machine's cores meanwhile, this one among them."""

FITNESS = """
## What the aim does to the schedule

`python benchmarks/fitness.py`: searches at {target} of the MACs of {steps} steps for three aims, each from one level
everywhere, {generations} generations at most; each schedule judged by all, on {count} new images."""

CHOICE = """
Choose `latent_mse` when single images must stay what they were: it needs no judge and no decoding, and the SSIM of its
schedules is at most {gap:.3f} below the best here. Choose `frechet` only when the set of images counts and not the
single one, with a judge of your own images and many probes: it is free to change every image, and its schedules have
{least:.1f} to {most:.1f} times the latent error."""


def page(found: Mapping[str, Results]) -> str:
    """The whole page, of what there is: kind of benchmark -> its results."""
    parts = [HEAD]
    for kind, (text, table) in sections().items():
        results = found.get(kind)
        if results:
            first = next(iter(results.values()))
            parts.append(text.format(**(first | facts_of(first))))
            parts.append(table(results))
    if found.get("fitness"):
        parts.append(choice(found["fitness"]))
    return "\n".join(parts) + "\n"


def facts_of(data: dict[str, Any]) -> dict[str, Any]:
    """What the words of a section say beside what its benchmark wrote."""
    least, most = final.ROUNDS
    return {
        **({"schedules": len(data["schedules"])} if "schedules" in data else {}),
        **({"budgets": f"{', '.join(data['targets'])} of the MACs"} if "targets" in data else {}),
        **{"clear": final.CLEAR, "least": least, "most": most, "enough": final.PROBES},
    }


def sections() -> dict[str, tuple[str, Callable[[Results], str]]]:
    """Kind of benchmark -> what its section says, and its table; in the order of the page."""
    return {
        "strategies": (STRATEGIES, strategies_table),
        "prediction": (PREDICTION, prediction_table),
        "interactions": (INTERACTIONS, interactions_table),
        "races": (RACES, races_table),
        "latency": (LATENCY, latency_table),
        "fitness": (FITNESS, fitness_table),
    }


def choice(fitness: Results) -> str:
    """What a user should choose, with what it costs by the other aims."""
    rows = [data["rows"] for data in fitness.values()]
    gaps = [max(row["ssim"] for row in each.values()) - each["latent_mse"]["ssim"] for each in rows]
    ratios = [each["frechet"]["latent_mse"] / each["latent_mse"]["latent_mse"] for each in rows]
    return CHOICE.format(gap=max(gaps), least=min(ratios), most=max(ratios))


def strategies_table(results: Results) -> str:
    """A table a demo: a row a target and strategy."""
    parts = ["\n" + told(results, "search")]
    for name, data in results.items():
        parts += [
            f"\n### {name}, {data['probes']} search probes\n",
            "| MACs | strategy | seeds | error | accuracy | Frechet | denoiser steps | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for key, row in data["rows"].items():
            target, strategy, _ = key.split("/")
            rows.setdefault((target, strategy), []).append(row)
        parts += [_strategy_row(*key, each) for key, each in sorted(rows.items(), key=lambda item: -float(item[0][0]))]
        parts.append("\n" + _against_diff_es(rows))
    return "\n".join(parts)


def _strategy_row(target: str, strategy: str, rows: list[dict[str, Any]]) -> str:
    errors = [row["latent_mse"]["mean"] for row in rows]
    spread = (max(errors) - min(errors)) / 2
    error = f"{sum(errors) / len(errors):.5f}" + (f" ± {spread:.5f}" if len(rows) > 1 else "")
    accuracy = sum(row["accuracy"]["mean"] for row in rows) / len(rows)
    frechet = sum(row["frechet_pooled"] for row in rows) / len(rows)
    steps = f"{median(row['denoiser_steps'] for row in rows):.0f}" if "denoiser_steps" in rows[0] else ""
    cells = [target, strategy, str(len(rows)), error, f"{accuracy:.3f}", f"{frechet:.2f}", steps]
    return f"| {' | '.join(cells)} | {median(row['seconds'] for row in rows):.0f} |"


def _against_diff_es(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """After which share of Diff-ES's denoiser steps ours had its final fitness, seed by seed; its warm start counts."""
    shares, better, ratios = [], 0, []
    for (target, strategy), ours in rows.items():
        theirs = rows.get((target, "Diff-ES as published"), [])
        if strategy != "ours" or not theirs:
            continue
        for mine, other in zip(ours, theirs, strict=False):  # by seed; an unfinished run has fewer
            better += mine["course"][-1][1] <= other["fitness"] * (1 + 1e-6)
            ratios.append(mine["latent_mse"]["mean"] / other["latent_mse"]["mean"])
            reached = [steps for steps, best in mine["course"] if best <= other["fitness"] * (1 + 1e-6)]
            if reached:
                shares.append(reached[0] / other["denoiser_steps"])
    if not ratios:
        return ""
    pairs = len(ratios)
    course = (
        f"ours reached Diff-ES's final fitness in {len(shares)} of {pairs} runs, after {min(shares):.3f} to "
        f"{max(shares):.3f} of its denoiser steps (median {median(shares):.3f})"
        if shares
        else f"ours reached Diff-ES's final fitness in none of {pairs} runs"
    )
    fewer = sum(ratio <= 1 for ratio in ratios)
    return (
        f"On the search probes {course}, and its best ended no worse in {better}; on the images that both are judged "
        f"by, its choice was no worse in {fewer}, and its error {geometric_mean(ratios):.2f} times that of Diff-ES "
        "(geometric mean)."
    )


def prediction_table(results: Results) -> str:
    """A row a demo and way to add."""
    lines = [
        "",
        "| demo | errors add up as | rank correlation | within 0.8, 0.67, 0.5 of the MACs "
        "| measured / predicted: tenth, median, ninth tenth |",
        "|---|---|---|---|---|",
    ]
    for name, data in results.items():
        for way, found in data["models"].items():
            ratios = ", ".join(f"{ratio:.2f}" for ratio in found["measured_over_predicted"])
            within = ", ".join(f"{rank:.3f}" for rank in found["within"])
            lines.append(f"| {name} | {way} | {found['rank']:.3f} | {within} | {ratios} |")
        lines.append(f"| {name} | *not at all: by MACs alone* | {data['by_macs']:.3f} | | |")
    return "\n".join(lines)


def interactions_table(results: Results) -> str:
    """A row a demo and share, a column a budget."""
    targets = list(next(iter(results.values()))["targets"])
    lines = ["", f"| demo | of the products | {' | '.join(f'at {each} of the MACs' for each in targets)} |"]
    lines.append("|---" * (2 + len(targets)) + "|")
    for name, data in results.items():
        for share in data["targets"][targets[0]]:
            cells = []
            for target in targets:
                found = data["targets"][target][share]
                gains = sum(ratio < 1 for ratio in found["ratios"])
                cells.append(f"{found['mean']:.2f} ({gains} of {len(found['ratios'])})")
            lines.append(f"| {name} | {float(share):.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def races_table(results: Results) -> str:
    """A row a demo and number of probes, a column a rule."""
    found = {
        name: [{rule(row): row for row in each["rules"]} | {"any": each["any"]} for each in data["targets"].values()]
        for name, data in results.items()
    }
    rules = list(dict.fromkeys(key[1:] for key in next(iter(found.values()))[0] if key != "any"))
    titles = ["never" if clear is None else f"{clear:g}" for clear, _ in rules]
    titles = [f"{title}, {rounds} rounds" for title, (_, rounds) in zip(titles, rules, strict=True)]
    lines = ["", f"| demo | probes a round | any | {' | '.join(titles)} |", "|---" * (3 + len(rules)) + "|"]
    for name, targets in found.items():
        blind = geometric_mean(each["any"] for each in targets)
        for count in dict.fromkeys(key[0] for key in targets[0] if key != "any"):
            rows = [[each[count, *key] for each in targets] for key in rules]
            means = [[geometric_mean(row[what] for row in each) for what in ("error", "runs")] for each in rows]
            cells = [f"{error:.3f} ({runs:.0f})" for error, runs in means]
            lines.append(f"| {name} | {count} | {blind:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rule(row: dict[str, Any]) -> tuple[int, float | None, int]:
    """Probes a round, standard errors behind (None: never), rounds at most."""
    return row["each"], row["clear"], row["rounds"]


def latency_table(results: Results) -> str:
    """A row a demo and speed-up."""
    lines = ["", "| demo | asked | an image runs | off by | MACs | load |", "|---" * 6 + "|"]
    for name, data in results.items():
        for row in data["rows"]:
            found = row["image"]["speedup"]
            off = found / row["asked"] - 1
            lines.append(
                f"| {name} | {row['asked']} x | {found:.3f} x | {off:+.1%} | {row['macs']:.3f} | {data['load']:.1f} |"
            )
    return "\n".join(lines)


def fitness_table(results: Results) -> str:
    """A row a demo and aim; the best of each column of a demo in bold."""
    lines = ["", "| demo | aim | levels, noisiest first | latent MSE | SSIM | Frechet | accuracy |", "|---" * 7 + "|"]
    for name, data in results.items():
        rows = data["rows"]
        best = {
            "latent_mse": min(row["latent_mse"] for row in rows.values()),
            "ssim": max(row["ssim"] for row in rows.values()),
            "frechet": min(row["frechet"] for row in rows.values()),
        }
        for aim, row in rows.items():
            levels = ", ".join(f"{level:g}" for level in row["levels"])
            shown = {
                "latent_mse": f"{row['latent_mse']:.4f}",
                "ssim": f"{row['ssim']:.3f}",
                "frechet": f"{row['frechet']:.2f}",
            }
            cells = [f"**{text}**" if row[metric] == best[metric] else text for metric, text in shown.items()]
            lines.append(f"| {name} | {aim} | {levels} | {' | '.join(cells)} | {row['accuracy']:.3f} |")
    return "\n".join(lines)
