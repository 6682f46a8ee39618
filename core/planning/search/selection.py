"""Selection in rounds: many candidates on few probes, the best of them on more, the last on all.

Early stopping. In each round a candidate runs block of probes by block of probes. If the fitness is the mean of one
number a probe, which is never below a floor (an error is never negative), then the blocks run so far bound it from
below; a candidate whose bound exceeds the fitness of as many rivals as the round keeps cannot go on, and is given up.
That is exact: selections are the same without it. A partial error *within* a trajectory bounds nothing, as later steps
may undo it, so no trajectory is cut short; nor is anything given up for fitnesses that are no such mean (set metrics)
or have no floor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

from ...processes import Processes
from ..fitness import Fitness
from .ledger import Ledger
from .settings import SearchSettings
from .space import Genome
from .trajectories import Trajectories

_MARGIN = 1e-9
"""Share of a rival's fitness by which a bound must exceed it: sums are rounded."""


class Selection:
    """Judges pools of candidates.

    Args:
        trajectories: runs candidates on blocks of the search probes.
        ledger: what is known of them; grows.
        settings: rounds, and whether to stop early.
        counts: probes of each round.
        processes: that share the work.
        on_run: called after each candidate of a block, for progress.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        ledger: Ledger,
        settings: SearchSettings,
        counts: Sequence[int],
        processes: Processes,
        on_run: Callable[[], None] = lambda: None,
    ) -> None:
        self.trajectories, self.ledger, self.settings, self.counts = trajectories, ledger, settings, counts
        self.processes, self.on_run = processes, on_run
        self.stopped = 0  # denoiser steps saved by early stopping
        self._ends = list(accumulate(len(block) for block in trajectories.blocks))

    def select(
        self, pool: Sequence[Genome], parents: Sequence[Genome], exempt: Collection[Genome] = ()
    ) -> list[Genome]:
        """The survivors of a pool and its parents, best first.

        Args:
            pool: new candidates.
            parents: known on all probes; they join in the last round.
            exempt: candidates that go to the last round whatever they give before.
        """
        going = list(pool)
        for each, count in zip(self.settings.rounds[:-1], self.counts[:-1], strict=True):
            others = [genome for genome in going if genome not in exempt]
            kept = self.judge(others, (), each.keep, count)
            going = [genome for genome in going if genome in exempt or genome in kept]
        return self.judge(going, parents, self.settings.survivors, self.counts[-1])

    def judge(self, candidates: Sequence[Genome], rivals: Sequence[Genome], keep: int, probes: int) -> list[Genome]:
        """The best of candidates and rivals on the first `probes`, best first.

        Args:
            candidates: to be run where they are not known.
            rivals: known on these probes already.
            keep: how many.
            probes: how many of them.
        """
        alive = list(candidates)
        for index, end in enumerate(self._ends):
            if end > probes:
                break
            alive = self._without_hopeless(alive, rivals, keep, probes)
            self._run(index, [genome for genome in alive if self.ledger.probes(genome) < end])
        found = {*alive, *rivals}
        return sorted(found, key=lambda genome: (self.ledger.value(genome, probes), genome))[:keep]

    def _without_hopeless(
        self, candidates: Sequence[Genome], rivals: Sequence[Genome], keep: int, probes: int
    ) -> list[Genome]:
        """Those whose bound does not exclude them, before a block is run."""
        complete = {genome for genome in (*rivals, *candidates) if self.ledger.probes(genome) >= probes}
        values = sorted(self.ledger.value(genome, probes) for genome in complete)
        if not self.settings.stop_early or len(values) < keep:
            return list(candidates)
        highest = values[keep - 1] + _MARGIN * abs(values[keep - 1])
        hopeless = {g for g in candidates if g not in complete and self.ledger.bound(g, probes) > highest}
        self.stopped += sum(self._left(genome, probes) for genome in hopeless)
        return [genome for genome in candidates if genome not in hopeless]

    def _left(self, genome: Genome, probes: int) -> int:
        """Denoiser steps of the blocks that a genome has not been run on."""
        known = self.ledger.probes(genome)
        return sum(self.trajectories.full(i) for i, end in enumerate(self._ends) if known < end <= probes)

    def _run(self, index: int, queue: Sequence[Genome]) -> None:
        """Run candidates on a block. Those that share a prefix come one after the other, so that its state is there."""
        runs, fitness = self.trajectories, self.ledger.fitness
        ordered = sorted(set(queue))
        mine = self.processes.part(len(ordered))
        made = {}
        for place, genome in enumerate(ordered):
            if place in mine:
                made[place] = fitness.statistics(runs.run(index, genome), runs.dense[index])
            else:
                runs.pretend(index, genome)
            self.on_run()
        for place, statistics in sorted(self.processes.gather(made).items()):
            self.ledger.add(ordered[place], statistics)


def probe_counts(settings: SearchSettings, fitness: Fitness, probes: int) -> list[int]:
    """How many probes each round uses: its share, at least as many as the fitness can do with.

    Args:
        settings: the rounds.
        fitness: what is computed on them.
        probes: search probes.
    """
    return [min(probes, max(round(each.share * probes), fitness.probes, 1)) for each in settings.rounds]
