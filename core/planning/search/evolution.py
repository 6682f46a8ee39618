"""Diff-ES's evolution over levels (arXiv 2603.05105, its search loop), with the selection in rounds of EvoPress.

A generation mutates the survivors, judges the new schedules together with them, and keeps the best: the best one never
gets worse. Unlike Diff-ES it starts from what an error table says of all schedules, breeds by a model of what ran,
counts the budget over executed calls, judges on several fidelities, tries nothing twice, knows when to stop, chooses
the winner on probes that the search has not seen, and can be interrupted at any moment.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ... import progress
from ...errors import SearchError
from ...processes import Processes
from ...schedule import StageSchedule
from ..allocation import Request
from ..final import race, rounds_for
from ..fitness import Fitness
from ..sampling import Sampling
from .initial import Init, Nursery, given_genome, initial_pool
from .ledger import Ledger
from .metered import MeteredHost
from .probes import Block, blocks_of
from .proposals import Breeder
from .result import Finalist, Generation, SearchResult
from .selection import Selection, probe_counts
from .settings import SearchSettings
from .space import Genome, Space
from .state import SearchState
from .trajectories import Trajectories, copies_hold

logger = logging.getLogger(__name__)

_GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What is searched.

    Args:
        request: the arguments of an allocation, on the search probes.
        held_out: the same run on held-out probes.
        fitness: what is minimised.
        settings: of the evolution.
        init: how it begins.
    """

    request: Request
    held_out: Sampling
    fitness: Fitness
    settings: SearchSettings
    init: Init

    @property
    def probes(self) -> int:
        """Number of search probes."""
        return len(self.request.sampling.prompts)


class Evolution:
    """A search under way.

    Args:
        task: what is searched.
        state: where it is; goes on.
        ledger: what is known of each candidate; grows.
        save: called after every generation, and at the end.
        processes: that share the work.

    Raises:
        SearchError, ScheduleError, AllocationError: the budget cannot be met, or the schedule to start from does not
            fit. Nothing has been run then. From `run`, AllocationError: the dense samples are not finite.
    """

    def __init__(
        self, task: Task, state: SearchState, ledger: Ledger, save: Callable[[], None], processes: Processes
    ) -> None:
        self.task, self.state, self.ledger, self.save, self.processes = task, state, ledger, save, processes
        self.space = Space.of(task.request)
        if isinstance(task.init, StageSchedule):
            given_genome(task.init, task.request, self.space)  # says what is wrong with it before anything is run
        self._since, self._before = time.perf_counter(), state.cost
        self._may_share: bool | None = None

    def run(self) -> SearchResult:
        """From where it is to the end."""
        state, task = self.state, self.task
        if not state.reason:
            self._evolve()
        if not state.finalists:
            self._finals()
        allocation = task.request.allocation("search", state.finalists[0].levels)
        return SearchResult(
            schedule=allocation.schedule,
            fitness=task.fitness.name,
            target=allocation.target,
            executed=allocation.executed,
            spent=allocation.spent,
            finalists=tuple(state.finalists),
            start=self._value(state.starts[0]) if state.starts else None,
            dense=state.dense,
            history=tuple(state.history),
            reason=state.reason,
            cost=state.cost,
            settings=task.settings,
        )

    def _value(self, genome: Genome) -> float:
        """Fitness on all search probes."""
        return self.ledger.value(genome, self.task.probes)

    def _evolve(self) -> None:
        state, settings = self.state, self.task.settings
        counts = probe_counts(settings, self.task.fitness, self.task.probes)
        runs = self._trajectories(counts)
        with progress.bar(settings.generations, "searching", "generation", shown=self.processes.first) as bar:
            selection = Selection(runs, self.ledger, settings, counts, self.processes, lambda: self._show(bar))
            bar.update(len(state.history))
            while not state.reason:
                self._generation(selection)
                bar.update(1)
                self._show(bar)
                self.save()

    def _show(self, bar: Any) -> None:
        best = f"best {self.state.history[-1].best:.3e}, " if self.state.history else ""
        bar.set_postfix_str(f"{best}{len(self.ledger.rows)} candidates, {self.state.cost.saved:.0%} of steps saved")

    def _trajectories(self, counts: list[int]) -> Trajectories:
        """Dense references, and the states that an interrupted search had, as far as they are here again."""
        state, task = self.state, self.task
        blocks = blocks_of(task.request.sampling, counts)
        again = bool(state.cost.references)
        runs = Trajectories(task.request, blocks, self._memory(blocks[0]))
        self._add(**{"repeated" if again else "references": runs.steps})
        runs.steps = runs.shared = 0
        if again:
            runs.trie.reset(state.keys)
        else:
            trial = Ledger(task.fitness)
            for outcome in runs.dense:  # also says what is wrong with the fitness before any candidate is run
                trial.add((), task.fitness.statistics(outcome, outcome))
            state.dense = trial.value((), task.probes)
            state.keys = runs.trie.keys()
        return runs

    def _memory(self, block: Block) -> int:
        """Bytes of states to keep: none where the sampler does not give the same result twice from one state."""
        memory = int(self.task.settings.memory * _GIB)
        if memory and self._may_share is None:
            again = bool(self.state.cost.references)
            self._may_share, steps = self.processes.agree(copies_hold(self.task.request.sampling, block))
            self._add(**{"repeated" if again else "references": steps})
            if not self._may_share:
                logger.warning(
                    "this sampler does not give the same result twice from one state, so that candidates share none "
                    "and an interrupted search will not end as it would have."
                )
        return memory if self._may_share else 0

    def _generation(self, selection: Selection) -> None:
        state, settings, runs = self.state, self.task.settings, selection.trajectories
        if not state.history and not state.pool:
            self._initial()
            self.save()
        pool = self._offspring(selection.counts) if state.history else state.pool
        # What races at the end has to reach the last round.
        exempt = state.starts if not state.history else []
        if not pool:
            state.reason = "exhausted"
            return
        best = state.history[-1].best if state.history else math.inf
        steps, shared, repeated, stopped = runs.steps, runs.shared, runs.repeated, selection.stopped
        state.survivors, state.pool = selection.select(pool, state.survivors, exempt), []
        self._add(
            search=runs.steps - steps,
            shared=runs.shared - shared,
            repeated=runs.repeated - repeated,
            stopped=selection.stopped - stopped,
        )
        values = tuple(self._value(genome) for genome in state.survivors)
        levels = tuple(self.space.levels(genome) for genome in state.survivors)
        state.history.append(Generation(len(pool), levels, values, state.cost.search))
        state.stale = 0 if values[0] < best else state.stale + 1
        state.keys = runs.trie.keys()
        if len(state.history) >= settings.generations:
            state.reason = "generations"
        elif settings.patience is not None and state.stale >= settings.patience:
            state.reason = "patience"

    def _initial(self) -> None:
        """Make the initial pool, which may take an error table."""
        request = self.task.request
        meter = MeteredHost(request.sampling.host)
        metered = replace(request, sampling=replace(request.sampling, host=meter.host))
        nursery = Nursery(metered, self.space, self.task.settings, self.state.random)
        pool = initial_pool(self.task.init, nursery)
        self._add(start=meter.steps)
        pool = self.processes.agree(pool)
        self.state.pool, self.state.starts, self.state.products = pool.genomes, pool.starts, pool.products

    def _offspring(self, counts: Sequence[int]) -> list[Genome]:
        """Of the survivors; fewer if new ones are hard to find."""
        state, task = self.state, self.task
        breeder = Breeder(self.space, task.settings, self.ledger, counts, state.products, state.random)
        return self.processes.agree(breeder.offspring(state.survivors))

    def _finals(self) -> None:
        """The best, and what a warm start began with, race on held-out probes, and on fresh ones until one is clearly
        ahead: the best of many candidates on few probes is partly the luckiest.
        """
        state, task = self.state, self.task
        chosen = state.survivors[: task.settings.finalists]
        if not math.isfinite(self._value(chosen[0])):
            raise SearchError(
                f"no candidate has a fitness {task.fitness.name!r} that is a finite number: the levels of this bank "
                "break the model, or the fitness does not fit it."
            )
        if task.settings.finalists > 1:
            chosen = list(dict.fromkeys([*chosen, *state.starts]))

        def statistics_of(numbers: Sequence[int], index: int) -> list[Tensor]:
            sampling = task.held_out.fresh(index - 1) if index else task.held_out
            return self._statistics([chosen[number] for number in numbers], sampling)

        rounds = rounds_for(len(task.held_out.prompts))
        state.finalists = [
            Finalist(self.space.levels(chosen[number]), self._value(chosen[number]), value)
            for number, value in race(len(chosen), statistics_of, task.fitness, rounds)
        ]
        self.save()

    def _statistics(self, genomes: Sequence[Genome], sampling: Sampling) -> list[Tensor]:
        """What the fitness keeps of probes that the search has not seen."""
        task, blocks, count = self.task, blocks_of(sampling), len(sampling.prompts)
        runs = Trajectories(replace(task.request, sampling=sampling), blocks, self._memory(blocks[0]))
        ledger, whole = Ledger(task.fitness), replace(task.settings, stop_early=False)
        Selection(runs, ledger, whole, [count], self.processes).judge(genomes, (), len(genomes), count)
        self._add(held_out=runs.steps, repeated=runs.repeated)
        return [ledger.rows[genome] for genome in genomes]

    def _add(self, **steps: int) -> None:
        seconds = self._before.seconds + time.perf_counter() - self._since
        self.state.cost = replace(self.state.cost.plus(**steps), seconds=seconds)
