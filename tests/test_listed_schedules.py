"""Schedules that list their steps, or know how many they were planned for: saved, enabled, evaluated and timed."""

from __future__ import annotations

import json
import math

import pytest
from diffusers import UniPCMultistepScheduler

import stageprune
import zoo
from stageprune import StageSchedule
from stageprune.core.bundle import Bundle
from stageprune.core.calibration import calibrate
from stageprune.core.errors import ScheduleError
from stageprune.core.evaluation import evaluate
from stageprune.core.evaluation.benchmark_image import benchmark_image
from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.runtime import applied
from support import make_pipe, relative, same_state, state_of


def bank_of(pipe):
    calibration = stageprune.calibrate(pipe, (list(zoo.prompts_for(pipe)) * 4)[:8], steps=4, guidance=2.0)
    return stageprune.prune(pipe, calibration, levels=(0.0, 0.3, 0.6), multiple=8, layer_allocation="uniform")


@pytest.fixture(scope="module")
def bank():
    return bank_of(make_pipe())


LISTED = StageSchedule.from_levels([0.3, 0.0], [0.5]).with_taus([0.95, 0.7, 0.3, 0.1])


def test_it_survives_json_and_bundles(bank, tmp_path):
    assert StageSchedule.from_json(LISTED.to_json()) == LISTED != LISTED.with_taus(None)
    assert json.loads(LISTED.to_json())["taus"] == [0.95, 0.7, 0.3, 0.1]
    assert "taus" not in LISTED.with_taus(None).to_dict() and "4 steps at tau 0.950, 0.700" in str(LISTED)
    assert Bundle.load(Bundle(bank, LISTED).save(tmp_path / "b")).schedule == LISTED
    assert LISTED.with_levels([0.0, 0.6]).taus == LISTED.taus


@pytest.mark.parametrize("taus", [[], [0.5, 0.5], [0.2, 0.9], [1.5], [-0.1], [math.nan], ["0.3"], [True]])
def test_steps_that_are_none(taus):
    with pytest.raises(ScheduleError, match="`taus` of a schedule must fall within"):
        StageSchedule.uniform(0.3).with_taus(taus)
    with pytest.raises(ScheduleError, match="`taus` of a schedule must be a list"):
        StageSchedule.from_dict({**LISTED.to_dict(), "taus": 3})


@pytest.mark.parametrize("name", ["dit", "sdxl", "flux"])
def test_enabled_it_runs_them_and_disabled_nothing_is_left(name):
    pipe = zoo.make_pipeline(name)
    bank = bank_of(pipe)
    scheduler, plain = pipe.scheduler, zoo.generate(pipe, 2.0, steps=3)
    host = DiffusersHost(pipe)
    with applied(host, bank) as pruner:
        pruner.schedule = LISTED
        prompts = list(zoo.prompts_for(pipe))
        expected = sample(host.visiting(LISTED.taus), host.encode(prompts), range(len(prompts)), 4, 2.0)
    pipe.enable_stage_pruning(Bundle(bank, LISTED))
    assert "4 steps" in str(pipe.stage_pruning_summary()) or "4-step" in str(pipe.stage_pruning_summary())
    assert relative(zoo.drive(pipe, 2.0, steps=4), expected) < 1e-5
    with pytest.raises(ScheduleError, match="num_inference_steps=4, got 3"):
        zoo.generate(pipe, 2.0, steps=3)
    pipe.disable_stage_pruning()
    assert pipe.scheduler is scheduler and (zoo.generate(pipe, 2.0, steps=3) == plain).all()


def test_a_denoiser_alone_runs_the_levels_only(bank, caplog):
    pipe = make_pipe()
    pruner = stageprune.enable_stage_pruning(pipe.transformer, Bundle(bank, LISTED))
    assert "lists 4 steps, which only a pipeline can run" in caplog.text
    pruner.detach()


def test_a_scheduler_that_cannot_visit_leaves_all_as_it_was(bank):
    pipe = make_pipe()
    pipe.scheduler = scheduler = UniPCMultistepScheduler()
    before = state_of(pipe.transformer)
    with pytest.raises(ScheduleError, match="cannot visit listed noise levels"):
        pipe.enable_stage_pruning(Bundle(bank, LISTED))
    assert pipe.scheduler is scheduler and same_state(before, state_of(pipe.transformer))
    assert not pipe.is_stage_pruning_enabled()


def test_evaluated_beside_the_dense_run_of_all_steps(bank):
    pipe = make_pipe()
    report = stageprune.evaluate(pipe, Bundle(bank, LISTED), prompts=[1, 2], count=4, steps=10, guidance=1.5)
    row = next(row for row in report.rows if row.name == "schedule")
    assert row.steps == 4 and "4 steps of its own" in row.description and row.macs_share < 0.4
    uniform = next(row for row in report.rows if row.name == "uniform")
    assert uniform.steps == 10
    assert report.taus == LISTED.taus and sum(report.summary.executed.calls) == 4


def test_timed_over_its_own_steps(bank):
    host = DiffusersHost(make_pipe())
    found = benchmark_image(host, Bundle(bank, LISTED), [1, 2], steps=20, guidance=1.5, rounds=1)
    assert found.steps == 4 and [stage.calls for stage in found.stages] == [2, 2] and found.image.calls == 4


def test_calibrating_is_on_the_samplers_own_steps(bank):
    """The bundle's steps are its own; a pipeline that runs them says so rather than calibrate on others."""
    pipe = make_pipe()
    pipe.enable_stage_pruning(Bundle(bank, LISTED))
    with pytest.raises(ScheduleError, match="runs 4 listed noise levels"):
        calibrate(DiffusersHost(pipe), [1, 2], steps=20)


def test_a_schedule_is_evaluated_at_the_steps_that_it_was_planned_for(bank):
    pipe = make_pipe()
    allocation = stageprune.allocate(pipe, bank, target="macs:0.7", strategy="uniform", steps=3)
    bundle = Bundle(bank, allocation.schedule)
    report = evaluate(DiffusersHost(pipe), bundle, count=2, batch_size=2, curve=False)
    assert report.environment["steps"] == len(report.taus) == 3
    pipe.enable_stage_pruning(bundle)
    summary = pipe.stage_pruning_summary()
    assert summary.steps == 3 and summary.executed.share == pytest.approx(allocation.executed.share)
