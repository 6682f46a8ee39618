"""The fast solvers beside slow, obvious ones in float64, on random layers: how far apart are they?

    python benchmarks/exactness.py

The references are those of the tests (`tests/plain.py`). Writes results/exactness.json.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import ROOT, write_results
from stageprune.core.pruning.obs import obs_order
from stageprune.core.pruning.sparse import NM, Share, sparsify

sys.path.insert(0, str(ROOT / "tests"))
from plain import brute_force_order, layer_problem, plain_sparsify, zeros_of
from support import relative

LAYERS = 200
KINDS = ("full", "low rank", "duplicates", "dead")
"""Of inputs: independent, half of them multiples of others, one of them twice, a third of them zero."""

PATTERNS = (NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(2, 5))


def main() -> None:
    """All comparisons."""
    compared = {"greedy order": order, "unstructured": unstructured, "N:M": n_of_m}
    rows = [run(name, compare) for name, compare in compared.items()]
    write_results("exactness", {"layers": LAYERS, "rows": rows})


def run(name: str, compare: Callable[[int, random.Random], dict[str, Any]]) -> dict[str, Any]:
    """One comparison on all layers: the largest difference, what does not agree, what was looked at."""
    draw = random.Random(0)
    found = [compare(seed, draw) for seed in range(LAYERS)]
    row = {
        "name": name,
        "difference": max(each["difference"] for each in found),
        "different": sum(each["different"] for each in found),
        "of": sum(each["of"] for each in found),
        "what": found[0]["what"],
    }
    print(row, flush=True)
    return row


def order(seed: int, draw: random.Random) -> dict[str, Any]:
    """The blocked greedy order against the best removal by an explicit inverse at each step: up to 64 units of one to
    three columns, in one or two consumers.
    """
    units, outputs, kind = draw.randint(2, 64), draw.randint(1, 80), draw.choice(KINDS)
    widths = [draw.randint(1, 3) for _ in range(draw.randint(1, 2))]
    consumers = [layer_problem(seed + i, units * width, outputs, kind) for i, width in enumerate(widths)]
    columns = [torch.arange(units * width).view(units, width) for width in widths]
    got, expected = obs_order(consumers, columns), brute_force_order(consumers, columns)
    return {
        "difference": float(((got.losses - expected.losses).abs() / expected.losses.abs().max()).max()),
        "different": int((got.units != expected.units).sum()),
        "of": units,
        "what": "units in another place",
    }


def unstructured(seed: int, draw: random.Random) -> dict[str, Any]:
    """Against the inverse of what is not yet fixed, anew at each column."""
    weight, hessian = layer_problem(seed, draw.randint(2, 40), draw.randint(1, 12), draw.choice(KINDS))
    pattern, block = Share(draw.uniform(0, 0.95)), draw.choice([1, 4, 7, 128])
    got = with_bias(sparsify(weight, hessian, pattern, block))
    expected = plain_sparsify(weight, hessian, block, zeros_of(pattern))
    return {
        "difference": relative(got, expected),
        "different": int(((got == 0) != (expected == 0)).sum()),
        "of": expected.numel(),
        "what": "weights zero in one only",
    }


def n_of_m(seed: int, draw: random.Random) -> dict[str, Any]:
    """The same, and whether every M weights of every row keep N."""
    pattern = draw.choice(PATTERNS)
    weight, hessian = layer_problem(seed, draw.randint(1, 8) * pattern.of, draw.randint(1, 12), draw.choice(KINDS))
    made, bias = sparsify(weight, hessian, pattern, draw.choice([1, 8, 13, 128]))
    expected = plain_sparsify(weight, hessian, pattern.of, zeros_of(pattern))
    kept = (made != 0).unflatten(1, (-1, pattern.of)).sum(2)
    return {
        "difference": relative(with_bias((made, bias)), expected),
        "different": int((kept != pattern.kept).sum()),
        "of": kept.numel(),
        "what": "groups of M that do not keep N",
    }


def with_bias(layer: tuple[Tensor, Tensor]) -> Tensor:
    """Weight and bias as one matrix."""
    weight, bias = layer
    return torch.cat([weight, bias[:, None]], 1)


if __name__ == "__main__":
    main()
