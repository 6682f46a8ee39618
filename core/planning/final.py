"""The last choice among good candidates: on fresh probes, round by round, until they can be told apart.

The best of many candidates on a handful of probes is partly the luckiest, the more so where the errors of few images
make up most of a mean. So the best few are run once more, each on the same new probes, and whichever is clearly behind
is given up (racing, as of Maron and Moore, "Hoeffding races", 1993, by standard errors of paired differences).

What a choice must not be worse than races too, as a rival. The best rival is taken unless another is ahead of it by
more than chance: better to do what another way does than to lose to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fitness import Fitness

FINALISTS = 4
ROUNDS = (4, 12)
"""Rounds of fresh probes at most, where each has many and where each has few."""

PROBES = 96
"""Probes that a race may take if it can: on fewer, what few images do decides."""

CLEAR = 2.5
"""Standard errors of the difference to the best by which a candidate must be behind to be given up; more of them where
they are of few probes (`clear_by`).
"""

AHEAD = 1.0
"""Standard errors of the difference by which a candidate must be ahead of the best rival to be the choice: enough that
few are chosen that are worse, and not so many that gains are given away where errors of single images differ much.
"""


def rounds_for(probes: int) -> int:
    """How many rounds of so many probes a race takes at most."""
    least, most = ROUNDS
    return min(most, max(least, math.ceil(PROBES / probes)))


def clear_by(probes: int) -> float:
    """As `CLEAR`, of so many probes: the quantile of Student's t in place of the normal distribution's.

    Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), its first two terms.
    """
    freedom = max(probes - 1, 1)
    first, second = CLEAR**3 + CLEAR, 5 * CLEAR**5 + 16 * CLEAR**3 + 3 * CLEAR
    return CLEAR + first / (4 * freedom) + second / (96 * freedom**2)


@dataclass
class Finalist:
    """A candidate of the last choice.

    Args:
        number: among the candidates.
        rounds: what the fitness keeps of each round's probes.
    """

    number: int
    rounds: list[Tensor] = field(default_factory=list)

    @property
    def statistics(self) -> Tensor:
        """Of all probes so far."""
        return torch.cat(self.rounds)

    def value(self, fitness: Fitness) -> float:
        """The fitness over all probes so far; infinite if it is no number."""
        found = fitness.reduce(self.statistics)
        return found if math.isfinite(found) else math.inf


def race(
    count: int,
    statistics_of: Callable[[Sequence[int], int], Sequence[Tensor]],
    fitness: Fitness,
    rounds: int,
    rivals: Collection[int] = (),
) -> list[tuple[int, float]]:
    """Candidates by their number, the choice first, each with its fitness over the probes that it ran.

    The choice is the best of those that are left, or the best rival among them if that is hardly behind. Those that
    were given up come last, the earliest at the end: their values are of fewer probes.

    Args:
        count: of candidates, at least one.
        statistics_of: numbers of candidates, round -> for each what the fitness keeps of this round's probes, which are
            the same for all candidates, shape (probes, numbers).
        fitness: what is less the better a candidate is.
        rounds: at most; `rounds_for` says how many.
        rivals: numbers of those that another must be ahead of by `AHEAD` to be the choice.
    """
    racing, given_up = [Finalist(number) for number in range(count)], list[Finalist]()
    for index in range(rounds):
        found = statistics_of([each.number for each in racing], index)
        for each, statistics in zip(racing, found, strict=True):
            each.rounds.append(statistics)
        racing.sort(key=lambda each: each.value(fitness))
        behind = [each for each in racing[1:] if _clearly_behind(each, racing[0], fitness)]
        racing = [each for each in racing if each not in behind]
        given_up = behind + given_up
        if len(racing) == 1:
            break
    return [(each.number, each.value(fitness)) for each in (*_choice_first(racing, fitness, rivals), *given_up)]


def _choice_first(racing: Sequence[Finalist], fitness: Fitness, rivals: Collection[int]) -> list[Finalist]:
    """Those that are left, the best first, or the best rival if it is hardly behind."""
    rival = next((each for each in racing if each.number in rivals), racing[0])
    choice = racing[0] if _behind(rival, racing[0], fitness, AHEAD) else rival
    return [choice, *(each for each in racing if each is not choice)]


def _clearly_behind(candidate: Finalist, best: Finalist, fitness: Fitness) -> bool:
    return _behind(candidate, best, fitness, clear_by(len(best.statistics)))


def _behind(candidate: Finalist, best: Finalist, fitness: Fitness, errors: float) -> bool:
    """Whether a candidate is behind by more than so many standard errors, as far as its probes can tell."""
    value, least = candidate.value(fitness), best.value(fitness)
    if math.isinf(value):
        return True
    if len(best.statistics) <= fitness.probes:  # too few to know how far off that is
        return False
    return value - least > errors * fitness.standard_error(candidate.statistics, best.statistics)
