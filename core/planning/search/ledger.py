"""What is known of each candidate: the fitness's statistics on its first probes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..fitness import Fitness
from .space import Genome


class Ledger:
    """Statistics of genomes, grown block by block.

    Args:
        fitness: what reduces them.
        rows: genome -> statistics so far, shape (probes, numbers), float64.
    """

    def __init__(self, fitness: Fitness, rows: Mapping[Genome, Tensor] | None = None) -> None:
        self.fitness = fitness
        self.rows: dict[Genome, Tensor] = dict(rows or {})

    def __contains__(self, genome: Genome) -> bool:
        return genome in self.rows

    def probes(self, genome: Genome) -> int:
        """How many probes the genome was run on."""
        return len(self.rows[genome]) if genome in self.rows else 0

    def add(self, genome: Genome, statistics: Tensor) -> None:
        """Statistics of the next probes."""
        known = self.rows.get(genome)
        self.rows[genome] = statistics if known is None else torch.cat([known, statistics])

    def value(self, genome: Genome, probes: int) -> float:
        """Fitness on the first `probes`; infinite where it is no number, as when a level overflows."""
        found = self.fitness.reduce(self.rows[genome][:probes])
        return math.inf if math.isnan(found) else found

    def bound(self, genome: Genome, probes: int) -> float:
        """The least that the fitness on the first `probes` can be, whatever those that are missing give."""
        floor, known = self.fitness.floor, self.rows.get(genome)
        if floor is None or known is None:
            return -math.inf
        found = float(known[:probes].sum())
        return math.inf if math.isnan(found) else (found + floor * (probes - len(known[:probes]))) / probes
