"""The evolution: budgets kept, nothing tried twice, never worse than its start, the same for the same seed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

import stageprune
from stageprune import Fitness, Round, SearchSettings, StageSchedule
from stageprune.core.calibration import calibrate
from stageprune.core.errors import AllocationError, ScheduleError, SearchError
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import Sampling, allocate, search
from stageprune.core.planning.allocate import STRATEGIES, TOLERANCE
from stageprune.core.planning.final import clear_by, rounds_for
from stageprune.core.planning.fitness import Outcome, fitness_of
from stageprune.core.planning.search import INITIALS
from stageprune.core.planning.search.selection import probe_counts
from stageprune.core.planning.search.space import Space
from stageprune.core.planning.search.trajectories import Trajectories
from stageprune.core.pruning import prune
from stageprune.core.runtime import applied
from support import inside, make_pipe, same_state, state_of
from zoo import make_pipeline

SPARSITIES = (0.0, 0.2, 0.35, 0.5, 0.7)
PROMPTS = [1, 2, 3, 4] * 2
FEW = SearchSettings(generations=4, offspring=6, rounds=(Round(3, 0.5), Round(2)))
OPTIONS = {"target": 0.67, "prompts": PROMPTS, "steps": 5, "settings": FEW}


@pytest.fixture(scope="module")
def dit():
    """One for all tests here: every search leaves it as it was."""
    return DiffusersHost(make_pipe())


@pytest.fixture(scope="module")
def bank(dit):
    return prune(dit, calibrate(dit, [1, 2, 3] * 8, steps=5), levels=SPARSITIES, multiple=8)


def find(host, bank, **options):
    return search(host, bank, **{**OPTIONS, **options})


def told(result):
    """All of a result but the time that it took."""
    return {**result.to_dict(), "cost": {**result.to_dict()["cost"], "seconds": 0}}


@pytest.mark.parametrize(
    ("target", "stages"),
    [("macs:0.8", None), ("sparsity:0.3", None), ("macs:0.6", "equal-steps:4"), ("sparsity:0.3", [0.9, 0.5])],
)
def test_the_budget_is_kept_over_executed_steps(dit, bank, target, stages):
    settings = dataclasses.replace(FEW, generations=3)
    found = find(dit, bank, target=target, stages=stages, steps=7, init="hybrid", batch_size=3, settings=settings)
    assert found.spent <= found.target.share + TOLERANCE and sum(found.executed.calls) == 7
    for generation in found.history:
        for levels in generation.survivors:
            plan = allocate(
                dit, bank, strategy="hand", levels=levels, stages=found.schedule.edges[1:-1], steps=7, prompts=PROMPTS,
                target=target,
            )  # fmt: skip
            assert plan.spent <= found.target.share + TOLERANCE
    assert found.schedule.levels == list(found.best.levels)
    assert json.loads(json.dumps(found.to_dict()))["fitness"] == "latent_mse"
    assert "of the dense MACs" in str(found) and "denoiser steps" in str(found)


def spied(monkeypatch):
    """What is run: (trajectories, block, genome), in order."""
    runs, alive, real = [], [], Trajectories.run

    def run(self, index, genome):
        alive.append(self)  # or another one could get its id
        runs.append((id(self), index, genome))
        return real(self, index, genome)

    monkeypatch.setattr(Trajectories, "run", run)
    return runs


START = StageSchedule.from_levels([0.7, 0.7, 0.35, 0.2, 0.0])
INITS = [*INITIALS, "mosaic", "pattern:ends", START]


@pytest.mark.parametrize("init", INITS, ids=[init if isinstance(init, str) else "schedule" for init in INITS])
def test_nothing_is_tried_twice_and_nothing_gets_worse(dit, bank, init, monkeypatch):
    runs = spied(monkeypatch)
    found = find(dit, bank, init=init)
    assert len(runs) == len(set(runs))
    assert len(found.history) == 4 and found.reason == "generations"
    assert found.history[0].evaluated == FEW.pool and found.evaluations == FEW.evaluations == 26
    assert all(earlier.best >= later.best for earlier, later in itertools.pairwise(found.history)), "elitism"
    for generation in found.history:
        assert len(set(generation.survivors)) == 2 and list(generation.fitness) == sorted(generation.fitness)
    others = {finalist.search for finalist in found.finalists} - set(found.history[-1].fitness)
    assert found.history[-1].best == min(finalist.search for finalist in found.finalists)
    if found.start is None:
        assert not others, "only the last survivors"
    else:
        assert found.history[-1].best <= found.start
        assert found.start in {finalist.search for finalist in found.finalists}, "and what it began with"


@pytest.mark.parametrize("init", ["measured", "mosaic", START], ids=["measured", "mosaic", "schedule"])
@pytest.mark.parametrize("fitness", ["latent_mse", "latent_cosine"])
def test_a_warm_start_never_ends_worse_than_it_began(dit, bank, init, fitness):
    """On the search probes; nor, clearly, on others, where its start races to the end or is given up."""
    for seed in range(2):
        settings = dataclasses.replace(FEW, generations=3, seed=seed)
        found = find(dit, bank, init=init, fitness=fitness, settings=settings)
        assert found.history[-1].best <= found.start
        start = [each for each in found.finalists if each.search == found.start]
        assert start
        errors = _held_out(dit, bank, found, start[0].levels), _held_out(dit, bank, found, found.best.levels)
        apart = fitness_of(fitness).standard_error(*errors)
        assert float((errors[1] - errors[0]).mean()) <= clear_by(len(errors[0])) * apart
        if isinstance(init, StageSchedule):
            assert tuple(init.levels) in {each.levels for each in found.finalists}


def _held_out(host, bank, found, levels):
    """The fitness's statistics on the held-out probes, by an independent run."""
    steps, sampling = sum(found.executed.calls), Sampling(host, PROMPTS[4:], sum(found.executed.calls), 1.5)
    conditions, state = host.encode(PROMPTS[4:]), host.start(range(10_004, 10_008), steps)
    outcomes = []
    with applied(host, bank) as pruner:
        for each in ([0.0] * len(levels), levels):
            pruner.schedule = found.schedule.with_levels(each)
            latents = host.advance(state, conditions, 1.5, steps).latents
            outcomes.append(Outcome(latents, PROMPTS[4:], conditions, sampling.decode))
    return fitness_of(found.fitness).statistics(outcomes[1], outcomes[0])


def test_a_table_of_the_search_probes_is_nearly_all_of_the_search(dit, bank):
    """What it likes best is as good as what a search from random schedules ends with."""
    settings = SearchSettings(generations=30, offspring=8, rounds=(Round(4),), patience=None, finalists=1)
    random = find(dit, bank, init="random", settings=settings)
    warm = find(dit, bank, init="measured", settings=dataclasses.replace(settings, generations=1))
    assert warm.history[0].best <= 1.05 * random.history[-1].best
    assert warm.cost.total < random.cost.total


def test_the_same_seed_gives_the_same_result(dit, bank):
    first, again, other = (find(dit, bank, settings=dataclasses.replace(FEW, seed=seed)) for seed in (1, 1, 2))
    assert told(first) == told(again)
    assert first.history != other.history


def test_the_search_finds_the_best_of_a_small_space(dit, bank):
    """All schedules of three stages can be tried; then the search says that none is left."""
    settings = SearchSettings(generations=100, offspring=8, rounds=(Round(2),), patience=None, finalists=1)
    options = {"stages": 3, "target": 0.6, "steps": 4, "init": "random", "settings": settings, "prompts": [1, 2, 3, 4]}
    found = find(dit, bank, **options)
    assert found.reason == "exhausted" and len(found.history) < 100
    space = Space.of(_request(dit, bank, found))
    tried = {levels for generation in found.history for levels in generation.survivors}
    every = [space.levels(g) for g in itertools.product(range(5), repeat=3) if space.fits(g)]
    full = [levels for levels in every if not list(space.denser(space.genome(levels)))]
    assert found.evaluations == len(full) and tried <= set(full)
    errors = {levels: _error(dit, bank, found, levels) for levels in full}
    assert min(errors, key=errors.get) == found.best.levels
    assert found.best.search == pytest.approx(errors[found.best.levels], rel=1e-5)


def _request(host, bank, found):
    from stageprune.core.planning import Request, Sampling
    from stageprune.core.planning.costs import Budget

    sampling = Sampling(host, [1, 2], sum(found.executed.calls), 1.5)
    with applied(host, bank) as pruner:
        return Request(sampling, bank, Budget.of(found.target, sampling, pruner), found.schedule, pruner)


def _error(host, bank, found, levels):
    """By independent runs of the search probes."""
    steps = sum(found.executed.calls)
    conditions, state = host.encode([1, 2]), host.start([10_000, 10_001], steps)
    with applied(host, bank) as pruner:
        dense = host.advance(state, conditions, 1.5, steps).latents
        pruner.schedule = found.schedule.with_levels(levels)
        return float((host.advance(state, conditions, 1.5, steps).latents - dense).square().mean())


def test_patience(dit, bank):
    settings = SearchSettings(generations=50, offspring=2, rounds=(Round(1),), patience=2)
    found = find(dit, bank, settings=settings)
    assert found.reason in ("patience", "exhausted")
    best = [generation.best for generation in found.history]
    assert best[-1] == best[-2] == best[-3], "two generations without a better one"


def test_the_winner_is_chosen_on_held_out_probes(dit, bank, monkeypatch):
    drawn, real = [], DiffusersHost.start
    monkeypatch.setattr(
        DiffusersHost, "start", lambda self, seeds, n: drawn.append(list(seeds)) or real(self, seeds, n)
    )
    found = find(dit, bank, init="hybrid")
    search_probes, held_out = {10_000 + i for i in range(4)}, {10_004 + i for i in range(4)}
    last = next(i for i, seeds in enumerate(drawn) if not set(seeds) <= search_probes)
    assert set(itertools.chain(*drawn[:last])) == search_probes and set(drawn[last]) == held_out
    fresh = [frozenset(seeds) for seeds in drawn[last + 1 :]]
    assert len(fresh) == len(set(fresh)) < rounds_for(4), "each round has seeds of its own"
    assert all(not seeds & (search_probes | held_out) and len(seeds) == 4 for seeds in fresh)
    assert len(found.finalists) == 2 and found.schedule.levels == list(found.best.levels)
    published = find(dit, bank, init="hybrid", settings=dataclasses.replace(FEW, finalists=1))
    assert published.best.search == published.history[-1].best and len(published.finalists) == 1


def test_rounds_judge_many_on_few_probes_and_few_on_many(dit, bank, monkeypatch):
    runs = spied(monkeypatch)
    settings = SearchSettings(
        generations=2, offspring=8, rounds=(Round(6, 0.25), Round(3, 0.5), Round(2)), stop_early=False, finalists=1
    )
    find(dit, bank, init="random", settings=settings)
    search_id = runs[0][0]
    blocks = [index for where, index, genome in runs if where == search_id and any(genome)]
    assert [blocks.count(index) for index in range(3)] == [10 + 8, 6 + 6, 3 + 3], "1, 1 and 2 probes"
    assert probe_counts(settings, Fitness("any", lambda made, dense: dense), 4) == [1, 2, 4]
    assert probe_counts(settings, Fitness("pairs", lambda made, dense: dense, max, probes=2), 8) == [2, 4, 8]


def test_the_published_search_runs(dit, bank):
    found = find(dit, bank, settings=SearchSettings.published(generations=2, offspring=6))
    assert (found.evaluations, found.cost.shared, found.cost.stopped) == (16, 0, 0)
    assert found.cost.search == 5 * 4 * 16, "16 candidates, four probes, five steps"


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_other_models(name):
    host = DiffusersHost(make_pipeline(name))
    bank = prune(host, method="random", levels=[0.3, 0.6], multiple=8)
    found = search(
        host, bank, target="sparsity:0.25", steps=4, prompts=host.default_prompts()[:4], init="hybrid",
        settings=SearchSettings(generations=2, offspring=3, rounds=(Round(1),)),
    )  # fmt: skip
    assert found.spent <= 0.75 + TOLERANCE and sum(found.executed.calls) == 4


def test_a_bank_with_stages_is_searched_over_them(dit, banks):
    found = find(dit, banks["stage-stage"], init="uniform")
    assert found.schedule.edges == list(banks["stage-stage"].edges)


def test_a_level_that_breaks_the_model_is_never_chosen(dit, bank):
    """In half precision a level can overflow: its error is NaN, which must not count as good."""

    def breaks(made, dense):
        error = (made.latents - dense.latents).square().flatten(1).mean(1)
        return torch.where(error > 0.02, float("nan"), error)

    fitness = Fitness("breaks", breaks, floor=0.0)
    found = find(dit, bank, fitness=fitness, init="random")
    assert math.isfinite(found.best.search)
    with pytest.raises(SearchError, match="no candidate has a fitness 'broken' that is a finite number"):
        find(dit, bank, fitness=Fitness("broken", lambda made, dense: made.latents.flatten(1).mean(1) * float("nan")))


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_dense_samples_that_are_not_finite_are_refused_at_once(dit, bank, memory, caplog, monkeypatch):
    """Before any candidate is run, and without blaming the sampler, whose NaN equals no other."""
    runs, settings = spied(monkeypatch), dataclasses.replace(FEW, memory=memory)
    with pytest.raises(AllocationError, match=r"samples are not finite .*`guidance` 1e\+39 .*bank is not to blame"):
        find(dit, bank, guidance=1e39, init="random", settings=settings)
    assert not any(any(genome) for _, _, genome in runs) and "the same result twice" not in caplog.text


def test_through_the_public_function(bank):
    pipe = make_pipe()
    state, structure = state_of(pipe.transformer), inside(pipe.transformer)
    found = stageprune.search(pipe, bank, target="macs:0.67", prompts=PROMPTS, settings=FEW)
    assert same_state(state, state_of(pipe.transformer)) and structure == inside(pipe.transformer)
    pipe.enable_stage_pruning(stageprune.Bundle(bank, found.schedule))
    assert pipe.stage_pruning_summary(steps=5).executed.share == pytest.approx(found.executed.share)


def test_the_denoiser_is_restored_after_an_interruption(bank):
    pipe = make_pipe()
    state = state_of(pipe.transformer)
    left = [150]

    def interrupt(*_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(interrupt)
    structure = inside(pipe.transformer)
    with pytest.raises(
        KeyboardInterrupt, match=r"after [1-3] generations, best .* it kept no checkpoint: give `checkpoint`"
    ):
        find(DiffusersHost(pipe), bank, init="random", steps=5)
    assert same_state(state, state_of(pipe.transformer)) and structure == inside(pipe.transformer)
    hook.remove()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"init": "best"},
            SearchError,
            "`init` must be one of random, uniform, patterns, hybrid, measured, mosaic.*or a",
        ),
        ({"init": "hand"}, SearchError, "`init` must be one of"),
        ({"fitness": "beauty"}, SearchError, "`fitness` must be one of accuracy, frechet.*or a function; got 'beauty'"),
        ({"batch_size": 0}, SearchError, "`batch_size` must be at least 1"),
        ({"steps": 0}, AllocationError, "`steps` must be at least 1"),
        ({"prompts": [], "init": "random"}, SearchError, "'latent_mse' needs 1 search probes.*at least 2 `prompts`"),
        (
            {"init": "measured", "fitness": Fitness("six", lambda made, _: made.latents.flatten(1).mean(1), probes=6)},
            SearchError,
            "fitness 'six' needs 6 search probes.*at least 12 `prompts`.*got 8",
        ),
        ({"target": 0.1}, AllocationError, "`target` 0.1 cannot be met"),
        ({"target": "macs:2"}, AllocationError, "`target` must look like"),
        ({"stages": 12}, AllocationError, "no step of a 5-step run falls in stage"),
        (
            {"init": START, "stages": 4},
            SearchError,
            r"boundaries \[0.8, 0.6, 0.4, 0.2\], the search \[0.75, 0.5, 0.25\]",
        ),
        (
            {"init": StageSchedule.uniform(0.2)},
            SearchError,
            r"`init` is over the budget: it executes 0\.\d{3} of the dense MACs, and `target` macs:0.67 allows 0.670",
        ),
        ({"init": StageSchedule.uniform(0.6)}, ScheduleError, "the bank has no level of sparsity 0.6"),
    ],
)
def test_refused_before_any_work(dit, bank, options, error, message, monkeypatch):
    monkeypatch.setattr(Trajectories, "run", lambda *_: pytest.fail("ran a candidate"))
    with pytest.raises(error, match=message):
        find(dit, bank, **options)


def test_every_strategy_can_be_started_from():
    assert {"uniform", "measured", "mosaic", "hand"} <= set(STRATEGIES) and "hybrid" in INITIALS
