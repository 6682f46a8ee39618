"""Initial pools: random, uniform, Diff-ES's patterns, all of these, what an error table likes best, or mutants of a
schedule to start warm from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from random import Random
from typing import NamedTuple

from torch import Tensor

from ...errors import SearchError
from ...schedule import StageSchedule
from ..allocation import STRATEGIES, Request
from ..costs import TOLERANCE
from ..interactions import error_of
from ..strategies.measured import INTERACTION, probes_of, ranked_choices
from ..table import measure_error_table
from .mutation import TRIES, mutate
from .settings import SearchSettings
from .space import Genome, Space

Init = str | StageSchedule
"""A name, or the schedule to start warm from."""


class Pool(NamedTuple):
    """An initial population.

    Args:
        genomes: all of it.
        starts: those of it that a warm start began with, the most important first.
        products: of the error table that it was made from, as `ErrorTable.interactions`; None if there was none.
    """

    genomes: list[Genome]
    starts: list[Genome]
    products: Tensor | None = None


MUTANTS = 16
"""Mutants, for each place in a pool, of which the table chooses."""


@dataclass(frozen=True)
class Nursery:
    """What initial pools are made from.

    Args:
        request: the arguments of an allocation.
        space: levels, costs and the budget.
        settings: of the search.
        random: what is drawn from.
    """

    request: Request
    space: Space
    settings: SearchSettings
    random: Random

    def planned(self, *strategies: str) -> list[Genome]:
        """What strategies of `allocate` choose, and the candidates that they tried, without duplicates."""
        found = []
        for name in strategies:
            allocation = STRATEGIES[name].run(self.request)
            found.append(self.space.genome(allocation.schedule.levels))
            found += [self.space.genome(candidate.levels) for candidate in allocation.candidates]
        return list(dict.fromkeys(found))

    def draws(self) -> Iterator[Genome]:
        """Random genomes without end."""
        while True:
            yield self.space.draw(self.random)

    def mutants(self, parents: list[Genome]) -> Iterator[Genome]:
        """Mutants of some genomes without end."""
        settings = self.settings
        while True:
            parent = self.random.choice(parents)
            yield mutate(parent, self.space, settings.moves, settings.max_levels, self.random)

    def pool(self, given: Iterable[Genome], rest: Iterator[Genome], starts: list[Genome]) -> Pool:
        """The given genomes, and as many others as there is room for; fewer if that many are hard to find."""
        chosen, wanted = list(dict.fromkeys(given)), self.settings.pool
        for _ in range(TRIES * wanted):
            if len(chosen) >= wanted:
                break
            genome = next(rest)
            if genome not in chosen or not self.settings.unique:
                chosen.append(genome)
        return Pool(chosen[: max(wanted, len(starts))], starts)


Initial = Callable[[Nursery], Pool]

INITIALS: dict[str, Initial] = {}


def register_initial(name: str) -> Callable[[Initial], Initial]:
    """Decorator: make an initialisation known to `search(init=...)`."""

    def register(function: Initial) -> Initial:
        INITIALS[name] = function
        return function

    return register


def patterns() -> list[str]:
    """Strategies with a fixed shape."""
    return [name for name in STRATEGIES if name.startswith("pattern:")]


@register_initial("random")
def random_pool(nursery: Nursery) -> Pool:
    """Random genomes only."""
    return nursery.pool([], nursery.draws(), [])


@register_initial("uniform")
def uniform_pool(nursery: Nursery) -> Pool:
    """One level everywhere, and random genomes."""
    return nursery.pool(nursery.planned("uniform"), nursery.draws(), [])


@register_initial("patterns")
def pattern_pool(nursery: Nursery) -> Pool:
    """The patterns, and their mutants (in Diff-ES: one pattern, in copies)."""
    shapes = nursery.planned(*patterns())
    return nursery.pool(shapes, nursery.mutants(shapes), [])


@register_initial("hybrid")
def hybrid_pool(nursery: Nursery) -> Pool:
    """One level everywhere, the patterns, and random genomes: the default of Diff-ES."""
    return nursery.pool(nursery.planned("uniform", *patterns()), nursery.draws(), [])


@register_initial("measured")
def measured_pool(nursery: Nursery) -> Pool:
    """The best choices by an error table of the search probes, and mutants of them: those that it likes best.

    Unlike `allocate`, which chooses for other probes, it takes all that the table says about two stages: nearly exactly
    what the search probes do. The winner is chosen on others, so that choices made for these are among the starts.
    """
    request, space = nursery.request, nursery.space
    table = measure_error_table(probes_of(request), request.bank.sparsities, request.sampling.steps)
    products = table.interactions()
    here, elsewhere = (
        [space.genome(levels) for levels in ranked_choices(request, table, share).values()]
        for share in (1.0, INTERACTION)
    )
    starts = list(dict.fromkeys([here[0], *elsewhere]))
    tried = [*starts, *here, *nursery.planned("uniform")]
    mutants = dict.fromkeys(islice(nursery.mutants(tried), MUTANTS * nursery.settings.pool))
    likely = sorted(mutants, key=lambda genome: (error_of(genome, products), genome))
    return nursery.pool(tried, chain(likely, nursery.draws()), starts)._replace(products=products)


def check_init(init: Init) -> None:
    """SearchError if there is no such initialisation; to be called before any work."""
    # A search is over the levels of given stages and of the sampler's own steps.
    others = [name for name, entry in STRATEGIES.items() if name != "hand" and entry.stages is not None]
    known = [*INITIALS, *(name for name in others if name not in INITIALS)]
    if not isinstance(init, StageSchedule) and init not in known:
        raise SearchError(f"`init` must be one of {', '.join(known)}, or a schedule; got {init!r}.")


def initial_pool(init: Init, nursery: Nursery) -> Pool:
    """The pool that a search begins with.

    Args:
        init: a name in `INITIALS`; a strategy of `allocate`, whose choice and candidates the search starts warm from;
            or a schedule to start warm from.
        nursery: what it is made from.
    """
    if isinstance(init, str) and init in INITIALS:
        return INITIALS[init](nursery)
    if isinstance(init, StageSchedule):
        starts = [given_genome(init, nursery.request, nursery.space)]
    else:
        starts = nursery.planned(init)
    return nursery.pool(starts, nursery.mutants(starts), starts)


def given_genome(schedule: StageSchedule, request: Request, space: Space) -> Genome:
    """A schedule to start warm from.

    Raises:
        SearchError: it has other stages than the search, or is over its budget.
        ScheduleError: it asks for a level that the bank lacks.
    """
    if schedule.taus is not None:
        raise SearchError(
            f"`init` lists {len(schedule.taus)} steps of its own, and a search is over the levels of the sampler's own "
            "steps. Give a schedule without steps."
        )
    if schedule.edges != request.stages.edges:
        raise SearchError(
            f"`init` has stages with boundaries {schedule.edges[1:-1]}, the search {request.stages.edges[1:-1]}. Leave "
            "`stages` out to search on those of `init`."
        )
    genome = tuple(request.bank.level_of(level) for level in schedule.levels)
    if not space.fits(genome):
        budget, spent = request.budget, request.budget.share(schedule, request.sampling.taus)
        raise SearchError(
            f"`init` is over the budget: it {budget.unit.verb} {spent:.3f} of the dense {budget.unit.name}, and "
            f"`target` {budget.target} allows {budget.target.share:.3f} (and {TOLERANCE} more for rounding)."
        )
    return genome
