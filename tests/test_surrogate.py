"""What is told of schedules that have not run: by the textbook's formulas, and better the more has run."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune.core.planning import SearchSettings
from stageprune.core.planning.fitness import fitness_of
from stageprune.core.planning.search.ledger import Ledger
from stageprune.core.planning.search.proposals import LEAST, Breeder
from stageprune.core.planning.search.space import Space
from stageprune.core.planning.search.surrogate import JITTER, Surrogate

SPACE = Space((0.0, 0.2, 0.4, 0.6), (100, 80, 60, 40), (2,) * 6, 2 * 6 * 70)
COUNTS = [2, 8]


def drawn(seed, count, stages=5):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, stages, generator=generator, dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0, 0.3, 0.0, 2.0], dtype=torch.float64)[:stages]
    return points, (points @ weights).sin() + points[:, 0] * points[:, 1]


def test_predicts_as_the_textbook_does():
    """Rasmussen and Williams, equations 2.41 and 2.42 with the mean's regression as known, entry by entry."""
    points, values = drawn(0, 14)
    there, _ = drawn(1, 3)
    drift = torch.stack([torch.ones(14).double(), points[:, 0]], 1)
    beyond = torch.stack([torch.ones(3).double(), there[:, 0]], 1)
    noise = torch.linspace(0, 0.1, 14, dtype=torch.float64)
    model = Surrogate(points, values, drift, noise)
    lengths, linear, own = (part.exp() for part in model.shape.parts)

    def kernel(a, b):
        a, b = a / lengths, b / lengths
        return float(torch.exp(-((a - b) ** 2).sum() / 2) + linear * (a * b).sum())

    gram = torch.tensor([[kernel(a, b) for b in points] for a in points]).double()
    gram += torch.diag(noise + own + JITTER)
    inverse = gram.inverse()
    mean = (drift.T @ inverse @ drift).inverse() @ drift.T @ inverse @ values
    rest = values - drift @ mean
    variance = float(rest @ inverse @ rest) / 14
    across = torch.tensor([[kernel(a, b) for b in points] for a in there]).double()
    among = torch.tensor([[kernel(a, b) for b in there] for a in there]).double()
    found, covariance = model.predict(there, beyond)
    assert torch.allclose(found, beyond @ mean + across @ inverse @ rest, rtol=1e-3, atol=1e-4)
    assert torch.allclose(covariance, variance * (among - across @ inverse @ across.T), rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999))
def test_more_data_predict_better(seed):
    there, truth = drawn(seed + 1000, 50)
    errors = []
    for count in (8, 80):
        points, values = drawn(seed, count)
        model = Surrogate(points, values, torch.ones(count, 1).double(), torch.zeros(count).double())
        errors.append(float((model.predict(there, torch.ones(50, 1).double())[0] - truth).square().mean()))
    assert errors[1] < errors[0] / 2


def test_what_does_not_matter_is_found_out():
    points, values = drawn(3, 80)
    model = Surrogate(points, values, torch.ones(80, 1).double(), torch.zeros(80).double())
    lengths = model.shape.lengths.exp()
    assert lengths[3] == lengths.max() and lengths[0] < lengths[3] / 2


def error(genome):
    """Least at one end of the space, with stages that spoil one another."""
    first, *rest = (SPACE.sparsities[level] for level in genome)
    return 0.01 + (0.6 - first) ** 2 + sum((value - 0.25) ** 2 for value in rest) + first * rest[0]


def ledger_of(genomes, probes=8):
    ledger = Ledger(fitness_of("latent_mse"))
    for genome in genomes:
        ledger.add(genome, torch.full((probes, 1), error(genome), dtype=torch.float64))
    return ledger


def breeder(ledger, seed=0, products=None, **options):
    return Breeder(SPACE, SearchSettings(**options), ledger, COUNTS, products, Random(seed))


def draws(count, seed=0):
    random, found = Random(seed), {}
    while len(found) < count:
        found[SPACE.draw(random)] = None
    return [*found]


def test_offspring_are_new_distinct_and_within_the_budget():
    known = draws(30)
    ledger = ledger_of(known)
    made = breeder(ledger).offspring(sorted(known, key=error)[:4])
    assert len(set(made)) == len(made) == SearchSettings().offspring
    assert not set(made) & set(known) and all(SPACE.fits(genome) for genome in made)
    assert made == breeder(ledger).offspring(sorted(known, key=error)[:4]), "drawn by the seed alone"


def test_bred_ones_are_better_than_mutants():
    typical = {True: [], False: []}
    for seed in range(5):
        known = draws(30, seed=seed)
        ledger, survivors = ledger_of(known), sorted(known, key=error)[:4]
        for guided, found in typical.items():
            errors = sorted(map(error, breeder(ledger, seed, guided=guided).offspring(survivors)))
            found.append((errors[0], errors[len(errors) // 2]))
    bred, mutants = (torch.tensor(typical[guided]).mean(0) for guided in (True, False))
    assert bool((bred < mutants).all())


def test_those_that_fell_out_early_count_too():
    """Known on few probes only: what these say of the others is told on."""
    known, early = draws(12), draws(60, seed=5)
    ledger = ledger_of(known)
    alone = breeder(ledger).offspring(known[:4])
    for genome in early:
        if genome not in ledger:
            ledger.add(genome, torch.full((2, 1), error(genome), dtype=torch.float64))
    beside = breeder(ledger).offspring(known[:4])
    assert min(map(error, beside)) <= min(map(error, alone)) and not set(beside) & set(early)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_left_out(value):
    known = draws(20)
    ledger = ledger_of(known)
    broken = next(genome for genome in draws(40, seed=9) if genome not in ledger)
    ledger.add(broken, torch.full((8, 1), value, dtype=torch.float64))
    assert len(breeder(ledger).offspring(known[:4])) == SearchSettings().offspring


def test_with_too_few_known_mutants_are_drawn():
    known = draws(LEAST - 1)
    ledger = ledger_of(known)
    assert breeder(ledger).offspring(known) == breeder(ledger, guided=False).offspring(known)


def test_values_below_zero_are_fitted_as_they_are():
    """As of accuracies, whose negatives are minimised."""
    known = draws(30)
    ledger = Ledger(fitness_of("latent_mse"))
    for genome in known:
        ledger.add(genome, torch.full((8, 1), error(genome) - 5, dtype=torch.float64))
    survivors = sorted(known, key=error)[:4]
    bred = sorted(map(error, breeder(ledger).offspring(survivors)))
    assert bred[len(bred) // 2] < sorted(map(error, known))[len(known) // 4]


def test_a_table_helps():
    """Its predictions are what the mean is regressed on: few candidates then tell much."""
    stages, levels = len(SPACE.calls), len(SPACE.sparsities)
    own = torch.tensor(
        [[value**2 * (stage + 1) ** 2 for value in SPACE.sparsities] for stage in range(stages)]
    ).double()
    products = torch.zeros(stages, levels, stages, levels, dtype=torch.float64)
    for stage in range(stages):
        products[stage, range(levels), stage, range(levels)] = own[stage]
    ledger, known = Ledger(fitness_of("latent_mse")), draws(6)

    def truth(genome):
        return 1e-6 + 2 * float(own[range(stages), list(genome)].sum())

    for genome in known:
        ledger.add(genome, torch.full((8, 1), truth(genome), dtype=torch.float64))
    best = [min(map(truth, breeder(ledger, products=each).offspring(known[:4]))) for each in (products, None)]
    assert best[0] <= best[1] and best[0] < min(map(truth, known))
