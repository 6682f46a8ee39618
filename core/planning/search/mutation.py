"""Level switches: one stage gains levels, others pay for them, and the executed cost stays within the budget."""

from __future__ import annotations

from random import Random

from .space import Genome, Space, with_level

TRIES = 32
"""Attempts at each switch, as in Diff-ES."""


def mutate(genome: Genome, space: Space, moves: int, max_levels: int, random: Random) -> Genome:
    """A genome near by that fills the budget; the same one where no switch is possible.

    Diff-ES's mutation (arXiv 2603.05105) moves levels from one stage to another, so that their sum over stages stays,
    whatever the sampler makes of them. Here the *executed* cost stays within the budget: stages count by their calls
    and levels by what a call costs. Where all stages have as many calls and levels are equally far apart in cost, the
    sum of levels stays, as there.

    Args:
        genome: within the budget.
        space: levels, costs and the budget.
        moves: most switches; how many is the smaller of two draws.
        max_levels: most levels of a switch.
        random: what is drawn from.
    """
    wanted, made = min(random.randint(1, moves), random.randint(1, moves)), 0
    for _ in range(TRIES * wanted):
        child = _switch(genome, space, max_levels, random)
        if child is not None:
            genome, made = child, made + 1
        if made == wanted:
            break
    return space.fill(genome, random)


def _switch(genome: Genome, space: Space, max_levels: int, random: Random) -> Genome | None:
    """One stage some levels denser, and another as little sparser as pays for it; more of them if one cannot."""
    stages = list(range(len(genome)))
    random.shuffle(stages)
    gains, *payers = stages
    amount = min(random.randint(1, max_levels), genome[gains])
    if amount == 0:
        return None
    child = with_level(genome, gains, genome[gains] - amount)
    for payer in payers:
        while not space.fits(child) and child[payer] < space.top:
            child = with_level(child, payer, child[payer] + 1)
    return child if space.fits(child) else None
