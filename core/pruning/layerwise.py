"""Per-layer allocation inside a level: each group gives up what the samples can best spare.

The same share in every group is what OBS-Diff does, and what local losses of the layers did not improve on. What does
is the loss at the *end*: prune one group alone, and see how far the samples move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..groups import DenoiserCost, Group
from .levels import DEFAULT_WIDTHS, Widths

GRID = (0.125, 0.25, 0.5, 0.75, 0.875)
"""Shares of a group's units that are removed to measure it; between them errors are interpolated."""

POWERS = {"squares": 1.0, "lengths": 0.5}
"""How errors of groups add up: as squares if they are independent, as lengths if they point the same way."""

UNIFORM = "uniform"

WORST = 1e30
"""Counts for an infinite error: such removals come last."""


@dataclass(frozen=True)
class Sensitivity:
    """What the samples lose when one group alone keeps fewer units.

    Args:
        counts: group name -> kept units, falling from all of them.
        errors: group name -> mean squared error of the samples at each of these counts; the first is 0. Infinite where
            the samples are not finite (half precision may overflow).
    """

    counts: Mapping[str, tuple[int, ...]]
    errors: Mapping[str, tuple[float, ...]]


class _Step(NamedTuple):
    """Consecutive removals of a group at one price."""

    slope: float  # error per MAC
    group: str
    place: int  # in its group
    until: int  # kept units at the end


def grid_counts(group: Group, widths: Widths) -> tuple[int, ...]:
    """Kept units at which a group is measured, falling from all of them to the least."""
    unit, least = widths.unit(group), widths.least(group)
    rounded = (max(round(group.size * (1 - share) / unit) * unit, least) for share in GRID)
    return tuple(sorted({group.size, *(count for count in rounded if count < group.size)}, reverse=True))


def spread(
    groups: Sequence[Group],
    cost: DenoiserCost,
    sparsities: Sequence[float],
    sensitivity: Sensitivity,
    power: float = 1.0,
    widths: Widths = DEFAULT_WIDTHS,
) -> dict[str, tuple[int, ...]]:
    """Kept units of each group at each level, so that the sum of errors is least: always the removal with the least
    error per MAC next, along the lower convex hull of each group's errors.

    On the hulls that is the optimum wherever a step ends, and the levels are nested, as they must be, without being
    made so. A level removes at least the asked share of the groups' MACs, and as little more as its units allow.

    Args:
        groups: heads, neurons and channels.
        cost: MACs of the denoiser.
        sparsities: level sparsities, rising, the first 0.
        sensitivity: of the groups.
        power: errors are added up as `error ** power`.
        widths: which are allowed.
    """
    steps = sorted(step for group in groups for step in _steps(group, cost.units[group.name], sensitivity, power))
    units = {group.name: widths.unit(group) for group in groups}
    now = {group.name: group.size for group in groups}
    total = sum(cost.units[group.name] * group.size for group in groups)
    kept: dict[str, list[int]] = {group.name: [] for group in groups}
    gone = 0
    for sparsity in sparsities:
        gone = _remove(now, steps, units, cost.units, gone, math.ceil(sparsity * total))
        for name, count in now.items():
            kept[name].append(count)
    return {name: tuple(counts) for name, counts in kept.items()}


def _steps(group: Group, macs: int, sensitivity: Sensitivity, power: float) -> Iterator[_Step]:
    """The lower convex hull of a group's errors, steepest last."""
    counts = sensitivity.counts[group.name]
    errors = [min(error, WORST) ** power for error in sensitivity.errors[group.name]]
    hull = [0]
    for point in range(1, len(counts)):
        while len(hull) > 1 and _slope(counts, errors, hull[-1], point) <= _slope(counts, errors, hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    for place, (begin, end) in enumerate(pairwise(hull)):
        yield _Step(_slope(counts, errors, begin, end) / macs, group.name, place, counts[end])


def _slope(counts: Sequence[int], errors: Sequence[float], begin: int, end: int) -> float:
    return (errors[end] - errors[begin]) / (counts[begin] - counts[end])


def _remove(
    now: dict[str, int],
    steps: Sequence[_Step],
    units: Mapping[str, int],
    macs: Mapping[str, int],
    gone: int,
    target: int,
) -> int:
    """Take units away, cheapest first, until `target` MACs are gone; those that would overshoot are left to the end,
    when the smallest that is enough closes the gap.
    """
    if gone >= target:  # the level before had to take more than it was asked for
        return gone
    closed: set[str] = set()  # groups whose next unit is too large; a later, dearer step of theirs must wait for it
    for step in steps:
        if step.group in closed or now[step.group] <= step.until:
            continue
        size = units[step.group]
        whole = -(-(now[step.group] - step.until) // size)  # the first may be smaller: a width need not be a multiple
        fits = min(whole, (target - gone) // (size * macs[step.group]))
        if fits < whole:
            closed.add(step.group)
        if fits:
            after = step.until + (whole - fits) * size
            gone += (now[step.group] - after) * macs[step.group]
            now[step.group] = after
    if gone >= target:
        return gone
    return gone + _close(now, steps, units, macs, target - gone)


def _close(
    now: dict[str, int], steps: Sequence[_Step], units: Mapping[str, int], macs: Mapping[str, int], missing: int
) -> int:
    """Take the smallest unit that is enough, the cheapest of these; if none is, all are gone already."""
    following: dict[str, int] = {}  # group -> place of its next step among all
    for place, step in enumerate(steps):
        if now[step.group] > step.until:
            following.setdefault(step.group, place)
    sizes = {name: (now[name] - steps[place].until - 1) % units[name] + 1 for name, place in following.items()}
    enough = [
        (size * macs[name], following[name], name) for name, size in sizes.items() if size * macs[name] >= missing
    ]
    if not enough:
        return 0
    size, _, name = min(enough)
    now[name] -= size // macs[name]
    return size


def choose(errors: Mapping[str, Sequence[float]]) -> str:
    """The candidate whose levels err least, by the geometric mean of their measured errors.

    Args:
        errors: candidate -> error of the samples at each level above 0, with all groups pruned.
    """
    means = {
        name: sum(math.log(min(max(error, 1 / WORST), WORST)) for error in each) / len(each)
        for name, each in errors.items()
    }
    return min(means, key=lambda name: (means[name], name))
