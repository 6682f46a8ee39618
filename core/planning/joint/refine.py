"""Small changes of a plan, judged by real runs: what prices of single jumps do not tell.

Prices add up the errors of jumps as if each began at the dense trajectory. Nearby plans differ by less than that
mistakes, so the cheapest of them by their prices are run, the best is kept, and so on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from .program import Path

ROUNDS = 3
TRIES = 10
"""Neighbours that are run in each round."""

SHIFTS = (-2, -1, 1, 2)
"""Grid points by which a step is moved."""

Calls = tuple[tuple[int, int], ...]
"""Grid point and level of each call."""


def refine(
    path: Path,
    prices: Tensor,
    costs: Sequence[float],
    budget: float,
    error_of: Callable[[Path], float],
    levels: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    tries: int = TRIES,
) -> tuple[Path, float]:
    """The best plan that was met, with its error; it is `path` if nothing nearby is better.

    Args:
        path: to begin with.
        prices: see `best_path`; they say which neighbours to try first.
        costs: of a call at each level, in dense calls.
        budget: in dense calls.
        error_of: runs a plan.
        levels: that may be used; all by default.
        rounds: at most.
        tries: runs a round.
    """
    points = prices.shape[0]
    best, least = path, error_of(path)
    met = {path}
    for _ in range(rounds):
        near = {_path(calls, points) for calls in _neighbours(_calls(best), points, costs, budget, levels)} - met
        chosen = sorted(near, key=lambda each: (float(sum(prices[jump] for jump in each)), each))[:tries]
        met.update(chosen)
        found = [(error_of(each), each) for each in chosen]
        if not found or min(found)[0] >= least:
            break
        least, best = min(found)
    return best, least


def _neighbours(
    calls: Calls, points: int, costs: Sequence[float], budget: float, levels: Sequence[int] | None
) -> Iterator[Calls]:
    """One step moved; one step left out; one level changed, and if that is too dear another step made cheaper."""
    allowed = range(len(costs)) if levels is None else sorted(levels)
    ends = [*(place for place, _ in calls), points]
    for number, (place, level) in enumerate(calls):
        if number:  # the first call is where the noise is
            yield calls[:number] + calls[number + 1 :]
            for shift in SHIFTS:
                if ends[number - 1] < place + shift < ends[number + 1]:
                    yield _with(calls, number, place + shift, level)
        at = allowed.index(level)
        for other in (*allowed[max(at - 1, 0) : at], *allowed[at + 1 : at + 2]):
            changed = _with(calls, number, place, other)
            if _cost(changed, costs) <= budget:
                yield changed
            else:
                yield from _cheaper_elsewhere(changed, number, costs, budget, allowed)


def _cheaper_elsewhere(
    calls: Calls, but: int, costs: Sequence[float], budget: float, allowed: Sequence[int]
) -> Iterator[Calls]:
    """The next level up at any other step that brings the plan back within the budget."""
    for number, (place, level) in enumerate(calls):
        if number == but:
            continue
        for other in allowed[allowed.index(level) + 1 :]:
            changed = _with(calls, number, place, other)
            if _cost(changed, costs) <= budget:
                yield changed
                break


def _with(calls: Calls, number: int, place: int, level: int) -> Calls:
    return (*calls[:number], (place, level), *calls[number + 1 :])


def _cost(calls: Calls, costs: Sequence[float]) -> float:
    return sum(costs[level] for _, level in calls)


def _calls(path: Path) -> Calls:
    return tuple((here, level) for here, _, level in path)


def _path(calls: Calls, points: int) -> Path:
    ends = [*(place for place, _ in calls[1:]), points]
    return tuple((here, there, level) for (here, level), there in zip(calls, ends, strict=True))
