"""Shared states: results are bit-equal without them, and steps are counted right."""

from __future__ import annotations

import dataclasses
import logging
from random import Random
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from stageprune import Fitness, Round, SearchSettings, StageSchedule
from stageprune.core.calibration import calibrate
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import Request, Sampling, search
from stageprune.core.planning.costs import Budget
from stageprune.core.planning.search.footprint import footprint
from stageprune.core.planning.search.probes import blocks_of
from stageprune.core.planning.search.trajectories import Trajectories, copies_hold, segments_of
from stageprune.core.planning.search.trie import StateTrie
from stageprune.core.pruning import prune
from stageprune.core.runtime import applied
from stageprune.core.schedule import Target
from support import make_pipe

SPARSITIES = (0.0, 0.2, 0.35, 0.5, 0.7)
FEW = SearchSettings(generations=3, offspring=6, rounds=(Round(3, 0.5), Round(2)))
OPTIONS = {"target": 0.67, "prompts": [1, 2, 3, 4] * 2, "steps": 5, "settings": FEW}


class GlobalNoise(DDPMScheduler):
    """Draws from the global generator, whatever it is given."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return (super().step(model_output, timestep, sample).prev_sample + 1e-3 * torch.randn_like(sample),)


SCHEDULERS = {
    "ddim": None,
    "multistep": DPMSolverMultistepScheduler,
    "twice a step": HeunDiscreteScheduler,
    "stochastic": EulerAncestralDiscreteScheduler,
    "also stochastic": DDPMScheduler,
}


def host_with(scheduler):
    pipe = make_pipe()
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return DiffusersHost(pipe)


@pytest.fixture(scope="module")
def dit():
    return host_with(None)


@pytest.fixture(scope="module")
def bank(dit):
    return prune(dit, calibrate(dit, [1, 2, 3] * 8, steps=5), levels=SPARSITIES, multiple=8)


def counted(host):
    """Denoiser steps really made, by the denoiser's own inputs: guidance doubles each probe."""
    probes = []
    host.denoiser.register_forward_pre_hook(lambda _, args, kwargs: probes.append(len(args[0])), with_kwargs=True)
    return lambda: sum(probes) // 2


def trajectories(host, bank, pruner, states, batch_size=2, steps=6, stages=3):
    """With room for so many states, or a few more."""
    sampling = Sampling(host, [1, 2, 3], steps, 1.5, 7, batch_size)
    state = host.advance(host.start([1, 2], steps), host.encode([1, 2]), 1.5, steps)
    schedule = StageSchedule.from_levels([0.0] * stages)
    budget = Budget.of(Target.parse("0.9"), sampling, pruner)
    return Trajectories(
        Request(sampling, bank, budget, schedule, pruner), blocks_of(sampling), states * footprint(state)
    )


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("bank_name", ["shared-shared", "stage-stage"])
def test_shared_states_change_no_bit(name, bank_name, banks):
    host, bank, random = host_with(SCHEDULERS[name]), banks[bank_name], Random(0)
    stages = bank.stages if bank.stages > 1 else 3
    genomes = [tuple(random.randrange(4) for _ in range(stages)) for _ in range(6)]
    genomes += [(*genome[:-1], (genome[-1] + 1) % 4) for genome in genomes[:3]]
    with applied(host, bank) as pruner:
        plain = trajectories(host, bank, pruner, 0, steps=5, stages=stages)
        shared = trajectories(host, bank, pruner, 1000, steps=5, stages=stages)
        small = trajectories(host, bank, pruner, 1, steps=5, stages=stages)
        for index in range(2):
            for genome in sorted(genomes):
                expected = plain.run(index, genome).latents
                assert torch.equal(shared.run(index, genome).latents, expected)
                assert torch.equal(small.run(index, genome).latents, expected)
                assert small.trie.used <= small.trie.limit
    assert plain.steps == shared.steps + shared.shared == small.steps + small.shared
    assert plain.shared == 0 < small.shared < shared.shared, "in this order a few states are enough; one is not"


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_states_of_these_samplers_may_be_shared(name):
    host = host_with(SCHEDULERS[name])
    taken = counted(host)
    sampling = Sampling(host, [1, 2], 5, 1.5)
    assert copies_hold(sampling, blocks_of(sampling)[0]) == (True, taken())


def test_a_sampler_that_draws_from_elsewhere_shares_no_states(bank, caplog):
    torch.manual_seed(0)
    host = host_with(GlobalNoise)
    sampling = Sampling(host, [1, 2], 5, 1.5)
    assert not copies_hold(sampling, blocks_of(sampling)[0])[0]
    with caplog.at_level(logging.WARNING, logger="stageprune"):
        found = search(host, bank, **OPTIONS)
    assert found.cost.shared == 0 and "does not give the same result twice" in caplog.text


@pytest.mark.parametrize(
    ("init", "settings"),
    [("measured", FEW), ("hybrid", FEW), ("mosaic", dataclasses.replace(FEW, memory=0.0, stop_early=False))],
)
def test_every_step_is_counted(bank, init, settings):
    host = host_with(None)
    taken = counted(host)
    found = search(host, bank, **{**OPTIONS, "init": init, "settings": settings}, batch_size=3)
    assert found.cost.total == taken() and found.cost.repeated == 0
    assert bool(found.cost.start) == (init != "hybrid") and bool(found.cost.shared) == bool(settings.memory)
    assert found.history[-1].steps == found.cost.search


def test_sharing_saves_steps_and_changes_nothing_else(dit, bank):
    results = [
        search(dit, bank, **{**OPTIONS, "settings": dataclasses.replace(FEW, memory=memory, stop_early=False)})
        for memory in (0.0, 0.0001, 1.0)
    ]
    none, little, much = (result.cost for result in results)
    assert none.search == little.search + little.shared == much.search + much.shared
    assert much.search < little.search < none.search
    kept = [[(each.survivors, each.fitness) for each in result.history] for result in results]
    assert kept[0] == kept[1] == kept[2] and len({result.finalists for result in results}) == 1


@pytest.mark.parametrize("fitness", ["latent_mse", "latent_snr"])
def test_giving_up_saves_steps_and_changes_nothing_else(dit, bank, fitness):
    rounds = (Round(5, 0.5), Round(1))
    results = [
        search(
            dit, bank, **{**OPTIONS, "settings": SearchSettings(4, 6, rounds, memory=0.0, stop_early=stop)},
            fitness=fitness, batch_size=1, init="hybrid",
        )
        for stop in (False, True)
    ]  # fmt: skip
    whole, early = results
    assert [(g.survivors, g.fitness) for g in whole.history] == [(g.survivors, g.fitness) for g in early.history]
    assert whole.finalists == early.finalists and whole.cost.stopped == 0
    assert whole.cost.search == early.cost.search + early.cost.stopped
    if fitness == "latent_mse":
        assert early.cost.stopped > 0


def test_without_a_floor_nothing_is_given_up(dit, bank):
    error = Fitness("error", lambda made, dense: (made.latents - dense.latents).square().flatten(1).mean(1))
    found = search(dit, bank, **OPTIONS, fitness=error, batch_size=1, init="hybrid")
    assert found.cost.stopped == 0


def test_lost_states_are_made_again_and_count_apart(dit, bank):
    """After a resume the trie has its keys but not its states: results and counts are those of an uninterrupted run."""
    random = Random(1)
    genomes = [tuple(random.randrange(4) for _ in range(3)) for _ in range(12)]
    with applied(dit, bank) as pruner:
        whole, first = (trajectories(dit, bank, pruner, 8) for _ in range(2))
        expected = [whole.run(0, genome).latents for genome in genomes]
        for genome in genomes[:6]:
            first.run(0, genome)
        resumed = trajectories(dit, bank, pruner, 8)
        resumed.steps = resumed.shared = 0
        resumed.trie.reset(first.trie.keys())
        assert all(
            torch.equal(resumed.run(0, genome).latents, latents)
            for genome, latents in zip(genomes[6:], expected[6:], strict=True)
        )
        assert resumed.trie.keys() == whole.trie.keys() and resumed.trie.used == whole.trie.used
        assert first.steps + resumed.steps == whole.steps and first.shared + resumed.shared == whole.shared
        assert resumed.repeated > 0 == whole.repeated


def test_pretending_counts_as_running_does(dit, bank):
    random = Random(2)
    genomes = [tuple(random.randrange(4) for _ in range(3)) for _ in range(12)]
    with applied(dit, bank) as pruner:
        runs, pretends = (trajectories(dit, bank, pruner, 8) for _ in range(2))
        for genome in genomes:
            runs.run(0, genome)
            pretends.pretend(0, genome)
    assert (runs.steps, runs.shared, runs.trie.keys()) == (pretends.steps, pretends.shared, pretends.trie.keys())


def test_a_stage_that_is_visited_twice_has_two_segments():
    stages = StageSchedule.from_levels([0.0, 0.0])
    request = SimpleNamespace(stages=stages, sampling=SimpleNamespace(taus=[0.9, 0.8, 0.4, 0.6, 0.2, 0.1]))
    assert segments_of(request) == [(0, 2), (1, 3), (0, 4), (1, 6)]


def test_a_state_takes_what_its_tensors_and_generators_take():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.zeros(10, dtype=torch.float64)
    held = SimpleNamespace(history=[tensor, None, {"again": tensor}], name="x", generators=[generator], kind=dict)
    assert footprint(held) == 80 + generator.get_state().nbytes
    held.itself = held
    assert footprint((held, torch.zeros(3))) == 92 + generator.get_state().nbytes


@given(
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=3)), max_size=40),
    st.integers(0, 12),
)
def test_the_least_recently_used_states_go_first(accesses, limit):
    """Against a plain model: an ordered list of keys, the size of each the length of its path."""
    trie, model = StateTrie(limit, lambda key: len(key[1])), []

    def use(block, path):
        for length in range(len(path), 0, -1):
            if (block, path[:length]) in model:
                model.append(model.pop(model.index((block, path[:length]))))

    for block, levels in accesses:
        path = tuple(levels)
        use(block, path)
        known = max((len(kept) for where, kept in model if (where, kept) == (block, path[: len(kept)])), default=0)
        assert trie.longest(block, path) == known
        for length in range(known + 1, len(path) + 1):
            trie.put((block, path[:length]), (block, path[:length]))
            kept = [*model]
            while sum(len(each) for _, each in kept) + length > limit and kept and kept[0] not in above(block, path):
                kept.pop(0)
            if sum(len(each) for _, each in kept) + length <= limit:
                kept.append((block, path[:length]))
            model = kept
        trie.use(block, path)
        use(block, path)
        assert trie.keys() == model and trie.used == sum(len(each) for _, each in model) <= limit
        assert all(trie.state(key) == key for key in model)
        assert all(key in model for key in above(block, path)[: 1 if limit else 0]), "the nearest to the root stays"


def above(block, path):
    return [(block, path[:length]) for length in range(1, len(path) + 1)]
