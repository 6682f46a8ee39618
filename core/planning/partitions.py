"""Where one stage ends and the next begins: equal in tau, in executed steps or in log-SNR, MosaicDiff's, or by hand.

A partition is a function that gives inner boundaries in tau. Add one by decorating it with `register_partition`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import AllocationError
from ..schedule import StageSchedule, executed_calls
from .mosaic import mosaic_boundaries
from .probes import stage_starts
from .sampling import Sampling

Stages = int | str | Sequence[float]
"""A number of stages equal in tau; a partition's name, with a number behind a colon if wanted (`equal-steps:4`); or
inner boundaries in tau, falling.
"""

Partition = Callable[[Sampling, float | None], list[float]]
"""Inner boundaries in tau, falling, for a sampling run and the number behind the colon."""

PARTITIONS: dict[str, Partition] = {}

DEFAULT_STAGES = 5


def register_partition(name: str) -> Callable[[Partition], Partition]:
    """Decorator: make a partition known to `allocate(stages=...)`."""

    def register(function: Partition) -> Partition:
        PARTITIONS[name] = function
        return function

    return register


def divide(
    stages: Stages, sampling: Sampling, levels: Sequence[float] | None = None, empty: str = "refuse"
) -> StageSchedule:
    """The stages of a partition, each visited by some step of the sampler.

    Args:
        stages: a number, a name or boundaries.
        sampling: the run whose steps count.
        levels: sparsity of each stage, noisiest first; dense by default.
        empty: what happens to a stage that no step visits: `refuse` it, or `merge` it into the noisier neighbour (the
            cleaner one if there is none).

    Raises:
        AllocationError: no such partition, a number that it cannot take, or a stage that no step visits.
        ScheduleError: boundaries that do not fall from 1 to 0, or not one level a stage.
    """
    if empty not in EMPTY:
        raise AllocationError(f"`empty` must be one of {', '.join(EMPTY)}; got {empty!r}.")
    boundaries = _boundaries(stages, sampling)
    distinct = _distinct(boundaries) if isinstance(stages, str) else boundaries
    if len(distinct) < len(boundaries) and (empty == "refuse" or levels is not None):
        raise AllocationError(
            f"`stages` {stages!r}: a {sampling.steps}-step run visits too few noise levels for {len(boundaries) + 1} "
            "stages. Use fewer."
        )
    count = len(distinct) + 1
    if levels is not None and len(levels) != count:
        raise AllocationError(f"`levels` must be one a stage: got {len(levels)} for {count} stages.")
    schedule = StageSchedule.from_levels([0.0] * count if levels is None else levels, distinct)
    return EMPTY[empty](schedule, sampling)


def _boundaries(stages: Stages, sampling: Sampling) -> list[float]:
    if isinstance(stages, int):
        stages = f"equal-tau:{stages}"
    if not isinstance(stages, str):
        return [float(boundary) for boundary in stages]
    name, _, text = stages.partition(":")
    if name not in PARTITIONS:
        raise AllocationError(
            f"`stages` must be a number, boundaries in tau, or one of {', '.join(PARTITIONS)}; got {stages!r}."
        )
    try:
        number = float(text) if text else None
    except ValueError:
        raise AllocationError(f"`stages` {stages!r}: what follows the colon must be a number.") from None
    return PARTITIONS[name](sampling, number)


def _distinct(boundaries: Sequence[float]) -> list[float]:
    """Boundaries between which there is room for a stage."""
    return sorted({boundary for boundary in boundaries if 0 < boundary < 1}, reverse=True)


def _refuse(stages: StageSchedule, sampling: Sampling) -> StageSchedule:
    stage_starts(stages, sampling.taus, sampling.steps)
    return stages


def _merge(stages: StageSchedule, sampling: Sampling) -> StageSchedule:
    """A boundary stays where a visited stage begins, so that what no step visits goes to the noisier neighbour."""
    calls = executed_calls(stages, sampling.taus)
    visited = [stage for stage, count in zip(stages.stages, calls, strict=True) if count]
    return StageSchedule.from_levels([stage.sparsity for stage in visited], [stage.high for stage in visited[1:]])


EMPTY: dict[str, Callable[[StageSchedule, Sampling], StageSchedule]] = {"refuse": _refuse, "merge": _merge}


def _count(number: float | None, sampling: Sampling) -> int:
    """Number of stages: as asked for, or 5, fewer if the sampler has fewer steps."""
    if number is None:
        return min(DEFAULT_STAGES, sampling.steps)
    if not math.isfinite(number) or number < 1 or number != int(number):
        raise AllocationError(f"`stages` must be at least 1, and whole; got {number:g}.")
    return int(number)


@register_partition("equal-tau")
def equal_tau(sampling: Sampling, number: float | None = None) -> list[float]:
    """Equal in tau: in training timesteps for DDPM-like models, in sigma for flow matching."""
    count = _count(number, sampling)
    return [(count - index) / count for index in range(1, count)]


@register_partition("equal-steps")
def equal_steps(sampling: Sampling, number: float | None = None) -> list[float]:
    """Equal numbers of denoiser calls of this sampler, to within one; halfway between the calls on either side.

    Calls at one noise level (Heun's second with the next step's first) stay together. Stages for which there are too
    few noise levels begin at 0, where there is no room for them.
    """
    count, taus = _count(number, sampling), sorted(sampling.taus, reverse=True)
    places = [place for place in range(1, len(taus)) if taus[place - 1] > taus[place]]
    wanted = [index * len(taus) / count for index in range(1, min(count, len(places) + 1))]
    boundaries: list[float] = []
    for index, ideal in enumerate(wanted):
        free = places[: len(places) - (len(wanted) - index - 1)]  # the others need a place each
        cut = min(free, key=lambda place: abs(place - ideal))
        boundaries.append((taus[cut - 1] + taus[cut]) / 2)
        places = places[places.index(cut) + 1 :]
    return boundaries + [0.0] * (count - 1 - len(boundaries))


@register_partition("equal-logsnr")
def equal_log_snr(sampling: Sampling, number: float | None = None) -> list[float]:
    """Equal in ln SNR between the noisiest and the cleanest call whose ln SNR is finite (pure noise has none)."""
    count = _count(number, sampling)
    if count == 1:
        return []
    finite = [level.log_snr for level in sampling.host.noise_levels(sampling.taus) if math.isfinite(level.log_snr)]
    if len(set(finite)) < 2:
        raise AllocationError(
            f"`stages` 'equal-logsnr' needs at least two noise levels to divide; a {sampling.steps}-step run has "
            f"{len(set(finite))} of finite log-SNR."
        )
    low, high = min(finite), max(finite)
    return [_tau_at(sampling, low + (high - low) * index / count) for index in range(1, count)]


@register_partition("mosaic")
def mosaic(sampling: Sampling, number: float | None = None) -> list[float]:
    """MosaicDiff's three stages (arXiv 2510.11962): the fast one and its two sides. The number is the threshold M."""
    threshold = sampling.mosaic.threshold if number is None else number
    if not 0 < threshold < 1:
        raise AllocationError(f"`stages` 'mosaic' takes a threshold in (0, 1), got {threshold:g}.")
    return mosaic_boundaries(sampling.mosaic_scores, threshold)


def _tau_at(sampling: Sampling, log_snr: float) -> float:
    """Tau at which ln SNR, which falls with tau, has a value; by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sampling.host.noise_levels([middle])[0].log_snr > log_snr:
            low = middle
        else:
            high = middle
    return high
