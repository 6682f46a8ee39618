"""Write the pages of results in docs/, and the table in README.md, from the JSON in results/.

No figure is typed by hand.
"""

from __future__ import annotations

import json
import re
from typing import Any

import engine_tables
import findings
import front_page
import stages_page
from common import DEMOS, RESULTS, ROOT
from families import table as families_table
from quality import show, tables

BLOCK = "<!-- {name}: benchmarks/write_docs.py -->", "<!-- /{name} -->"
"""Around what is written into the README."""


def main() -> None:
    """Rewrite all."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    sections = [HEAD, quality(of_demos(found, "quality"))]
    sections += [sharing(of_demos(found, "sharing")), solver(found["solver"])]
    sections += [speed(found["dit-xl-cpu"], found["dit-digits-cpu"]), families(found["families"])]
    (ROOT / "docs" / "results.md").write_text("\n".join(sections) + "\n", "utf-8")
    parts = [of_demos(found, kind) for kind in ("quality", "sharing", "layers")]
    if len(parts[0]) == len(parts[2]) == len(DEMOS):  # what holds for every model cannot be said of some
        (ROOT / "docs" / "findings.md").write_text(findings.page(*parts), "utf-8")
    methods, ablations = of_demos(found, "methods"), of_demos(found, "ablations")
    if methods or ablations:
        others = (found.get("solver-order"), found.get("exactness"))
        page = engine_tables.page(methods, ablations, of_demos(found, "calibration"), *others)
        (ROOT / "docs" / "engine.md").write_text(page, "utf-8")
    fronts = {name: data for name, data in found.items() if name.startswith("front-")}
    if fronts:
        (ROOT / "docs" / "front.md").write_text(front_page.page(fronts, ROOT / "docs"), "utf-8")
    stages = {kind: of_demos(found, kind) for kind in stages_page.sections()}
    if any(stages.values()):
        (ROOT / "docs" / "stages.md").write_text(stages_page.page(stages), "utf-8")
    into_readme("results", short_table(of_demos(found, "quality")))
    if fronts:
        into_readme("front", front_page.short(fronts))


def into_readme(name: str, text: str) -> None:
    """Put a text between the marks of a block."""
    begin, end = (mark.format(name=name) for mark in BLOCK)
    readme = ROOT / "README.md"
    block = f"{begin}\n{text}\n{end}"
    found = re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, readme.read_text("utf-8"), flags=re.DOTALL
    )
    readme.write_text(found, "utf-8")


HEAD = """# Results

Written by `python benchmarks/write_docs.py` from `benchmarks/results/*.json`; above each table stands the command that
measured it. All of it is the small demo pipelines in `demo/`, in float32 on a CPU, unless a table says otherwise."""


def of_demos(found: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The results of a benchmark for each demo that it was run on."""
    return {name: found[f"{kind}-{name}"] for name in DEMOS if f"{kind}-{name}" in found}


def machine(data: dict[str, Any]) -> str:
    """What it ran on."""
    facts = data["environment"]
    return f"{facts['cpu']}; Python {facts['python']}, torch {facts['torch']}, diffusers {facts['diffusers']}"


def quality(demos: dict[str, dict[str, Any]]) -> str:
    """All cells of each demo, and in words where fewer steps win."""
    parts = [QUALITY]
    for name, data in demos.items():
        parts += [
            f"\n### {name}\n\n`python benchmarks/quality.py {name} --sets {data['sets']} --count {data['count']}`, on "
            f"{machine(data)}. One image is {1 / (data['sets'] * data['count']):.1%} of accuracy.",
            tables(data),
            "\nWho wins:\n",
            *(f"- {line}" for line in winners(data)),
        ]
    return "\n".join(parts)


QUALITY = """
## Quality at equal cost

Same prompts, seeds, guidance and sampler for all rows of a demo. *measured*: error table, exact dynamic programming,
check on held-out seeds, allocated anew for each number of steps, under the MACs that *uniform* executes. *uniform*: the
same bank at one level. *magnitude*: one level and one share for all layers, kept by magnitude, not compensated. *fewer
steps* (n): dense with n steps. MSE is of the latents. Accuracy is the share of images that the demo's judge finds to be
what was asked for: the class of a digit; or for the shapes every object with its shape, colour and size, and their
relation, of captions that training never saw. Frechet distance is in the judge's 32 features to real images, a seed set
at a time and pooled (few samples overstate it; compare within a column)."""


def winners(data: dict[str, Any]) -> list[str]:
    """For each budget: the better of the measured schedule and fewer steps, metric by metric."""
    lines = []
    cells = data["cells"]
    for key, ours in cells.items():
        steps, target, name = key.split("/")
        if name != "measured":
            continue
        fewer, uniform = cells[f"{steps}/{target}/fewer steps"], cells[f"{steps}/{target}/uniform"]
        paired = "fewer steps" if fewer["latent_mse"]["mean"] < ours["latent_mse"]["mean"] else "pruning"
        frechet = "fewer steps" if fewer["frechet_pooled"] < ours["frechet_pooled"] else "pruning"
        accuracy = ours["accuracy"]["mean"] - fewer["accuracy"]["mean"]
        gain = 1 - ours["latent_mse"]["mean"] / uniform["latent_mse"]["mean"]
        lines.append(
            f"{steps} steps, {target} of the MACs: paired error {paired}, Frechet distance {frechet}, accuracy "
            f"{accuracy:+.1%} for pruning; the measured schedule has {gain:.0%} less paired error than uniform."
        )
    return lines


def sharing(demos: dict[str, dict[str, Any]]) -> str:
    """Shared and per-stage orders and consumers."""
    lines = ["\n## Shared or per stage\n\n`python benchmarks/sharing.py`\n"]
    for name, data in demos.items():
        targets = [f"uniform {target}" for target in data["targets"]]
        lines += [
            f"\n{name}: latent MSE at {data['steps']} steps, {data['sets']} seed sets of {data['images']}; 5 equal "
            "stages.\n",
            f"| prompts | order | consumers | {' | '.join(targets)} | measured 0.67 | memory / dense | switch ms "
            "| bank MiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in data["rows"]:
            errors = [show(row[key]) if key in row else "" for key in (*targets, "measured 0.67")]
            facts = [
                f"{row[key]:.2f}" if key in row else "" for key in ("resident_over_dense", "switch_ms", "bank_mib")
            ]
            cells = [str(row["prompts"]), row["order"], row["consumers"], *errors, *facts]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, SHARING_VERDICT])


SHARING_VERDICT = """
Shared orders and consumers are the default: such a bank runs any schedule at any number of steps, is the smallest, and
switches for nothing. Those per stage cost a bank that is larger by the number of stages; what they win or lose in error
is above."""


def solver(data: dict[str, Any]) -> str:
    """Exactness of the compensation."""
    rows = data["rows"]
    faster = sorted(row["each_ms"] / row["once_ms"] for row in rows)
    worst = max(row["worst"] for row in rows)
    return (
        "\n## Compensation\n\n`python benchmarks/solver.py`\n\n"
        f"Against float64 least squares on the kept columns, for {len(rows)} consumers (real and random) at "
        f"{len(data['levels'])} levels: worst relative difference {worst:.0e}. One Cholesky for all levels is "
        f"{faster[0]:.1f} to {faster[-1]:.1f} times as fast as a solve a level."
    )


def speed(xl: dict[str, Any], demo: dict[str, Any]) -> str:
    """Timings of DiT-XL/2 and of the demo's images."""
    timed, images = xl["levels"], demo["images"]
    facts = timed["environment"]
    lines = [
        "\n## Speed and memory\n",
        "`stageprune bench dit-xl --batch 4 --rounds 3 --levels 0,0.3,0.5 --out "
        "benchmarks/results/dit-xl-cpu.json` (DiT-XL/2-256, random weights)\n",
        f"Batch {timed['batch']}, {timed['rounds']} interleaved rounds, medians; {facts['device']}, {facts['threads']} "
        f"threads, {facts['dtype']}.\n",
        "| sparsity | ms | speed-up | MAC-ideal | measured / ideal | weights held / dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in timed["levels"]:
        lines.append(
            f"| {row['sparsity']:g} | {row['milliseconds']:.0f} | {row['speedup']:.2f} | {row['ideal']:.2f} | "
            f"{row['efficiency']:.2f} | {row['bytes'] / timed['dense_bytes']:.2f} |"
        )
    lines += [
        f"\nA switch takes {timed['switch_milliseconds']:.2f} ms; five of them are "
        f"{timed['switch_share_of_a_20_step_image']:.4%} of a 20-step image. With all of these levels resident: "
        f"{timed['all_bytes'] / timed['dense_bytes']:.2f} x dense.",
        "\n`stageprune bench demo/dit-digits --bundle out/demo/bundle --batch 16 --out "
        "benchmarks/results/dit-digits-cpu.json`\n",
        "| stage | calls | dense ms | pruned ms | speed-up | MAC-ideal |",
        "|---|---|---|---|---|---|",
    ]
    names = [*map(str, range(len(images["stages"]))), "image"]
    for name, row in zip(names, [*images["stages"], images["image"]], strict=True):
        lines.append(
            f"| {name} | {row['calls']} | {row['dense_ms']:.0f} | {row['pruned_ms']:.0f} | {row['speedup']:.2f} | "
            f"{row['ideal']:.2f} |"
        )
    return "\n".join(lines)


def families(data: dict[str, Any]) -> str:
    """What each architecture offers."""
    return "\n".join(
        [
            f"\n## Supported architectures\n\n`{data['command']}`\n",
            "One forward of one sample at the pipeline's own size, on the meta device; in brackets an independent "
            "estimate for the",
            "published architecture. *At half*: about half of the prunable MACs gone, by the groups' own figures "
            "(planned) and by",
            "torch's counter on the sliced model (counted). *MiB*: by how much planning raised the process's peak "
            "memory; no",
            "weight is made. *Slice = mask*: largest relative difference on a tiny model of the kind, in float32.\n",
            *families_table(data["rows"]),
            "\nThe second table is the highest possible speed-up at 20 / 30 / 50 %, every stage pruned, were MACs all "
            "that counts.",
        ]
    )


SHORT = ("dense", "measured", "uniform", "magnitude", "fewer steps")
"""Variants of the README's table."""


def short_table(demos: dict[str, dict[str, Any]]) -> str:
    """The README's table: all demos at 0.67 of the MACs, 20 steps and 4 steps."""
    counts = ", ".join(f"{data['sets']} x {data['count']} ({name})" for name, data in demos.items())
    cpu = next(iter(demos.values()))["environment"]["cpu"]
    lines = [
        "Paired MSE / accuracy / Frechet distance at 0.67 of the MACs, on the pipelines in `demo/`; "
        f"{cpu}, float32; seed sets x images a cell: {counts} (`python benchmarks/quality.py`):\n",
        f"| pipeline, steps | {' | '.join(SHORT)} |".replace("measured", "**measured**"),
        f"|---|{'---|' * len(SHORT)}",
    ]
    for name, data in demos.items():
        for steps in (20, 4):
            cells = {key.split("/")[2]: cell for key, cell in data["cells"].items() if _is_short(key, steps)}
            lines.append(f"| {name}, {steps} | {' | '.join(_short(each, cells[each]) for each in SHORT)} |")
    return "\n".join(lines)


def _is_short(key: str, steps: int) -> bool:
    run, target, _ = key.split("/")
    return int(run) == steps and float(target) in (1.0, 0.67)


def _short(variant: str, cell: dict[str, Any]) -> str:
    error = "-" if variant == "dense" else f"{cell['latent_mse']['mean']:.4f}"
    text = f"{error} / {cell['accuracy']['mean']:.3f} / {cell['frechet_pooled']:.2f}"
    return f"{text} ({cell['steps_run']} steps, {cell['share']:.2f})" if variant == "fewer steps" else text


if __name__ == "__main__":
    main()
