"""Strategies side by side: budgets kept, judged on seeds of their own, the same as running each by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import diffusers
import pytest

import stageprune
from stageprune import StageSchedule
from stageprune.core.bundle import Bundle
from stageprune.core.errors import AllocationError, SearchError, StagePruneError
from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import Comparison, SearchResult, SearchSettings
from stageprune.core.planning.compare import FEWER_STEPS, JUDGED_APART
from stageprune.core.runtime import applied
from support import inside, make_pipe, same_state, state_of

PROMPTS = [1, 2, 3, 4, 5, 6]
CALL = {"targets": [0.8, 0.5], "prompts": PROMPTS, "steps": 4, "guidance": 1.5}


@pytest.fixture(scope="module")
def dit():
    return make_pipe()


@pytest.fixture(scope="module")
def bank(dit):
    return stageprune.prune(dit, method="magnitude", levels=[0, 0.3, 0.6], multiple=8)


@pytest.fixture(scope="module")
def comparison(dit, bank):
    before, left = state_of(dit.transformer), inside(dit.transformer)
    found = stageprune.compare(
        dit, bank, strategies=[FEWER_STEPS, "uniform", "measured", "joint", "pattern:ends"], **CALL
    )
    assert same_state(before, state_of(dit.transformer)) and inside(dit.transformer) == left
    return found


def test_every_strategy_keeps_every_budget(comparison):
    for target in (0.8, 0.5):
        points = [point for point in comparison.points if point.target == target]
        assert [point.strategy for point in points] == [FEWER_STEPS, "uniform", "measured", "joint", "pattern:ends"]
        assert all(0 < point.spent <= target + 0.005 and point.error > 0 for point in points)
        assert comparison.best(target).error == min(point.error for point in points)
    assert (comparison.steps, comparison.reference_steps, comparison.probes) == (4, 40, 6)
    assert comparison.dense > 0 and comparison.unit == "MACs"
    with pytest.raises(KeyError):
        comparison.best(0.7)


def differences(pipe, bank, point):
    """Between the final latents of a choice and those of the dense model on the grid, shape (probes, values)."""
    host = DiffusersHost(pipe)
    conditions, seeds = host.encode(PROMPTS), range(10_000 + JUDGED_APART, 10_000 + JUDGED_APART + 6)

    def finals(way, steps):
        return sample(way, conditions, seeds, steps, 1.5).double().flatten(1)

    reference = finals(host, 40)
    if point.schedule is None:
        return finals(host, point.steps) - reference
    with applied(host, bank) as pruner:
        pruner.schedule = point.schedule
        taus = point.schedule.taus
        return finals(host if taus is None else host.visiting(taus), point.steps) - reference


def test_errors_are_those_of_runs_on_new_seeds(dit, bank, comparison):
    for point in comparison.points:
        assert point.schedule is not None or point.steps == int(point.target * 4)
        errors = differences(dit, bank, point).square().mean(1)
        assert float(errors.mean()) == pytest.approx(point.error, rel=1e-4)
        assert float(errors.std() / 6**0.5) == pytest.approx(point.standard_error, rel=1e-3)


def test_text_and_json(comparison):
    text = str(comparison)
    assert text.count("  best") == 2 and "fewer steps" in text and "4 dense steps" in text
    assert Comparison.from_dict(json.loads(comparison.to_json())) == comparison
    for data in ({}, {"points": [{}]}, 3):
        with pytest.raises(AllocationError, match="the data are no comparison"):
            Comparison.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "`targets` must be at least one budget"),
        ({"targets": [0.8, "speedup:1.2"]}, "all of one kind"),
        ({"strategies": []}, "`strategies` must be some of fewer steps, "),
        ({"strategies": ["hand"]}, "`strategies` must be some of"),
        ({"targets": [0.1], "strategies": ["uniform"]}, "no strategy meets any of the budgets macs:0.1"),
    ],
)
def test_refused(dit, bank, change, message):
    with pytest.raises(AllocationError, match=message):
        stageprune.compare(dit, bank, **{**CALL, **change})


def test_a_strategy_that_cannot_is_left_out(dit, bank, caplog):
    found = stageprune.compare(dit, bank, **{**CALL, "targets": [0.25], "strategies": [FEWER_STEPS, "uniform"]})
    assert [point.strategy for point in found.points] == [
        FEWER_STEPS
    ] and "strategy 'uniform' at macs:0.25" in caplog.text


def test_all_of_it_in_the_report(dit, bank, comparison, tmp_path):
    result = stageprune.search(
        dit,
        bank,
        target=0.8,
        settings=SearchSettings(generations=3, offspring=2, init="uniform"),
        prompts=PROMPTS,
        steps=4,
        guidance=1.5,
        stages=2,
    )
    again = SearchResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == result
    bundle = Bundle(bank, result.schedule)
    call = {"prompts": [1, 2], "count": 4, "steps": 4, "guidance": 1.5}
    report = stageprune.evaluate(dit, bundle, **call, search=again, comparison=comparison)
    page = report.save(tmp_path).read_text()
    assert "How the search went" in page and "Strategies side by side" in page
    assert {"search.png", "comparison.png"} <= {path.name for path in tmp_path.iterdir()}
    data = json.loads((tmp_path / "report.json").read_text())
    assert len(data["comparison"]["points"]) == 10 and len(data["search"]["history"]) == len(result.history)
    plain = stageprune.evaluate(dit, bundle, **call).html()
    assert "How the search went" not in plain and "Strategies side by side" not in plain
    other = Bundle(bank, StageSchedule.uniform(0.3))
    with pytest.raises(StagePruneError, match="`search` chose another schedule than the bundle's"):
        stageprune.evaluate(dit, other, **call, search=result)
    with pytest.raises(SearchError, match="no result of a search"):
        SearchResult.from_dict({"schedule": {}})


def test_compared_by_any_fitness(dit, bank):
    """Of the same choices where no fitness chooses; with a standard error by leaving out each probe."""
    ways = {"strategies": [FEWER_STEPS, "uniform", "joint"], "targets": [0.5], "prompts": PROMPTS, "steps": 4}
    plain = stageprune.compare(dit, bank, guidance=1.5, **ways)
    other = stageprune.compare(dit, bank, guidance=1.5, fitness="latent_mae", **ways)
    assert (plain.fitness, other.fitness) == ("latent_mse", "latent_mae") and str(other).startswith(
        "latent_mae against"
    )
    for mine, theirs in zip(plain.points[:2], other.points[:2], strict=True):
        errors = differences(dit, bank, theirs).abs().mean(1)
        assert mine.schedule == theirs.schedule and theirs.error == pytest.approx(float(errors.mean()), rel=1e-4)
        assert theirs.standard_error == pytest.approx(float(errors.std() / 6**0.5), rel=1e-3)
    with pytest.raises(AllocationError, match="fitness 'accuracy' needs a `judge`"):
        stageprune.compare(dit, bank, fitness="accuracy", **ways)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.HeunDiscreteScheduler(), 5),  # 9 of 19 calls
        (diffusers.PNDMScheduler(skip_prk_steps=True), 4),  # 5 of 11
        (diffusers.PNDMScheduler(), None),  # its first four steps make 13 of 19
        (diffusers.DDIMScheduler(), 5),
    ],
    ids=["heun", "plms", "pndm", "ddim"],
)
def test_fewer_steps_keep_the_budget_of_calls(bank, scheduler, steps, caplog):
    pipe, calls = make_pipe(), []
    pipe.scheduler = scheduler
    host = DiffusersHost(pipe)
    full = len(host.taus(10))
    options = {**CALL, "steps": 10, "targets": [0.5], "strategies": [FEWER_STEPS, "uniform"], "prompts": [1]}
    found = {point.strategy: point for point in stageprune.compare(pipe, bank, **options).points}
    if steps is None:
        assert list(found) == ["uniform"] and "the sampler cannot make 3 `steps`" in caplog.text
        return
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    sample(host, host.encode([1]), [0], found[FEWER_STEPS].steps, 1.5)
    assert found[FEWER_STEPS].steps == steps and found[FEWER_STEPS].spent == len(calls) / full <= 0.5
    assert len(host.taus(steps + 1)) > full / 2, "no more would fit"


def test_what_is_not_finite_is_never_the_best(comparison):
    first, *others = (point for point in comparison.points if point.target == 0.5)
    broken = replace(first, error=math.nan, standard_error=math.nan)
    some = replace(comparison, points=(broken, *others))
    assert some.best(0.5).error == min(point.error for point in others) and not some.is_best(broken)
    lines = str(some).splitlines()[2:]
    assert [line for line in lines if "not finite" in line] == lines[:1] and "best" not in lines[0]
    none = replace(comparison, points=(broken,))
    assert "not finite" in str(none) and "best" not in str(none)
    with pytest.raises(KeyError):
        none.best(0.5)


def test_dense_samples_that_are_not_finite_are_refused(dit, bank):
    with pytest.raises(AllocationError, match="bank is not to blame"):
        stageprune.compare(dit, bank, **{**CALL, "guidance": 1e39, "strategies": [FEWER_STEPS, "uniform"]})
