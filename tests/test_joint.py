"""Steps and levels together: prices are what a run shows, the choice is exact, the schedule brings its steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import stageprune
import zoo
from stageprune import StageSchedule
from stageprune.core.errors import AllocationError, SearchError
from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import allocate, final
from stageprune.core.planning.final import FINALISTS
from stageprune.core.planning.joint import (
    JumpTable,
    Objective,
    Plan,
    best_path,
    grid_points,
    measure_jumps,
    objectives,
    plans,
)
from stageprune.core.planning.joint.choose import nearest_path
from stageprune.core.planning.sampling import FRESH_APART, Sampling
from stageprune.core.planning.strategies import joint
from stageprune.core.runtime import applied
from support import PlantedErrors, inside, make_pipe, path_problems, same_state, state_of

LEVELS = (0.0, 0.3, 0.6)
PROMPTS = [1, 2, 3, 4, 5, 6]
POINTS = 8


def bank_of(pipe, **options):
    prompts = (list(zoo.prompts_for(pipe)) * 4)[:8]
    calibration = stageprune.calibrate(pipe, prompts, steps=4, stages=2, guidance=2.0)
    return stageprune.prune(pipe, calibration, levels=LEVELS, multiple=8, layer_allocation="uniform", **options)


@pytest.fixture(scope="module")
def dit():
    return make_pipe()


@pytest.fixture(scope="module")
def bank(dit):
    return bank_of(dit)


@pytest.fixture(scope="module")
def table(dit, bank):
    return jumps(dit, bank)


def jumps(pipe, bank, guidance=2.0, points=POINTS) -> JumpTable:
    host = DiffusersHost(pipe)
    prompts = (list(zoo.prompts_for(pipe)) * 2)[:3]
    with applied(host, bank) as pruner:
        return measure_jumps(Sampling(host, prompts, 4, guidance, seed=7, batch_size=2), pruner, points)


# The price of a jump.


@pytest.mark.parametrize("name", ["dit", "sdxl", "flux"])
def test_a_jump_is_what_a_run_makes(name):
    """Any jump at any level, in closed form from one call, ends where a sampler ends that really makes it.

    The price is that error times its growth to the end; so prices of jumps to one point are as the errors are.
    """
    pipe = zoo.make_pipeline(name)
    bank = bank_of(pipe)
    found, host = jumps(pipe, bank), DiffusersHost(pipe)
    fine = host.visiting(host.taus(POINTS), first_order=True)
    assert found.taus == pytest.approx(fine.taus(POINTS)) and found.sparsities == LEVELS
    prompts = (list(zoo.prompts_for(pipe)) * 2)[:3]
    conditions, seeds = host.encode(prompts), [7, 8, 9]
    errors = {}
    for here, there, level in [(0, 4, 1), (2, 4, 2), (3, 4, 1), (1, 4, 0), (2, 8, 2), (6, 8, 0), (7, 8, 1)]:
        state = fine.advance(fine.start(seeds, POINTS), conditions, 2.0, here)
        dense = fine.advance(state, conditions, 2.0, there).latents.double()
        taus = [fine.taus(POINTS)[here], *fine.taus(POINTS)[there:]]
        jump = host.visiting(taus, first_order=True)
        begin = jump.start(seeds, len(taus))
        begin = type(begin)(0, state.latents, begin.sampler)
        with applied(host, bank) as pruner:
            pruner.schedule = StageSchedule.uniform(LEVELS[level])
            made = jump.advance(begin, conditions, 2.0, 1).latents.double()
        errors[here, there, level] = float((made - dense).square().mean())
    for end in (4, 8):
        mine = {key: error for key, error in errors.items() if key[1] == end}
        ratios = [float(found.final[key]) / error for key, error in mine.items()]
        assert max(ratios) / min(ratios) < 1.01
    ends = [float(found.final[key]) / error for key, error in errors.items() if key[1] == 8]
    assert ends == pytest.approx([1.0] * 3, rel=0.01), "at the end nothing grows any more"


def test_prices_of_what_cannot_be(table):
    assert torch.isinf(table.final[3, :4]).all() and torch.isfinite(table.final[3, 4:]).all()
    assert float(table.final[3, 4, 0]) < 1e-9, "a dense step of the grid is the reference itself"
    assert (table.final[3, 5:, 1:] > 0).all()


# The choice.


@settings(deadline=None)
@given(path_problems())
def test_the_best_path_is_brute_force(problem):
    """Over every subset of grid points and every level at each."""
    prices, costs, budget = problem
    points, _, levels = prices.shape
    least = math.inf
    for size in range(points):
        for rest in itertools.combinations(range(1, points), size):
            stops = [0, *rest, points]
            for chosen in itertools.product(range(levels), repeat=len(stops) - 1):
                if sum(round(10 * costs[level]) for level in chosen) > round(10 * budget):
                    continue
                path = zip(stops, stops[1:], chosen, strict=False)
                least = min(least, sum(float(prices[jump]) for jump in path))
    found = best_path(prices, costs, budget, resolution=10)
    if found is None:
        assert math.isinf(least)
        return
    assert sum(float(prices[jump]) for jump in found) == pytest.approx(least, abs=1e-9)
    assert sum(costs[level] for _, _, level in found) <= budget + 1e-9
    assert found[0][0] == 0 and found[-1][1] == points
    assert all(jump[1] == after[0] for jump, after in itertools.pairwise(found))


def test_a_budget_is_kept_whatever_the_costs_are(table):
    costs = [1.0, 0.7331, 0.4177]
    for budget in (0.42, 1.0, 2.6, 5.0, 8.0):
        for plan in plans(table, costs, budget, objectives(LEVELS)):
            assert sum(costs[LEVELS.index(level)] for level in plan.levels) <= budget + 1e-9
            assert list(plan.taus) == sorted(set(plan.taus), reverse=True) and plan.taus[0] == table.taus[0]
    assert plans(table, costs, 0.4, objectives(LEVELS)) == []
    whole = plans(table, costs, float(POINTS), objectives(LEVELS))
    assert whole[0].levels == (0.0,) * POINTS, "with all the budget the best is the dense run on the grid"


def test_objectives_keep_to_their_levels(table):
    found = {plan.name: plan for plan in plans(table, [1.0, 0.75, 0.5], 2.5, objectives(LEVELS))}
    assert {"squares", "dense, squares"} <= set(found)
    assert set(found["dense, squares"].levels) == {0.0}
    (high,) = plans(table, [1.0, 0.75, 0.5], 2.5, [Objective("high levels only", first=2)])
    assert set(high.levels) == {0.6} and len(high.taus) > len(found["dense, squares"].taus)
    only = plans(table, [1.0, 0.75, 0.5], 2.5, objectives(LEVELS, dense=True))
    assert only and all(set(plan.levels) == {0.0} for plan in only)
    assert only[0].predicted >= found["squares"].predicted, "more may be chosen, so that the best is no worse"


def test_a_path_over_given_noise_levels(table):
    path = nearest_path(table, [table.taus[0] + 0.001, table.taus[3] - 0.002, table.taus[6]], [1, 0, 1])
    assert path == ((0, 3, 1), (3, 6, 0), (6, POINTS, 1))
    late = nearest_path(table, [table.taus[2], table.taus[6]], [1, 1])
    assert late == ((0, 6, 1), (6, POINTS, 1)), "as many calls, though the first is not where the grid begins"


@given(
    st.lists(st.sampled_from(LEVELS), min_size=1, max_size=9),
    st.data(),
)
def test_every_step_runs_its_level(levels, data):
    taus = data.draw(
        st.lists(st.integers(1, 999), min_size=len(levels), max_size=len(levels), unique=True).map(
            lambda numbers: tuple(number / 1000 for number in sorted(numbers, reverse=True))
        )
    )
    edges = [1.0, 0.66, 0.4, 0.0]
    schedule = Plan("", taus, tuple(levels), 0.0).schedule(edges)
    assert [schedule.levels[schedule.stage_of(tau)] for tau in taus] == levels and schedule.taus == taus
    assert {0.66, 0.4} <= set(schedule.edges)


# The strategy.


@pytest.mark.parametrize("strategy", ["joint", "steps"])
@pytest.mark.parametrize("target", ["macs:0.8", "macs:0.4", "speedup:2", "sparsity:0.5"])
def test_the_budget_is_that_of_the_dense_run(dit, bank, strategy, target):
    before = state_of(dit.transformer)
    host, left = DiffusersHost(dit), inside(dit.transformer)
    found = allocate(host, bank, strategy=strategy, target=target, prompts=PROMPTS, steps=5)
    assert found.strategy == strategy and found.schedule.taus and found.spent <= found.target.share + 1e-6
    assert sum(found.executed.calls) == len(found.schedule.taus)
    assert found.executed.dense == 5 * bank.macs(stageprune.core.groups.measure_cost(dit.transformer))[0.0]
    tried = {candidate.name: candidate.measured for candidate in found.candidates}
    corners = [name for name in tried if name.startswith(("fewer steps", "one level"))]
    assert corners or strategy == "steps"
    finals = [candidate for candidate in found.candidates if candidate.final is not None]
    best = sorted(tried.values())[: min(len(finals), FINALISTS)]
    assert set(best) <= {candidate.measured for candidate in finals}, "of all that was tried, corners included"
    assert finals == list(found.candidates[: len(finals)])
    assert len(finals) in (0, min(FINALISTS, len(tried)), FINALISTS + 1)
    if strategy == "steps":
        assert set(found.schedule.levels) == {0.0} and not any(name.startswith("one level") for name in tried)
    assert same_state(before, state_of(dit.transformer)) and inside(dit.transformer) == left


def test_steps_and_levels_know_all_that_steps_alone_do(bank):
    """By a second-order solver too, whose errors the prices of jumps misjudge."""
    pipe = make_pipe()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    options = {"target": 0.8, "prompts": PROMPTS, "steps": 5}
    steps = allocate(DiffusersHost(pipe), bank, strategy="steps", **options)
    joint = allocate(DiffusersHost(pipe), bank, strategy="joint", jumps=steps.jumps, **options)
    tried = {candidate.measured for candidate in joint.candidates}
    assert any(candidate.name == "dense, refined" for candidate in steps.candidates)
    assert {candidate.measured for candidate in steps.candidates} <= tried


def test_corners_have_the_usual_steps_too(dit, bank):
    """Of the levels that pay for as many, the densest; and what a budget pays for at most, however odd."""
    found = allocate(DiffusersHost(dit), bank, strategy="joint", target=0.8, prompts=PROMPTS, steps=12)
    levels = {each.name: each.levels for each in found.candidates if each.name.startswith(("fewer steps", "one level"))}
    dense = {"fewer steps": 9, "fewer steps, 8": 8, "fewer steps, 4": 4}  # nine fit
    assert levels == {
        **{name: (0.0,) * count for name, count in dense.items()},
        "one level, 12 steps": (0.3,) * 12,
    }


def test_a_corner_may_be_the_best_to_begin_with(dit, bank, table, monkeypatch):
    """On the grid, as plans are: its steps are moved and its levels changed from there."""
    corner = StageSchedule.uniform(0.3).with_taus(DiffusersHost(dit).taus(4))
    PlantedErrors(monkeypatch, {corner: 0.5})
    begun = []
    monkeypatch.setattr(joint, "refine", lambda path, *_: begun.append(path) or (path, 0.0))
    found = allocate(DiffusersHost(dit), bank, strategy="joint", target=0.8, prompts=PROMPTS, steps=4)
    assert found.candidates[0].name == "one level, 4 steps" and found.schedule == corner
    assert begun[0] == tuple((here, here + 10, 1) for here in (0, 10, 20, 30)), "among 40 points"
    assert len(begun) == len(set(begun)) == 3, "another pruned plan and a dense one too"
    assert [any(level for _, _, level in path) for path in begun] == [True, True, False]


def test_the_best_few_are_run_again_on_fresh_seeds(dit, bank):
    """As a sampler makes them, beside the dense model on the grid, on seeds that no plan has seen."""
    host = DiffusersHost(dit)
    found = allocate(host, bank, strategy="joint", target=0.6, prompts=PROMPTS, steps=5, seed=50)
    winner, steps = found.candidates[0], len(found.schedule.taus)
    conditions, errors = host.encode(PROMPTS[3:]), []
    for number in range(1, 1 + final.rounds_for(3)):
        seeds = range(53 + FRESH_APART * number, 56 + FRESH_APART * number)
        dense = sample(host, conditions, seeds, grid_points(5), 2.0)
        with applied(host, bank) as pruner:
            pruner.schedule = found.schedule
            made = sample(host.visiting(found.schedule.taus), conditions, seeds, steps, 2.0)
        errors.append(float((made - dense).square().mean()))
    means = [sum(errors[:count]) / count for count in range(1, 1 + final.rounds_for(3))]
    assert any(winner.final == pytest.approx(mean, rel=1e-4) for mean in means)
    assert "in the end" in str(found) and found.to_dict()["candidates"][0]["final"] == winner.final


@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
def test_the_last_choice_is_among_both_kinds(dit, bank, target):
    """However far ahead plans of one kind are on the few probes before."""
    found = allocate(DiffusersHost(dit), bank, strategy="joint", target=target, prompts=PROMPTS, steps=8)
    kinds = [any(candidate.levels) for candidate in found.candidates]
    finalists = [candidate.final is not None for candidate in found.candidates]
    assert {kind for kind, last in zip(kinds, finalists, strict=True) if last} == set(kinds) == {True, False}
    assert FINALISTS <= sum(finalists) <= FINALISTS + 1


def test_with_orders_of_each_stage(dit):
    bank = bank_of(dit, order="stage")
    found = allocate(DiffusersHost(dit), bank, strategy="joint", target=0.5, prompts=PROMPTS, steps=4)
    assert set(bank.edges) <= set(found.schedule.edges) and len(bank.bind(found.schedule)) >= 2


def test_jumps_serve_another_target(dit, bank):
    host = DiffusersHost(dit)
    first = allocate(host, bank, strategy="joint", target=0.8, prompts=PROMPTS, steps=5)
    again = allocate(host, bank, strategy="joint", target=0.5, prompts=PROMPTS, steps=5, jumps=first.jumps)
    fresh = allocate(host, bank, strategy="joint", target=0.5, prompts=PROMPTS, steps=5)
    assert again.jumps is first.jumps and again.schedule == fresh.schedule
    for change in ({"guidance": 3.0}, {"steps": 4}):
        with pytest.raises(AllocationError, match="`jumps` were measured with another"):
            allocate(host, bank, strategy="joint", prompts=PROMPTS, jumps=first.jumps, **{"steps": 5, **change})


def test_any_fitness_chooses(dit, bank, monkeypatch):
    """A user's own, here one that wants samples as weak as they can be: of all plans the one that has the least."""
    seen = []

    def weak(made, dense):
        assert made.latents.shape == dense.latents.shape and list(made.prompts) == list(dense.prompts)
        seen.append(len(made.latents))
        return made.latents.flatten(1).square().mean(1)

    monkeypatch.setattr(final, "CLEAR", math.inf)  # nobody is given up, so that all finals are of the same probes
    found = allocate(DiffusersHost(dit), bank, strategy="joint", target=0.6, prompts=PROMPTS, steps=5, fitness=weak)
    tried = [candidate.measured for candidate in found.candidates]
    finals = [candidate.final for candidate in found.candidates if candidate.final is not None]
    rounds = [weak_of(dit, bank, found.schedule, FRESH_APART * number) for number in range(1, 1 + final.rounds_for(3))]
    assert set(seen) == {3} and len(finals) > 1
    assert found.candidates[0].final == min(finals) == pytest.approx(sum(rounds) / final.rounds_for(3), rel=1e-4)
    assert found.candidates[0].measured == pytest.approx(weak_of(dit, bank, found.schedule), rel=1e-4)
    near = allocate(DiffusersHost(dit), bank, strategy="joint", target=0.6, prompts=PROMPTS, steps=5)
    assert min(tried) <= weak_of(dit, bank, near.schedule) + 1e-6


def test_a_fitness_that_looks_at_samples_alone_needs_no_dense_ones(dit, bank):
    """The same choice, for fewer calls of the denoiser."""
    host, found, calls = DiffusersHost(dit), [], []
    for paired in (True, False):
        weak = stageprune.Fitness("weak", lambda made, _: made.latents.flatten(1).square().mean(1), paired=paired)
        made = []
        hook = dit.transformer.register_forward_pre_hook(lambda *_, made=made: made.append(1))
        options = {"target": 0.6, "prompts": PROMPTS, "steps": 5, "fitness": weak}
        found.append(allocate(host, bank, strategy="joint", **options))
        hook.remove()
        calls.append(len(made))
    assert found[0].candidates == found[1].candidates and found[0].schedule == found[1].schedule
    assert calls[0] - calls[1] >= 3 * grid_points(5), (
        "in planning, in the held-out runs, and in each round on fresh seeds"
    )


def weak_of(pipe, bank, schedule, apart=0):
    host = DiffusersHost(pipe)
    with applied(host, bank) as pruner:
        pruner.schedule = schedule
        steps = len(schedule.taus)
        seeds = range(10_003 + apart, 10_006 + apart)
        made = sample(host.visiting(schedule.taus), host.encode(PROMPTS[3:]), seeds, steps, 2.0)
    return float(made.flatten(1).square().mean())


def test_what_it_refuses(dit, bank):
    host = DiffusersHost(dit)
    with pytest.raises(AllocationError, match="strategy 'uniform' takes no `fitness`"):
        allocate(host, bank, strategy="uniform", prompts=PROMPTS, steps=4, fitness="latent_mae")
    with pytest.raises(AllocationError, match="fitness 'frechet' needs a `judge`"):
        allocate(host, bank, strategy="joint", prompts=PROMPTS, steps=4, fitness="frechet")
    with pytest.raises(AllocationError, match="`fitness` must be one of"):
        allocate(host, bank, strategy="joint", prompts=PROMPTS, steps=4, fitness="beauty")
    with pytest.raises(AllocationError, match="strategy 'joint' makes stages of its own"):
        allocate(host, bank, strategy="joint", prompts=PROMPTS, steps=4, stages=3)
    with pytest.raises(AllocationError, match="needs at least 4 probe prompts, half of them held out; got 3"):
        allocate(host, bank, strategy="joint", prompts=PROMPTS[:3], steps=4)
    greedy = stageprune.Fitness("greedy", lambda made, dense: made.latents.flatten(1).mean(1), probes=4)
    with pytest.raises(AllocationError, match="'greedy' needs at least 8 probe prompts"):
        allocate(host, bank, strategy="joint", prompts=PROMPTS, steps=4, fitness=greedy)
    with pytest.raises(
        AllocationError, match=r"allows 0\.20 dense calls, and the bank's highest level .* not a single"
    ):
        allocate(host, bank, strategy="joint", prompts=PROMPTS, steps=2, target=0.1)
    dense = (
        r"macs:0\.8 of 1 `steps` allows 0\.80 dense calls, .* makes dense steps only, .* takes 1: .* or more `steps`"
    )
    with pytest.raises(AllocationError, match=dense):
        allocate(host, bank, strategy="steps", prompts=PROMPTS, steps=1, target=0.8)
    with pytest.raises(SearchError, match="`init` lists 2 steps of its own"):
        listed = StageSchedule.uniform(0.3).with_taus([0.9, 0.4])
        stageprune.search(dit, bank, target=0.8, init=listed, prompts=PROMPTS, steps=4)
    with pytest.raises(SearchError, match="`init` must be one of"):
        stageprune.search(dit, bank, target=0.8, init="joint", prompts=PROMPTS, steps=4)
    heun = make_pipe()
    from diffusers import HeunDiscreteScheduler

    heun.scheduler = HeunDiscreteScheduler()
    with pytest.raises(AllocationError, match="need a sampler with one call a step"):
        allocate(DiffusersHost(heun), bank, strategy="joint", prompts=PROMPTS, steps=4)


def test_no_more_images_are_decoded_at_once_than_run_together(dit, bank, monkeypatch):
    """Decoding takes more memory than denoising: whoever asks for small batches means it too."""
    decoded, real = [], DiffusersHost.decode
    monkeypatch.setattr(
        DiffusersHost, "decode", lambda self, latents: decoded.append(len(latents)) or real(self, latents)
    )
    options = {"strategy": "joint", "target": 0.6, "prompts": PROMPTS, "steps": 2, "fitness": "image_mse"}
    found = allocate(DiffusersHost(dit), bank, **options, batch_size=2)
    assert max(decoded) == 2 and set(decoded) == {1, 2}, "three probes in batches of two"
    decoded.clear()
    whole = allocate(DiffusersHost(dit), bank, **options)
    assert set(decoded) == {3}
    for mine, theirs in zip(found.candidates, whole.candidates, strict=False):
        assert mine.measured == pytest.approx(theirs.measured, rel=0.01)
