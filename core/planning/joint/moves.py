"""Small changes of a plan that keep its budget: all that refining tries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .program import Path

SHIFTS = (-2, -1, 1, 2)
"""Grid points by which a step is moved."""

_SLACK = 1e-9
"""Of sums of costs, which are rounded."""

Calls = tuple[tuple[int, int], ...]
"""Grid point and level of each call."""


@dataclass(frozen=True)
class Ground:
    """What plans are made on.

    Args:
        prices: of the jump from point i to point j at a level, as nested lists [i][j][level]; see `best_path`.
        costs: of a call at each level, in dense calls.
        budget: in dense calls.
        levels: that may be used, by their numbers, rising.
    """

    prices: Sequence[Sequence[Sequence[float]]]
    costs: Sequence[float]
    budget: float
    levels: Sequence[int]

    @property
    def points(self) -> int:
        """Of the grid."""
        return len(self.prices)

    def fits(self, calls: Calls) -> bool:
        """Whether the budget pays for them."""
        return sum(self.costs[level] for _, level in calls) <= self.budget + _SLACK

    def path(self, calls: Calls) -> Path:
        """Each call until the next one, the last until the end."""
        ends = [*(place for place, _ in calls[1:]), self.points]
        return tuple((here, there, level) for (here, level), there in zip(calls, ends, strict=True))

    def price(self, calls: Calls) -> float:
        """Of all jumps."""
        return sum(self.prices[here][there][level] for here, there, level in self.path(calls))

    def rates(self, calls: Calls) -> Iterator[tuple[float, float, Calls]]:
        """Every other level of every call: the price that it takes over the cost that it saves, or the price that it
        saves over the cost that it takes; the cost that it takes; and the calls with it.
        """
        for number, (here, there, level) in enumerate(self.path(calls)):
            prices = self.prices[here][there]
            for other in self.levels:
                cost = self.costs[other] - self.costs[level]
                rate = (prices[level] - prices[other]) / cost if cost else 0.0
                if cost:
                    yield rate if math.isfinite(rate) else math.inf, cost, with_call(calls, number, here, other)


def calls_of(path: Path) -> Calls:
    """Without where each jump ends."""
    return tuple((here, level) for here, _, level in path)


def with_call(calls: Calls, number: int, place: int, level: int) -> Calls:
    """One call changed."""
    return (*calls[:number], (place, level), *calls[number + 1 :])


def neighbours(calls: Calls, ground: Ground) -> Iterator[Calls]:
    """All small changes. The first call stays where the noise is, and steps stay in their order."""
    yield from moved(calls, ground)
    for fewer in dropped(calls):
        yield fewer
        yield denser(fewer, ground)
    yield from relevelled(calls, ground)
    for more in inserted(calls, ground):
        cheap = sparser(more, ground)
        if cheap is not None:
            yield cheap


def moved(calls: Calls, ground: Ground) -> Iterator[Calls]:
    """One step moved a little."""
    ends = [*(place for place, _ in calls), ground.points]
    for number, (place, level) in enumerate(calls[1:], 1):
        for shift in SHIFTS:
            if ends[number - 1] < place + shift < ends[number + 1]:
                yield with_call(calls, number, place + shift, level)


def dropped(calls: Calls) -> Iterator[Calls]:
    """One step left out."""
    for number in range(1, len(calls)):
        yield calls[:number] + calls[number + 1 :]


def inserted(calls: Calls, ground: Ground) -> Iterator[Calls]:
    """One step more, in the middle of a gap, at the level of the call before; within the budget or not."""
    for number, (here, there, level) in enumerate(ground.path(calls), 1):
        middle = (here + there) // 2
        if middle > here:
            yield (*calls[:number], (middle, level), *calls[number:])


def relevelled(calls: Calls, ground: Ground) -> Iterator[Calls]:
    """One step a level up or down, and if that is too dear another one made cheaper."""
    for number, (place, level) in enumerate(calls):
        at = ground.levels.index(level)
        for other in (*ground.levels[max(at - 1, 0) : at], *ground.levels[at + 1 : at + 2]):
            changed = with_call(calls, number, place, other)
            if ground.fits(changed):
                yield changed
            else:
                yield from _cheaper_elsewhere(changed, number, ground)


def _cheaper_elsewhere(calls: Calls, but: int, ground: Ground) -> Iterator[Calls]:
    """The next level up at any other step that brings the plan back within the budget."""
    for number, (place, level) in enumerate(calls):
        if number == but:
            continue
        for other in ground.levels[ground.levels.index(level) + 1 :]:
            changed = with_call(calls, number, place, other)
            if ground.fits(changed):
                yield changed
                break


def sparser(calls: Calls, ground: Ground) -> Calls | None:
    """Cheaper calls, those first that cost the least price for what they save, until all fit; None if they cannot."""
    while not ground.fits(calls):
        ways = [(rate, changed) for rate, cost, changed in ground.rates(calls) if cost < 0]
        if not ways:
            return None
        calls = min(ways)[1]
    return calls


def denser(calls: Calls, ground: Ground) -> Calls:
    """Dearer calls, those first that save the most price for what they cost, as long as that fits and helps."""
    while True:
        ways = [
            (rate, changed)
            for rate, cost, changed in ground.rates(calls)
            if cost > 0 and 0 < rate < math.inf and ground.fits(changed)
        ]
        if not ways:
            return calls
        calls = max(ways)[1]
