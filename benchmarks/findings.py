"""docs/findings.md: the questions that decide the defaults, asked of every demo pipeline. Called by write_docs.py."""

from __future__ import annotations

from typing import Any

from common import DEMOS, TARGETS
from quality import STEPS

Results = dict[str, dict[str, Any]]
"""Demo -> what a benchmark wrote."""

LOST = 0.05
"""Accuracy below uniform's by more than this is named."""

HEAD = """# What holds for every model, and what does not

Written by `python benchmarks/write_docs.py` from `benchmarks/results/*.json` (see [results.md](results.md) for the
commands, all cells and the spreads). Three small pipelines, trained for real: a class-conditional DiT, a Stable
Diffusion XL UNet (heads, neurons and ResNet channels pruned) and a FLUX MMDiT. Errors are latent MSE to the dense model
at the same steps. They are small models: the defaults follow from them, the numbers are theirs alone."""


PAIRED_IS_NOT_ALL = (
    "- Paired error is not all that counts. Less of it than one level everywhere, and yet fewer pictures of what was "
    "asked for: accuracy of {}, measured against one level everywhere."
)

PICTURES = """
## 6. Pictures

At 0.67 of the MACs, 20 steps: `stageprune demo NAME` writes each as `out/demo/report/grid.png`. Rows are variants,
columns seeds; on the right the seeds on which the schedule differs most from dense.

dit-digits:

![dit-digits, dense and pruned](demo-grid.png)

sdxl-shapes:

![sdxl-shapes, dense and pruned](sdxl-shapes-grid.png)

flux-shapes:

![flux-shapes, dense and pruned](flux-shapes-grid.png)"""


def page(quality: Results, sharing: Results, layers: Results) -> str:
    """The whole page."""
    parts = [compensation(layers), divisions(layers), stages(quality), orders(sharing), steps(quality), PICTURES]
    return "\n".join([HEAD, short(quality, sharing, layers), *parts]) + "\n"


def short(quality: Results, sharing: Results, layers: Results) -> str:
    """What holds everywhere, what does not, and the defaults that follow; all counts from the data."""
    cells = [data["cells"] for data in quality.values()]
    keys = [(each, key) for each in cells for key in each if key.endswith("measured")]

    def below(rival: str, metric: str = "latent_mse", where: str = "") -> str:
        """In how many cells the measured schedule errs less than a rival."""
        chosen = [(each, key) for each, key in keys if key.startswith(where)]
        won = sum(
            each[key][metric]["mean"] < each[key.replace("measured", rival)][metric]["mean"] for each, key in chosen
        )
        return f"{won} of {len(chosen)} cells"

    same = sum(each[key]["schedule"] == each[key.replace("measured", "uniform")]["schedule"] for each, key in keys)
    lost = [
        f"{name} at {key.split('/')[0]} steps and {key.split('/')[1]} of the MACs {mean(ours, 'accuracy', 2)} against "
        f"{mean(uniform, 'accuracy', 2)}"
        for name, data in quality.items()
        for key, ours in data["cells"].items()
        if key.endswith("measured")
        for uniform in [data["cells"][key.replace("measured", "uniform")]]
        if ours["accuracy"]["mean"] < uniform["accuracy"]["mean"] - LOST
        and ours["latent_mse"]["mean"] < uniform["latent_mse"]["mean"]
    ]
    rise = [
        each[f"{count}/{TARGETS[-1]}/measured"]["latent_mse"]["mean"]
        / each[f"{count}/{TARGETS[0]}/measured"]["latent_mse"]["mean"]
        for each in cells
        for count in STEPS
    ]
    dearest = {name: max(range(5), key=_alone(data, 20).__getitem__) for name, data in quality.items()}
    shares, losses = shares_of(layers), losses_of(layers)
    many = [row for data in sharing.values() for row in data["rows"] if row["prompts"] == data["rows"][0]["prompts"]]
    ratios = _over_shared(many)
    few = [row for data in sharing.values() for row in data["rows"] if row not in many]
    return "\n".join(
        [
            "\n## In short\n",
            "Holds on all three:\n",
            f"- What decides is *which units of which layer* go, and that the others compensate. At equal MACs one "
            f"share for all layers has {min(shares):.1f} to {max(shares):.0f} times the error of measured layers; "
            f"magnitude without compensation has {min(losses):.1f} to {max(losses):.0f} times that of OBS at the very "
            "same widths.",
            f"- On top of that, a level a stage: less paired error than one level everywhere in {below('uniform')}, "
            f"the very same schedule in {same} more.",
            f"- The error rises steeply: at {TARGETS[-1]} of the MACs the measured schedule has {min(rise):.0f} to "
            f"{max(rise):.0f} times its error at {TARGETS[0]}.\n",
            "Differs from model to model:\n",
            *([PAIRED_IS_NOT_ALL.format("; ".join(lost))] if lost else []),
            "- Which stage is dear (section 3): at 20 steps, counted from the noisiest, "
            f"{', '.join(f'stage {stage} of {name}' for name, stage in dearest.items())}. So it is measured.",
            f"- Fewer steps or pruning. The measured schedule has less paired error than dense with fewer steps in "
            f"{below('fewer steps')} altogether: {below('fewer steps', where='20/')} of 20 steps, "
            f"{below('fewer steps', where='8/')} of 8, {below('fewer steps', where='4/')} of 4; section 5 has it by "
            "model.",
            f"- Consumers or orders per stage: {_span(ratios)} times the error of shared ones (section 4) with many "
            f"calibration prompts, {_span(_over_shared(few))} times with few.\n",
            'Defaults that follow: `method="obs"` with `layer_allocation="measured"`, shared orders and consumers '
            '(the smallest bank, which runs any schedule), `strategy="measured"` with five stages.',
        ]
    )


def _over_shared(rows: list[dict[str, Any]]) -> list[float]:
    """Errors of orders or consumers per stage over those of shared ones; rows come in threes, shared first."""
    keys = [f"uniform {target}" for target in TARGETS]
    return [
        row[key]["mean"] / rows[index - index % 3][key]["mean"]
        for index, row in enumerate(rows)
        if index % 3
        for key in keys
    ]


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def compensation(layers: Results) -> str:
    """OBS with compensation beside magnitude without, at the very same widths."""
    lines = [
        "\n## 1. Compensation\n",
        "`python benchmarks/layers.py`: one level everywhere, 20 steps; Optimal Brain Surgeon with compensation beside "
        "magnitude without, every layer as wide in both: with one share for all layers, and with measured shares.\n",
        "| demo | MACs | one share: error, OBS | magnitude | accuracy, OBS | magnitude "
        "| measured: error, OBS | magnitude | accuracy, OBS | magnitude |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, data in layers.items():
        rows = {(row["method"], row["allocation"], row["target"]): row for row in data["rows"]}
        for target in TARGETS:
            cells = []
            for allocation in ("uniform", "measured"):
                ours, other = rows["obs", allocation, target], rows["magnitude", allocation, target]
                cells += [mean(ours, "latent_mse"), mean(other, "latent_mse")]
                cells += [mean(ours, "accuracy", 3), mean(other, "accuracy", 3)]
            lines.append(f"| {name} | {rows['obs', 'measured', target]['macs']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def divisions(layers: Results) -> str:
    """One share for all layers, or by what each is worth."""
    ratios = shares_of(layers)
    return (
        "\n## 2. One share for all layers, or what each can spare\n\n"
        "The table above, read across: the share of units that goes is the same in every layer, or follows how far "
        "the sample would move if that layer alone were pruned. At equal MACs one share for all has "
        f"{min(ratios):.1f} to {max(ratios):.0f} times the error. The report of `stageprune demo` draws what each "
        "layer keeps."
    )


def losses_of(layers: Results) -> list[float]:
    """Errors of magnitude over those of OBS at the same widths."""
    found = []
    for data in layers.values():
        rows = {(row["method"], row["allocation"], row["target"]): row["latent_mse"]["mean"] for row in data["rows"]}
        found += [error / rows["obs", *key] for (method, *key), error in rows.items() if method == "magnitude"]
    return found


def shares_of(layers: Results) -> list[float]:
    """Errors of OBS with one share for all layers over those with measured shares."""
    found = []
    for data in layers.values():
        rows = {(row["allocation"], row["target"]): row for row in data["rows"] if row["method"] == "obs"}
        found += [
            rows["uniform", target]["latent_mse"]["mean"] / rows["measured", target]["latent_mse"]["mean"]
            for target in TARGETS
        ]
    return found


def stages(quality: Results) -> str:
    """What a stage costs when it alone is pruned, and what the allocation made of it."""
    lines = [
        "\n## 3. What a stage is worth\n",
        "Error when one of five equal stages (fewer where some have no step) alone runs at the level nearest half, "
        "stage 0 the noisiest; then the schedule chosen for 0.67 of the MACs, and its error beside one level "
        "everywhere.\n",
        "| demo | steps | 0 | 1 | 2 | 3 | 4 | dearest / cheapest | measured schedule | error | uniform |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, data in quality.items():
        for count in STEPS:
            errors = _alone(data, count)
            visited, places = [error for error in errors if error > 0], errors + [0.0] * (5 - len(errors))
            cells = data["cells"]
            ours, uniform = cells[f"{count}/0.67/measured"], cells[f"{count}/0.67/uniform"]
            shown = " | ".join(f"{error:.4f}" if error else "" for error in places)
            lines.append(
                f"| {name} | {count} | {shown} | {max(visited) / min(visited):.0f} | "
                f"{', '.join(f'{value:g}' for value in ours['schedule'])} | {mean(ours, 'latent_mse')} | "
                f"{mean(uniform, 'latent_mse')} |"
            )
    return "\n".join(lines)


def _alone(data: dict[str, Any], steps: int) -> list[float]:
    """Error when each stage alone runs at the level nearest half."""
    table = data["allocations"][f"{steps}/0.8"]["table"]
    level = min(range(len(table["sparsities"])), key=lambda i: abs(table["sparsities"][i] - 0.5))
    return [row[level] for row in table["errors"]]


def orders(sharing: Results) -> str:
    """Error of the other sharings over that of shared orders and consumers."""
    lines = [
        "\n## 4. One order for all stages, or one a stage\n",
        "Error over that with shared orders and shared consumers; five stages, 20 steps. Fewer calibration prompts "
        "leave less data a stage.\n",
        "| demo | prompts | order | consumers | " + " | ".join(f"{target} of the MACs" for target in TARGETS) + " |",
        "|---|---|---|---|" + "---|" * len(TARGETS),
    ]
    for name, data in sharing.items():
        bases = {
            row["prompts"]: row for row in data["rows"] if (row["order"], row["consumers"]) == ("shared", "shared")
        }
        for row in data["rows"]:
            base = bases[row["prompts"]]
            if row is base:
                continue
            keys = [f"uniform {target}" for target in TARGETS]
            ratios = " | ".join(f"{row[key]['mean'] / base[key]['mean']:.2f}" for key in keys)
            lines.append(f"| {name} | {row['prompts']} | {row['order']} | {row['consumers']} | {ratios} |")
    missing = [name for name in DEMOS if name not in sharing]
    return "\n".join([*lines, *([f"\nNot measured: {', '.join(missing)}."] if missing else [])])


def steps(quality: Results) -> str:
    """In how many cells the measured schedule beats dense with fewer steps, metric by metric."""
    lines = [
        "\n## 5. Pruning or fewer steps\n",
        "Of the nine cells (20, 8 and 4 steps at 0.8, 0.67 and 0.5 of the MACs): where the measured schedule beats "
        "dense with fewer steps at about equal cost.\n",
        "| demo | paired error | accuracy better | accuracy equal | Frechet |",
        "|---|---|---|---|---|",
    ]
    for name, data in quality.items():
        cells = data["cells"]
        measured = [key for key in cells if key.endswith("measured")]
        pairs = [(cells[key], cells[key.replace("measured", "fewer steps")]) for key in measured]
        won = {
            "paired": sum(a["latent_mse"]["mean"] < b["latent_mse"]["mean"] for a, b in pairs),
            "better": sum(a["accuracy"]["mean"] > b["accuracy"]["mean"] for a, b in pairs),
            "equal": sum(a["accuracy"]["mean"] == b["accuracy"]["mean"] for a, b in pairs),
            "frechet": sum(a["frechet_pooled"] < b["frechet_pooled"] for a, b in pairs),
        }
        lines.append(f"| {name} | " + " | ".join(f"{count} of {len(pairs)}" for count in won.values()) + " |")
    return "\n".join(lines)


def mean(cell: dict[str, Any], metric: str, digits: int = 4) -> str:
    """The mean over seed sets."""
    return f"{cell[metric]['mean']:.{digits}f}"
