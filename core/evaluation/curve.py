"""Paired error against executed MACs: every level everywhere, dense runs of fewer steps, and the variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle import Bundle
from ..groups import measure_cost
from .metrics import mse
from .runs import Job, Run, run_variants
from .variants import DENSE, Variant, fewer_steps, uniform_variant

CURVE_SAMPLES = 16
"""Samples of the curve: the first ones, to keep it cheap."""


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curve.

    Args:
        kind: the name of the variant's kind: `uniform`, `fewer steps`, `schedule` or `magnitude`.
        description: which level or how many steps.
        macs_share: executed MACs over those of the dense run at full steps.
        latent_mse: mean squared error of the final latents against dense.
    """

    kind: str
    description: str
    macs_share: float
    latent_mse: float


def error_curve(job: Job, bundle: Bundle, runs: Sequence[Run]) -> tuple[CurvePoint, ...]:
    """Points for every level and for dense runs of the step counts that cost about as much, by rising MACs.

    Args:
        job: what the variants sampled.
        bundle: its bank gives the levels.
        runs: of the variants, dense first; what they hold already is not run again.
    """
    count = min(CURVE_SAMPLES, len(job.seeds))
    dense = runs[0]
    done = {run.variant.description for run in runs}
    every = _curve_variants(job, bundle, dense.variant.steps)
    wanted = [variant for variant in every if variant.description not in done]
    known = [run for run in runs if run.variant.name != DENSE]
    more = run_variants(job.first(count), wanted) if wanted else []
    reference = dense.latents[:count]
    points = [
        CurvePoint(
            run.variant.name,
            run.variant.description,
            run.variant.macs_share,
            float(mse(run.latents[:count], reference).mean()),
        )
        for run in (*known, *more)
    ]
    return tuple(sorted(points, key=lambda point: point.macs_share))


def _curve_variants(job: Job, bundle: Bundle, steps: int) -> list[Variant]:
    """Every level everywhere, and for each the dense run of nearest cost."""
    cost = measure_cost(job.host.denoiser, size=job.host.input_size)
    uniform = [uniform_variant(bundle, cost, sparsity, steps) for sparsity in bundle.bank.sparsities[1:]]
    counts = sorted({max(1, round(steps * variant.macs_share)) for variant in uniform} - {steps})
    return [*uniform, *(fewer_steps(job.host, fewer, steps) for fewer in counts)]
