"""Mutations of a schedule under a budget: it is kept and spent, and every schedule that spends it can be reached."""

from __future__ import annotations

import itertools
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from stageprune.core.planning.search.mutation import mutate
from stageprune.core.planning.search.space import Space


@st.composite
def spaces(draw):
    """Stages with some calls each, levels whose cost falls (or, as measured times may, does not), a limit."""
    calls = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=8)))
    count = draw(st.integers(2, 6))
    costs = draw(st.lists(st.integers(100, 1000), min_size=count, max_size=count))
    if draw(st.booleans()):
        costs = sorted(costs, reverse=True)
    sparsities = tuple(level / count for level in range(count))
    low, high = min(costs) * sum(calls), max(costs) * sum(calls)
    return Space(sparsities, tuple(costs), calls, draw(st.integers(low, high)))


@given(spaces(), st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4))
def test_every_mutation_keeps_the_budget(space, seed, moves, max_levels):
    """And spends it: no stage of a mutant, or of a drawn genome, could be run denser within it."""
    random = Random(seed)
    genome = space.draw(random)
    for _ in range(5):
        assert space.fits(genome) and not list(space.denser(genome))
        assert all(0 <= level <= space.top for level in genome) and len(genome) == len(space.calls)
        genome = mutate(genome, space, moves, max_levels, random)


@given(st.integers(2, 10), st.integers(1, 3), st.integers(0, 100), st.data())
def test_where_all_stages_are_alike_levels_move_as_in_the_paper(stages, calls, seed, data):
    """Equal calls and equidistant levels: the sum of levels stays, and one switch moves at most so many."""
    levels = 11
    mean = data.draw(st.integers(1, stages * (levels - 1) - 1))
    space = Space(
        tuple(i / 10 for i in range(levels)),
        tuple(1000 - 100 * i for i in range(levels)),
        (calls,) * stages,
        calls * (1000 * stages - 100 * mean),
    )
    random = Random(seed)
    genome = space.draw(random)
    for _ in range(5):
        assert sum(genome) == mean
        child = mutate(genome, space, 1, 3, random)
        moved = [there - here for here, there in zip(genome, child, strict=True)]
        assert sum(moved) == 0 and min(moved) >= -3 and sum(each < 0 for each in moved) <= 1
        genome = child


def test_mutations_reach_every_schedule_that_spends_the_budget():
    """Also where one stage's calls outnumber all others', so that several have to pay for it."""
    space = Space((0.0, 0.3, 0.6), (100, 70, 40), (5, 1, 1, 1), 560)
    every = {g for g in itertools.product(range(3), repeat=4) if space.fits(g) and not list(space.denser(g))}
    random = Random(0)
    seen, genome = set(), space.draw(random)
    for _ in range(3000):
        genome = mutate(genome, space, 1, 2, random)
        seen.add(genome)
    assert seen == every and len(every) > 5
