"""A choice of steps is never worse than its rivals: they race to the end, and win what is not clearly lost."""

from __future__ import annotations

import json

import pytest
from diffusers import HeunDiscreteScheduler

import stageprune
from stageprune import StageSchedule
from stageprune.core.errors import AllocationError, ScheduleError
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import allocate
from stageprune.core.planning.final import rounds_for
from stageprune.core.planning.joint.choose import plan_of
from stageprune.core.planning.rivals import calls_of
from stageprune.core.planning.strategies import joint
from support import PlantedErrors, make_pipe

PROMPTS = [1, 2, 3, 4, 5, 6]
LEVELS = (0.0, 0.3, 0.6)
RIVAL = StageSchedule.from_levels([0.3, 0.0], [0.5]).with_taus([0.99, 0.7, 0.31])


@pytest.fixture(scope="module")
def host():
    return DiffusersHost(make_pipe())


@pytest.fixture(scope="module")
def bank(host):
    return bank_of(host)


def bank_of(host, **options):
    calibration = stageprune.calibrate(host, PROMPTS, steps=4, stages=2, guidance=2.0)
    return stageprune.prune(host, calibration, levels=LEVELS[1:], multiple=8, layer_allocation="uniform", **options)


@pytest.fixture(scope="module")
def jumps(host, bank):
    return choose(host, bank, strategy="steps").jumps


def choose(host, bank, **options):
    return allocate(host, bank, **{"strategy": "joint", "target": 0.6, "prompts": PROMPTS, "steps": 5, **options})


def names(found):
    return [candidate.name for candidate in found.candidates]


def test_a_rival_that_is_better_than_all_plans_is_chosen(host, bank, jumps, monkeypatch):
    PlantedErrors(monkeypatch, {RIVAL: 0.5})
    found = choose(host, bank, jumps=jumps, rivals=[RIVAL])
    assert found.schedule == RIVAL and found.strategy == "joint" and found.schedule.planned_steps == 5
    best = found.candidates[0]
    assert (best.name, best.levels, best.predicted) == ("rival 1", (0.3, 0.3, 0.0), None)
    line = next(line for line in str(found).splitlines() if "rival 1" in line)
    assert "[0.3, 0.3, 0]: held-out 5" in line and "in the end" in line
    assert json.loads(json.dumps(found.to_dict()))["candidates"][0]["predicted"] is None


def test_a_good_one_is_improved_upon(host, bank, jumps, monkeypatch):
    """Its steps are moved and its levels changed as those of plans are, from the grid points nearest to them."""
    begun = []
    on_grid = ((0, 12, 1), (12, 28, 1), (28, 40, 0))
    near = plan_of(jumps, "", on_grid).schedule(bank.edges)
    PlantedErrors(monkeypatch, {near: 0.5})
    monkeypatch.setattr(joint, "refine", lambda path, *_: begun.append(path) or (path, 0.0))
    found = choose(host, bank, jumps=jumps, rivals=[RIVAL])
    assert begun[0] == on_grid and found.schedule == near
    dear = RIVAL.with_levels([0.0, 0.0])  # what its tolerance admits is made to keep the budget first
    begun.clear()
    choose(host, bank, jumps=jumps, target=0.599, rivals=[dear])
    costs = bank.macs(stageprune.core.groups.measure_cost(host.denoiser))
    assert all(sum(costs[LEVELS[level]] for _, _, level in path) <= 0.599 * 5 * costs[0.0] for path in begun)


def test_one_that_is_worse_is_not(host, bank, jumps, monkeypatch):
    """And changes nothing: not the choice, nor what is known of the others."""
    with monkeypatch.context() as patched:
        PlantedErrors(patched, {RIVAL: 2.0})
        found = choose(host, bank, jumps=jumps, rivals=[RIVAL])
    assert "rival 1" in names(found)[1:] and found.schedule != RIVAL
    alone = choose(host, bank, jumps=jumps)
    beside = choose(host, bank, jumps=jumps, rivals=[StageSchedule.uniform(0.0).with_taus([0.99])])
    assert beside.schedule == alone.schedule and beside.spent == alone.spent
    (rival,) = (each for each in beside.candidates if each.name == "rival 1")
    assert rival.final is not None, "it raced, whatever it was before"
    assert [each for each in beside.candidates if each is not rival] == list(alone.candidates)


def test_a_tie_is_the_rivals(host, bank, jumps, monkeypatch):
    """So that what costs nothing to match is matched, and curves of strategies coincide."""
    worse = RIVAL.with_taus([0.99, 0.6, 0.3])
    PlantedErrors(monkeypatch, {RIVAL: 1.0, worse: 1.5})
    assert choose(host, bank, jumps=jumps, rivals=[worse, RIVAL]).schedule == RIVAL


def test_whoever_runs_alike_races_once(host, bank, jumps, monkeypatch):
    """A rival given twice, cut otherwise, or found by a plan too."""
    cut = StageSchedule.from_levels([0.3, 0.3, 0.0], [0.8, 0.5]).with_taus(RIVAL.taus)
    plan = choose(host, bank, jumps=jumps).schedule
    world = PlantedErrors(monkeypatch, {})
    found = choose(host, bank, jumps=jumps, rivals=[RIVAL, cut, plan, RIVAL])
    assert sorted(name for name in names(found) if name.startswith("rival")) == ["rival 1", "rival 3"]
    tried = [calls_of(plan), calls_of(RIVAL)]
    fresh = [run for run in world.ran if run[0] > 100_000 and run[1] in tried]
    assert len(fresh) == len(set(fresh)) == 2 * rounds_for(3)


def test_one_that_lists_no_steps_runs_at_the_samplers_own(host, bank, jumps, monkeypatch):
    rivals = [StageSchedule.uniform(0.3).planned_for(3), StageSchedule.uniform(0.6)]
    for rival, steps in zip(rivals, (3, 5), strict=True):
        listed = rival.with_taus(host.taus(steps))
        PlantedErrors(monkeypatch, {listed: 0.5})
        found = choose(host, bank, jumps=jumps, rivals=rivals)
        assert found.schedule == listed and found.spent <= 0.605


def test_one_that_only_the_tolerance_admits(host, bank):
    """It is the choice where nothing else fits."""
    one = StageSchedule.uniform(0.0).with_taus([0.99])
    found = choose(host, bank, strategy="steps", target=0.199, rivals=[one])
    assert found.schedule == one and found.spent == pytest.approx(0.2) and names(found) == ["rival 1"]


def test_dense_steps_heed_dense_rivals(host, bank, jumps, monkeypatch):
    dense = StageSchedule.uniform(0.0).with_taus([0.99, 0.45])
    PlantedErrors(monkeypatch, {RIVAL: 0.1, dense: 0.5})
    found = choose(host, bank, jumps=jumps, strategy="steps", rivals=[RIVAL, dense])
    assert found.schedule == dense and "rival 1" not in names(found)


def test_with_orders_of_each_stage(host):
    """A rival is cut where the bank's stages end."""
    bank = bank_of(host, order="stage")
    found = choose(host, bank, rivals=[StageSchedule.uniform(0.6)])
    assert set(bank.edges) <= set(found.schedule.edges) and "rival 1" in names(found)


def test_what_is_refused(host, bank, jumps):
    dear = StageSchedule.uniform(0.0).planned_for(4)
    message = (
        r"`rivals`: number 2 of 2 executes 0\.8000 of the dense MACs in 4 steps, `target` macs:0\.6 allows 0\.6050"
    )
    with pytest.raises(AllocationError, match=message):
        choose(host, bank, jumps=jumps, rivals=[RIVAL, dear])
    for strategy in ("measured", "uniform"):
        with pytest.raises(AllocationError, match=f"strategy '{strategy}' takes no `rivals`, got 1; `joint` and"):
            choose(host, bank, strategy=strategy, rivals=[RIVAL])
    with pytest.raises(ScheduleError, match=r"no level of sparsity 0\.5"):
        choose(host, bank, jumps=jumps, rivals=[StageSchedule.uniform(0.5)])
    heun = make_pipe()
    heun.scheduler = HeunDiscreteScheduler()
    with pytest.raises(AllocationError, match="need a sampler with one call a step"):
        stageprune.allocate(heun, bank, strategy="joint", prompts=PROMPTS, steps=4, rivals=[StageSchedule.uniform(0.6)])
