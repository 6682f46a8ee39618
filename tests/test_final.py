"""The last choice among good candidates: fresh probes until they can be told apart, and no more than that."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune import Fitness
from stageprune.core.planning.final import AHEAD, CLEAR, clear_by, race, rounds_for
from stageprune.core.planning.fitness import fitness_of

MSE = fitness_of("latent_mse")
ROUNDS = 4


class Field:
    """Candidates with known means, whose probes share most of what makes them hard."""

    def __init__(self, means, noise=0.1, probes=32, seed=0):
        self.means, self.noise, self.probes, self.seed = means, noise, probes, seed
        self.ran: list[tuple[int, int]] = []

    def __call__(self, numbers, index):
        return [self.of(number, index) for number in numbers]

    def of(self, number, index):
        self.ran.append((number, index))
        shared = torch.Generator().manual_seed(1000 * self.seed + index)
        own = torch.Generator().manual_seed(1000 * self.seed + 10 * index + number + 500)
        hard = torch.randn(self.probes, generator=shared, dtype=torch.float64).exp()
        return (self.means[number] * hard + self.noise * torch.randn(self.probes, generator=own).double())[:, None]


def test_whoever_is_clearly_behind_runs_no_further():
    """Probes differ far more than candidates do; what both share cancels."""
    field = Field([1.5, 1.0, 1.02, 3.0])
    ranked = race(4, field, MSE, ROUNDS)
    rounds = {number: sum(each == number for each, _ in field.ran) for number in range(4)}
    assert ranked[0][0] == 1 and rounds[1] == max(rounds.values())
    assert rounds[0] == rounds[3] == 1 and {number for number, _ in ranked[2:]} == {0, 3}
    assert ranked[-1][0] in (0, 3)


def test_one_left_needs_no_more_rounds():
    field = Field([1.0, 5.0])
    assert race(2, field, MSE, ROUNDS)[0][0] == 0
    assert field.ran == [(0, 0), (1, 0)]


def test_equals_run_to_the_end():
    field = Field([1.0, 1.0], noise=0.0)
    ranked = race(2, field, MSE, ROUNDS)
    assert len(field.ran) == 2 * ROUNDS and ranked[0][1] == ranked[1][1]


@pytest.mark.parametrize(("probes", "rounds"), [(1, 12), (8, 12), (16, 6), (20, 5), (24, 4), (64, 4), (1000, 4)])
def test_rounds_of_few_probes_are_more(probes, rounds):
    assert rounds_for(probes) == rounds


@pytest.mark.parametrize("probes", [8, 16, 32, 96, 384])
def test_few_probes_must_be_clearer(probes):
    """As likely as a normal deviate of so many standard errors: by numerical integration of Student's density."""
    freedom, x = probes - 1, torch.linspace(0, clear_by(probes), 100_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    within = float(torch.trapezoid((1 + x.square() / freedom) ** (-(freedom + 1) / 2), x)) * 2 * scale
    assert 1 - within == pytest.approx(math.erfc(CLEAR / math.sqrt(2)), rel=0.1)


def test_more_probes_choose_better():
    """Of candidates 5 % apart the better one wins more often than by one round."""
    wins = dict.fromkeys((1, ROUNDS), 0)
    for seed in range(200):
        for rounds in wins:
            wins[rounds] += race(2, Field([1.05, 1.0], noise=0.5, seed=seed), MSE, rounds)[0][0] == 1
    assert wins[ROUNDS] > wins[1] + 10 and wins[ROUNDS] > 130


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 99), st.floats(0, 2))
def test_the_choice_has_the_least_of_those_left(means, seed, noise):
    field = Field(means, noise, probes=8, seed=seed)
    ranked = race(len(means), field, MSE, ROUNDS)
    assert sorted(number for number, _ in ranked) == list(range(len(means)))
    ran = {number: sum(each == number for each, _ in field.ran) for number in range(len(means))}
    left = [value for number, value in ranked if ran[number] == max(ran.values())]
    assert ranked[0][1] == min(left)
    assert [ran[number] for number, _ in ranked] == sorted(ran.values(), reverse=True), "given up last, ranked first"


def test_what_is_no_number_loses():
    def statistics_of(numbers, _):
        return [torch.full((4, 1), math.nan if number == 0 else 1.0, dtype=torch.float64) for number in numbers]

    assert race(2, statistics_of, MSE, ROUNDS) == [(1, 1.0), (0, math.inf)]


def test_a_set_metric_is_of_all_rounds_together():
    """And where a fitness needs more probes than a round has, nobody is given up for it."""
    spread = Fitness("spread", lambda made, dense: made.latents, lambda values: float(values.var()), probes=4)
    field = Field([1.0, 2.0], noise=0.0, probes=4)
    ranked = race(2, field, spread, 3)
    assert ranked[0][0] == 0 and field.ran.count((1, 0)) == 1
    seen = torch.cat([Field([1.0], noise=0.0, probes=4).of(0, index) for index in range(len(field.ran) // 2)])
    assert ranked[0][1] == pytest.approx(float(seen.var()))
    assert len(field.ran) >= 4, "one round of four probes cannot tell"


@pytest.mark.parametrize(
    ("means", "rivals", "choice"),
    [
        ([1.0, 1.0], [1], 1),
        ([1.0, 1.001], [1], 1),
        ([1.0, 1.5], [1], 0),
        ([1.5, 1.0], [1], 1),
        ([1.0, 1.5, 1.001], [1, 2], 2),
        ([1.0, 1.0, 1.5], [2], 0),
    ],
)
def test_a_rival_wins_what_is_hardly_lost(means, rivals, choice):
    """A tie is the best rival's; whoever is given up is none any more."""
    ranked = race(len(means), Field(means, noise=0.05, probes=8), MSE, ROUNDS, rivals)
    assert ranked[0][0] == choice or (choice == 0 and ranked[0][0] not in rivals)
    assert sorted(number for number, _ in ranked) == [*range(len(means))]


@pytest.mark.parametrize("errors", [0.5, 0.95, 1.05, 2.0])
def test_a_rival_that_is_behind_by_more_than_chance_loses(errors):
    """By so many standard errors in the end, and fewer before: too few to be given up."""
    probes = 8
    count = probes * ROUNDS
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(probes // 2)
    behind = errors * float(noise.repeat(ROUNDS).std()) / math.sqrt(count)

    def statistics_of(numbers, _):
        return [(noise + behind if number else torch.zeros(probes, dtype=torch.float64))[:, None] for number in numbers]

    ranked = race(2, statistics_of, MSE, ROUNDS, rivals=[1])
    assert ranked[0][0] == (0 if errors > AHEAD else 1)


@settings(deadline=None)
@given(st.lists(st.floats(0.9, 1.1), min_size=2, max_size=5), st.integers(0, 99), st.data())
def test_rivals_change_the_choice_alone(means, seed, data):
    """What runs, and for how long, is as without them."""
    count = len(means)
    rivals = data.draw(st.sets(st.sampled_from(range(count))))
    plain, beside = Field(means, 0.3, probes=8, seed=seed), Field(means, 0.3, probes=8, seed=seed)
    without, ranked = race(count, plain, MSE, ROUNDS), race(count, beside, MSE, ROUNDS, rivals)
    assert plain.ran == beside.ran and dict(without) == dict(ranked)
    left = {number for number, index in beside.ran if index == max(index for _, index in beside.ran)}
    if ranked[0][0] not in rivals:
        assert ranked == without
    else:
        assert ranked[0][1] == min(value for number, value in ranked if number in rivals and number in left)
