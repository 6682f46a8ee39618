"""What each supported architecture offers to pruning: groups, shares of parameters and of MACs, bounds of the speed-up.

    python benchmarks/families.py

Everything full-size is counted on the meta device, where tensors have shapes but no memory. What the table says of the
cost of a pruned model is checked by slicing that model and counting its forward anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import ROOT, with_peak, write_results
from stageprune.core.groups import (
    DenoiserCost,
    Group,
    check_slice_equals_mask,
    family_of,
    find_groups,
    measure_cost,
    width_groups,
)
from stageprune.core.groups.check import sliced
from stageprune.core.groups.layer import layer_at, norm_at, outputs_of, taps_of
from stageprune.core.host import InputSize
from stageprune.core.hosts.diffusers.fullsize import FULL_SIZE, Architecture
from stageprune.core.pruning.levels import kept_counts

SPARSITIES = (0.2, 0.3, 0.5)
CHOICES = {
    "FFN": ("neuron",),
    "heads": ("head",),
    "both": ("neuron", "head"),
    "both + channels": ("neuron", "head", "channel"),
}
# Independent estimates for the published architectures, to compare with: parameters in billions; TFLOP (two a MAC) of
# one forward of one sample; percent of it in feed-forwards and in attention (projections and scores); bounds of the
# speed-up at 20 / 30 / 50 %.
REFERENCE: dict[str, dict[str, Any]] = {
    "dit-xl": {"parameters": 0.750, "tflop": 0.237, "neuron": 64.1, "head": 35.7,
               "FFN": (1.15, 1.24, 1.47), "heads": (1.08, 1.12, 1.22), "both": (1.25, 1.43, 2.00)},
    "sd15": {"parameters": 0.860, "tflop": 0.803, "neuron": 19.1, "head": 25.6,
             "FFN": (1.04, 1.06, 1.11), "heads": (1.05, 1.08, 1.15), "both": (1.10, 1.16, 1.29)},
    "sdxl": {"parameters": 2.567, "tflop": 6.761, "neuron": 41.7, "head": 33.2,
             "FFN": (1.09, 1.14, 1.26), "heads": (1.07, 1.11, 1.20), "both": (1.18, 1.29, 1.60)},
    "sd3-medium": {"parameters": 2.028, "tflop": 8.904, "neuron": 44.9, "head": 55.0,
                   "FFN": (1.10, 1.16, 1.29), "heads": (1.12, 1.20, 1.38), "both": (1.25, 1.43, 2.00)},
    "sd35-medium": {"parameters": 2.243, "tflop": 11.250, "neuron": 35.6, "head": 64.4},
    "sd35-large": {"parameters": 8.057, "tflop": 31.12, "neuron": 51.1, "head": 48.9,
                   "FFN": (1.11, 1.18, 1.34), "heads": (1.11, 1.17, 1.32), "both": (1.25, 1.43, 2.00)},
    "flux-dev": {"parameters": 11.90, "tflop": 74.39, "neuron": 53.3, "head": 46.7,
                 "FFN": (1.12, 1.19, 1.36), "heads": (1.10, 1.16, 1.30), "both": (1.25, 1.43, 2.00)},
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "dit-xl": ("dit", {}),
    "sd15": ("sd15", {}),
    "sdxl": ("sdxl", {}),
    "sd3-medium": ("sd3", {}),
    "sd35-medium": ("sd35", {}),
    "sd35-large": ("sd35", {"dual_attention_layers": ()}),
    "flux-dev": ("flux", {"guidance_embeds": True}),
}
"""Architecture -> the tests' tiny version of it, on which slicing is compared with masking."""


def main() -> None:
    """Measure, print, write."""
    rows = {name: measure(name, architecture) for name, architecture in FULL_SIZE.items()}
    print("\n".join(table(rows)))
    facts = {"command": "python benchmarks/families.py", "reference": "independent estimates, not measured here"}
    path = write_results("families", {**facts, "rows": rows})
    print(f"\nwritten to {path.relative_to(ROOT)}")


def measure(name: str, architecture: Architecture) -> dict[str, Any]:
    """One architecture's row."""
    (denoiser, groups, cost, kept), seconds, grown = with_peak(lambda: plan(architecture))
    assert all(tensor.is_meta for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    counted = count_sliced(denoiser, groups, kept)
    asked = cost.macs(kept)
    assert abs(counted / asked - 1) < 0.01, f"{name}: {asked:,} MACs by the groups, {counted:,} by the counter"
    kinds = {kind: kind_row(denoiser, groups, cost, kind) for kind in ("head", "neuron", "channel")}
    shares = {kind: row["macs_share"] for kind, row in kinds.items() if row}
    return {
        "title": architecture.title,
        "pixels": architecture.pixels,
        "parameters": parameters_of(denoiser),
        "gmacs": cost.dense / 1e9,
        "tokens": dict(family_of(denoiser).tokens(denoiser)),
        "blocks": next((group.size for group in groups if group.kind == "block"), 0),
        "kinds": {kind: row for kind, row in kinds.items() if row},
        "half": {"planned_gmacs": asked / 1e9, "counted_gmacs": counted / 1e9, "speedup": cost.dense / counted},
        "bounds": bounds(shares),
        "reference": REFERENCE[name],
        "planning_seconds": seconds,
        "planning_mib": grown / 2**20,
        "slice_equals_mask": tiny_check(name),
    }


def plan(architecture: Architecture) -> tuple[nn.Module, list[Group], DenoiserCost, dict[str, int]]:
    """All that is decided before a weight is touched: groups, cost, kept counts at half the MACs."""
    denoiser = architecture.build("meta")
    groups = find_groups(denoiser)
    cost = measure_cost(denoiser, groups)
    counts = kept_counts(width_groups(groups), cost, (0.0, 0.5))
    return denoiser, groups, cost, {name: levels[1] for name, levels in counts.items()}


def count_sliced(denoiser: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]) -> int:
    """MACs of one forward of the model with only the kept units physically there."""
    keep = {name: torch.arange(count) for name, count in kept.items()}
    inputs = family_of(denoiser).example_inputs(denoiser)
    with sliced(denoiser, groups, keep), FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**inputs)
    return counter.get_total_flops() // 2


def kind_row(denoiser: nn.Module, groups: Sequence[Group], cost: DenoiserCost, kind: str) -> dict[str, Any]:
    """Groups and units of one kind, and their shares of the model; empty if it has none."""
    chosen = [group for group in groups if group.kind == kind]
    if not chosen:
        return {}
    return {
        "groups": len(chosen),
        "units": sum(group.size for group in chosen),
        "parameters_share": sum(prunable(denoiser, group) for group in chosen) / parameters_of(denoiser),
        "macs_share": sum(cost.units[group.name] * group.size for group in chosen) / cost.dense,
    }


def prunable(denoiser: nn.Module, group: Group) -> int:
    """Parameters that go with all units of a group: rows and biases, columns, norms."""
    rows = sum(parameters_of(layer_at(denoiser, producer.path)) for producer in group.producers)
    norms = sum(parameters_of(norm_at(denoiser, path)) for path in group.companions)
    consumers = [layer_at(denoiser, consumer.path) for consumer in group.consumers]
    return rows + norms + sum(outputs_of(layer) * taps_of(layer) * group.channels for layer in consumers)


def parameters_of(module: nn.Module) -> int:
    """Parameters of a module and its children."""
    return sum(parameter.numel() for parameter in module.parameters())


def bounds(shares: Mapping[str, float]) -> dict[str, list[float]]:
    """Choice of kinds -> highest possible speed-up at each sparsity, were MACs all that counts: 1 / (1 - s share)."""
    totals = {choice: sum(shares.get(kind, 0.0) for kind in kinds) for choice, kinds in CHOICES.items()}
    if "channel" not in shares:
        del totals["both + channels"]
    return {choice: [1 / (1 - s * share) for s in SPARSITIES] for choice, share in totals.items()}


def tiny_check(name: str) -> dict[str, Any]:
    """Slice == mask on a tiny random model of the same architecture, for all groups and three choices of units."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo

    base, changes = TINY[name]
    denoiser = zoo.make_denoiser(base, **changes)
    size = InputSize(8, 8) if base == "flux" else None  # its own is the full size
    checks = [check for seed in range(3) for check in check_slice_equals_mask(denoiser, seed=seed, size=size)]
    return {"checks": len(checks), "largest_error": max(check.error for check in checks)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Two Markdown tables: what there is to prune, and what it can bring; the independent estimates in brackets."""
    columns = ("params B", "GMACs", "groups (units) of heads, FFN, channels", "% of params", "% of MACs")
    columns += ("GMACs at half: planned / counted", "planning s", "MiB", "slice = mask")
    lines = [f"| architecture | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row['title']} {row['pixels']} | {' | '.join(_facts(row))} |" for row in rows.values()]
    lines += ["", f"| architecture | {' | '.join(CHOICES)} |", "|---" * (len(CHOICES) + 1) + "|"]
    for row in rows.values():
        cells = [_bound(row["bounds"].get(choice), row["reference"].get(choice)) for choice in CHOICES]
        lines.append(f"| {row['title']} {row['pixels']} | {' | '.join(cells)} |")
    return lines


def _facts(row: Mapping[str, Any]) -> list[str]:
    """Cells of the first table."""
    kinds, half, reference = row["kinds"], row["half"], row["reference"]
    return [
        f"{row['parameters'] / 1e9:.3f} [{reference['parameters']:.3f}]",
        f"{row['gmacs']:.1f} [{reference['tflop'] * 500:.1f}]",
        ", ".join(f"{part['groups']} ({part['units']:,})" for part in kinds.values()),
        ", ".join(f"{100 * part['parameters_share']:.1f}" for part in kinds.values()),
        ", ".join(f"{100 * part['macs_share']:.1f}{_bracket(reference.get(kind))}" for kind, part in kinds.items()),
        f"{half['planned_gmacs']:.1f} / {half['counted_gmacs']:.1f}",
        f"{row['planning_seconds']:.1f}",
        f"{row['planning_mib']:.0f}",
        f"{row['slice_equals_mask']['largest_error']:.0e}",
    ]


def _bracket(value: float | None) -> str:
    return "" if value is None else f" [{value}]"


def _bound(ours: Sequence[float] | None, reference: Sequence[float] | None) -> str:
    if ours is None:
        return ""
    text = " / ".join(f"{value:.2f}" for value in ours)
    return text if reference is None else f"{text} [{' / '.join(f'{value:.2f}' for value in reference)}]"


if __name__ == "__main__":
    main()
