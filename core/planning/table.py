"""The error table: what it costs, in final error, to run one stage at one level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import progress
from ..schedule import StageSchedule
from .probes import Probes


@dataclass(frozen=True)
class ErrorTable:
    """Mean squared error of the final latents when one stage alone runs at a level, measured on probes.

    Args:
        edges: stage boundaries in tau, from 1 to 0.
        sparsities: the levels.
        errors: per stage and level; 0 for dense.
        standard_errors: of those means.
        probes: number of probes.
        steps: sampling steps.
    """

    edges: tuple[float, ...]
    sparsities: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    standard_errors: tuple[tuple[float, ...], ...]
    probes: int
    steps: int

    def predict(self, levels: Sequence[float]) -> float:
        """Error of a schedule if the stages' errors simply add up."""
        return sum(row[self.sparsities.index(level)] for row, level in zip(self.errors, levels, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and reports."""
        return dict(self.__dict__)

    def __str__(self) -> str:
        lines = [
            f"Error table ({self.probes} probes, {self.steps} steps): final latent MSE with one stage pruned alone"
        ]
        lines.append("  tau            " + "".join(f"{sparsity:>11.3f}" for sparsity in self.sparsities))
        for stage, row in enumerate(self.errors):
            high, low = self.edges[stage], self.edges[stage + 1]
            lines.append(f"  {high:.3f} - {low:.3f}  " + "".join(f"{error:>11.2e}" for error in row))
        return "\n".join(lines)


def measure_error_table(probes: Probes, sparsities: Sequence[float], steps: int) -> ErrorTable:
    """Run every stage at every level alone along the cached dense trajectories.

    Args:
        probes: the reference trajectories; their stages are the table's rows.
        sparsities: the levels, the first 0.
        steps: the steps that the probes ran (recorded only).
    """
    stages: StageSchedule = probes.dense
    count = len(stages.stages)
    means, deviations = [], []
    with progress.bar(count * (len(sparsities) - 1), "measuring stages", "run") as bar:
        for stage in range(count):
            errors = [torch.zeros(1)]
            for sparsity in sparsities[1:]:
                errors.append(probes.errors([sparsity if i == stage else 0.0 for i in range(count)]))
                bar.update(1)
            means.append(tuple(float(error.mean()) for error in errors))
            deviations.append(tuple(_standard_error(error) for error in errors))
    probes_run = sum(len(batch.final) for batch in probes.batches)
    return ErrorTable(tuple(stages.edges), tuple(sparsities), tuple(means), tuple(deviations), probes_run, steps)


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
