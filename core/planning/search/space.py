"""What is searched: one level a stage, under a budget of the calls that the sampler executes."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from ..allocation import Request
from ..snap import scaled

Genome = tuple[int, ...]
"""A level of the bank for each stage, noisiest first; 0 is dense."""


@dataclass(frozen=True)
class Space:
    """All genomes whose executed cost stays within the limit.

    Args:
        sparsities: of the levels, rising from 0.
        costs: of one denoiser call at each level, in the target's unit.
        calls: denoiser calls of each stage.
        limit: largest cost of all calls.
    """

    sparsities: tuple[float, ...]
    costs: tuple[int, ...]
    calls: tuple[int, ...]
    limit: int

    @classmethod
    def of(cls, request: Request) -> Space:
        """That of an allocation's arguments. AllocationError if no level is cheap enough."""
        request.budget.uniform_level()
        sparsities = request.bank.sparsities
        costs = tuple(request.budget.costs[sparsity] for sparsity in sparsities)
        return cls(sparsities, costs, request.calls, request.limit)

    @property
    def top(self) -> int:
        """The highest level."""
        return len(self.sparsities) - 1

    def cost(self, genome: Genome) -> int:
        """Of all calls."""
        return sum(count * self.costs[level] for count, level in zip(self.calls, genome, strict=True))

    def fits(self, genome: Genome) -> bool:
        """Whether the genome is within the budget."""
        return self.cost(genome) <= self.limit

    def levels(self, genome: Genome) -> tuple[float, ...]:
        """Sparsities of a genome."""
        return tuple(self.sparsities[level] for level in genome)

    def genome(self, levels: Sequence[float]) -> Genome:
        """Inverse of `levels`, for sparsities that the bank has."""
        return tuple(self.sparsities.index(level) for level in levels)

    def denser(self, genome: Genome) -> Iterator[Genome]:
        """The genomes that run one stage denser, by as little as the levels allow, and still fit."""
        for stage, level in enumerate(genome):
            others = (with_level(genome, stage, lower) for lower in range(level - 1, -1, -1))
            nearest = next(filter(self.fits, others), None)
            if nearest is not None:
                yield nearest

    def fill(self, genome: Genome, random: Random) -> Genome:
        """Spend what the genome leaves of the budget on stages drawn at random, until none can be run denser."""
        while options := list(self.denser(genome)):
            genome = random.choice(options)
        return genome

    def draw(self, random: Random) -> Genome:
        """A random genome that fills the budget: sparsities in proportion to exponential weights, as in Diff-ES."""
        weights = [random.expovariate(1.0) for _ in self.calls]
        wanted = scaled(weights, self.calls, dict(zip(self.sparsities, self.costs, strict=True)), self.limit)
        # Rounded up, so that it fits; measured times need not fall with sparsity, so that it may not.
        genome = tuple(min(bisect.bisect_left(self.sparsities, value), self.top) for value in wanted)
        cheapest = self.costs.index(min(self.costs))
        return self.fill(genome if self.fits(genome) else (cheapest,) * len(self.calls), random)


def with_level(genome: Genome, stage: int, level: int) -> Genome:
    """The genome with one stage at another level."""
    return (*genome[:stage], level, *genome[stage + 1 :])
