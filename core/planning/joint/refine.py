"""Small changes of a plan, judged by real runs: what prices of single jumps do not tell.

Prices add up the errors of jumps as if each began at the dense trajectory, and as if the solver were of first order.
Nearby plans differ by less than that mistakes, so some of them are run, the cheapest by their prices and others at
random, the best is kept, and so on from there until nothing nearby is better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random

from torch import Tensor

from .moves import Ground, calls_of, neighbours
from .program import Path

ALLOWANCE = 6400
"""Denoiser steps of the dense model that refining one plan may take: plans of few calls are cheap to run, and gain the
most."""

LEAST_RUNS = 10
"""However dear a run is."""

TRIES = 10
"""Neighbours that are run before the best is moved to."""

SEED = 0
"""Of what is drawn at random: the same call gives the same plan."""


def refine(
    path: Path,
    prices: Tensor,
    costs: Sequence[float],
    budget: float,
    error_of: Callable[[Path], float],
    levels: Sequence[int] | None = None,
    runs: int = LEAST_RUNS,
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
        runs: of neighbours, at most.
        tries: runs before the best is moved to.
    """
    ground = Ground(prices.tolist(), costs, budget, range(len(costs)) if levels is None else sorted(levels))
    best, least, random = path, error_of(path), Random(SEED)
    met = {path}
    while runs > 0:
        near = {ground.path(calls) for calls in neighbours(calls_of(best), ground)} - met
        chosen = _some(near, ground, min(tries, runs), random)
        if not chosen:
            break
        met.update(chosen)
        runs -= len(chosen)
        error, nearest = min((error_of(each), each) for each in chosen)
        if error < least:
            best, least = nearest, error
    return best, least


def runs_within(probes: int, budget: float) -> int:
    """Plans that a refinement may run.

    Args:
        probes: that each runs on.
        budget: of a plan, in dense calls.
    """
    return max(int(ALLOWANCE / (probes * budget)), LEAST_RUNS)


def _some(near: Collection[Path], ground: Ground, tries: int, random: Random) -> list[Path]:
    """Half of them the cheapest, half drawn from the others: prices are a guess, and always make the same mistakes."""
    ranked = sorted(near, key=lambda each: (ground.price(calls_of(each)), each))
    cheapest, others = ranked[: tries - tries // 2], ranked[tries - tries // 2 :]
    return cheapest + random.sample(others, min(tries - len(cheapest), len(others)))
