"""Strategies of allocation: each keeps its budget over the steps that the sampler executes, and has its own shape."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stageprune
from stageprune import ErrorTable, MosaicSettings
from stageprune.core.bundle import Bundle
from stageprune.core.calibration import calibrate
from stageprune.core.errors import AllocationError, ScheduleError
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import PATTERNS, Sampling, allocate
from stageprune.core.planning.allocate import STRATEGIES, TOLERANCE
from stageprune.core.planning.latency import relative_times
from stageprune.core.planning.snap import levels_for, nearest_levels, scaled
from stageprune.core.pruning import prune
from stageprune.core.runtime import applied, pruner_of
from support import make_pipe
from zoo import make_pipeline

SPARSITIES = (0.0, 0.2, 0.35, 0.5, 0.7)
PROMPTS = [1, 2, 3, 4]
AUTOMATIC = sorted(name for name, entry in STRATEGIES.items() if name != "hand" and entry.stages is not None)
CHEAP = sorted(set(AUTOMATIC) - {"measured", "pattern:ramp-down", "pattern:ramp-up"})
COUNTS = range(1, 13)


@pytest.fixture(scope="module")
def bank():
    return prune(DiffusersHost(make_pipe()), method="magnitude", levels=SPARSITIES, multiple=8)


@pytest.fixture(scope="module")
def dit():
    """One for all tests here: every allocation leaves it as it was."""
    return DiffusersHost(make_pipe())


def plan(host, bank, **options):
    return allocate(
        host, bank, **{"prompts": PROMPTS, "steps": 10, "mosaic": MosaicSettings(mean_square=0.7), **options}
    )


@pytest.mark.parametrize("target", ["macs:0.8", "macs:0.6", "sparsity:0.3"])
@pytest.mark.parametrize("stages", [None, "equal-steps:4", "equal-logsnr:3", [0.9, 0.5]])
@pytest.mark.parametrize("strategy", CHEAP)
def test_the_budget_is_kept_over_executed_steps(dit, bank, strategy, stages, target):
    found = plan(dit, bank, strategy=strategy, stages=stages, target=target)
    assert found.strategy == strategy and found.target.share - 0.25 < found.spent <= found.target.share + TOLERANCE
    assert sum(found.executed.calls) == 10 and all(found.executed.calls)
    if target.startswith("macs"):
        assert found.spent == found.executed.share
    else:
        mean = sum(n * level for n, level in zip(found.executed.calls, found.schedule.levels, strict=True)) / 10
        assert 1 - found.spent == pytest.approx(mean) and mean >= 0.3 - TOLERANCE
    assert json.loads(json.dumps(found.to_dict()))["target_kind"] == found.target.kind


@pytest.mark.parametrize("strategy", ["uniform", "measured", "mosaic"])
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_default_stages_are_never_refused(name, strategy):
    """A shifted sampler of few steps leaves out the cleaner ones."""
    host = DiffusersHost(make_pipeline(name))
    bank = prune(host, method="random", levels=[0.5], multiple=8)
    prompts = host.default_prompts()[:4]
    found = allocate(host, bank, strategy=strategy, target=0.8, steps=4, prompts=prompts)
    assert sum(found.executed.calls) == 4 and all(found.executed.calls)


@pytest.mark.parametrize("strategy", AUTOMATIC)
def test_the_four_step_trap(dit, bank, strategy):
    """Four steps visit four of ten stages: pruning the others would meet a budget of stages, and save nothing."""
    options = {"strategy": strategy, "stages": 10, "steps": 4, "target": "macs:0.7"}
    with pytest.raises(AllocationError, match="no step of a 4-step run falls in stage 1"):
        plan(dit, bank, **options)
    found = plan(dit, bank, **options, empty="merge")
    assert found.executed.calls == (1, 1, 1, 1)
    assert 0.45 < found.executed.share <= 0.7 + TOLERANCE


def test_a_schedule_that_prunes_only_where_no_step_goes_is_refused(dit, bank):
    """What Diff-ES's accounting found for this case: it prunes none of the four steps."""
    levels = [0.0 if level == 0 else 0.5 for level in [5, 1, 0, 10, 0, 6, 2, 0, 6, 0][::-1]]
    options = {"strategy": "hand", "steps": 4, "levels": levels, "empty": "merge"}
    assert plan(dit, bank, **options).executed.share == 1
    with pytest.raises(
        AllocationError, match=r"over the 4 calls .* executes 1.000 of the dense MACs, and `target` macs"
    ):
        plan(dit, bank, **options, target="macs:0.7")


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("strategy", ["mosaic", "pattern:ends"])
@pytest.mark.parametrize("steps", [4, 9])
def test_other_schedulers(name, strategy, steps):
    host = DiffusersHost(make_pipeline(name))
    bank = prune(host, method="random", levels=[0.3, 0.6], multiple=8)
    found = allocate(host, bank, strategy=strategy, target="sparsity:0.25", steps=steps)
    assert found.spent <= 0.75 + TOLERANCE and sum(found.executed.calls) == steps


def test_mosaic_protects_the_fast_stage(dit, bank):
    found = plan(dit, bank, strategy="mosaic", steps=20, target="macs:0.8")
    early, fast, late = found.schedule.levels
    assert fast < min(early, late)
    assert found.schedule.edges == pytest.approx([1, 0.543, 0.097, 0], abs=0.002)
    flat = plan(dit, bank, strategy="mosaic", steps=20, target="macs:0.8", stages=[0.5], mosaic=MosaicSettings())
    assert len(flat.schedule.stages) == 2, "any partition, and the mean square is measured"


@pytest.mark.parametrize("count", COUNTS)
def test_patterns_are_what_they_are_called(count):
    shape = {name: pattern(count) for name, pattern in PATTERNS.items()}
    assert all(len(weights) == count and min(weights) > 0 for weights in shape.values())
    assert shape["front"] == sorted(shape["front"]) == shape["back"][::-1]
    assert shape["ramp-down"] == shape["front"] and shape["ramp-up"] == shape["back"]
    for name in ("middle", "ends"):
        assert shape[name] == pytest.approx(shape[name][::-1])
    if count > 2:
        assert shape["middle"][0] < max(shape["middle"]) and shape["ends"][0] > min(shape["ends"])
    assert len(set(shape["zigzag"])) == min(count, 2) and shape["zigzag"][-1] == 1.2


def test_patterns_are_those_of_the_reference():
    """Its levels for ten stages of mean 8, cleanest first, less the remainder that it adds to one of them."""

    def floors(name):
        weights = PATTERNS[name](10)[::-1]
        return [math.floor(80 * weight / sum(weights) + 1e-6) for weight in weights]

    assert floors("front") == [14, 13, 11, 10, 8, 7, 5, 4, 2, 1]
    assert floors("zigzag") == [9, 6] * 5


@pytest.mark.parametrize("name", ["front", "back", "middle", "ends"])
def test_a_pattern_keeps_its_shape_in_levels(dit, bank, name):
    levels = plan(dit, bank, strategy=f"pattern:{name}", target="macs:0.75", stages=5).schedule.levels
    weights = PATTERNS[name](5)
    for first, second in itertools.combinations(range(5), 2):
        if weights[first] > weights[second] + 1e-9:
            assert levels[first] >= levels[second]
    assert len(set(levels)) > 1


def test_hand(dit, bank):
    found = plan(dit, bank, strategy="hand", levels=[0, 0.5, 0.7])
    assert found.schedule.levels == [0, 0.5, 0.7] and found.target.share == 1
    found = plan(dit, bank, strategy="hand", levels=[0.5, 0.5], stages=[0.3], target="macs:0.7")
    assert found.schedule.edges == [1, 0.3, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "hand"}, AllocationError, "strategy 'hand' needs `levels`"),
        ({"strategy": "uniform", "levels": [0.5]}, AllocationError, "no other takes them"),
        ({"strategy": "hand", "levels": [0, 0.2], "target": 0.5}, AllocationError, "`levels` are over the budget"),
        ({"strategy": "hand", "levels": [0, 0.3]}, ScheduleError, "the bank has no level of sparsity 0.3"),
        ({"strategy": "hand", "levels": [0, 0.2], "stages": 3}, AllocationError, "got 2 for 3 stages"),
        ({"strategy": "mosaic", "steps": 20, "target": 0.05}, AllocationError, "`target` 0.05 cannot be met"),
        ({"strategy": "pattern:ends", "target": 0.05}, AllocationError, "`target` 0.05 cannot be met"),
        (
            {"strategy": "uniform", "target": "sparsity:0.9"},
            AllocationError,
            "`target` 0.9 cannot be met: the bank's highest level still keeps 0.300 of the dense units",
        ),
        ({"strategy": "pattern:sideways"}, AllocationError, "`strategy` must be one of"),
    ],
)
def test_refused(dit, bank, options, error, message):
    with pytest.raises(error, match=message):
        plan(dit, bank, **options)


@st.composite
def budgets(draw):
    """Weights, calls, costs that fall with sparsity, and a limit that the highest level meets."""
    count = draw(st.integers(1, 4))
    sparsities = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(sorted))
    falls = draw(st.lists(st.integers(1, 100), min_size=len(sparsities), max_size=len(sparsities)))
    costs = {0.0: 1000} | {s / 10: 1000 - sum(falls[: i + 1]) for i, s in enumerate(sparsities)}
    weights = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    calls = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    return weights, calls, costs, draw(st.integers(min(costs.values()) * sum(calls), 1000 * sum(calls)))


@given(budgets())
def test_snapping_is_exact_and_within_the_limit(problem):
    weights, calls, costs, limit = problem

    def spent(levels):
        return sum(n * costs[level] for n, level in zip(calls, levels, strict=True))

    def distance(levels):
        return sum(n * (level - value) ** 2 for n, level, value in zip(calls, levels, wanted, strict=True))

    wanted = scaled(weights, calls, costs, limit)
    chosen = nearest_levels(wanted, calls, costs, limit)
    assert chosen == levels_for(weights, calls, costs, limit) and spent(chosen) <= limit
    every = [levels for levels in itertools.product(costs, repeat=len(calls)) if spent(levels) <= limit]
    assert distance(chosen) == pytest.approx(min(map(distance, every)), abs=1e-12)


def test_scaling_spends_the_limit():
    costs = {0.0: 1000, 0.5: 600, 0.8: 200}
    wanted = scaled([1, 2, 4], [1, 2, 3], costs, 4500)
    assert wanted == pytest.approx([wanted[0], 2 * wanted[0], 4 * wanted[0]])
    assert scaled([1, 2, 4], [1, 2, 3], costs, 6000) == [0, 0, 0]
    assert scaled([0, 1], [1, 1], costs, 1100) == pytest.approx([0, 0.8])
    assert scaled([0, 0], [1, 1], costs, 1200) == pytest.approx([0.5, 0.5])


class Clock:
    """A clock that goes on by a time of its own for each call of the denoiser, that of its level."""

    seconds = (0.040, 0.034, 0.028, 0.022, 0.016)
    now = 0.0

    def perf_counter(self):
        return self.now

    def on_call(self, module, *_):
        pruner = pruner_of(module)
        self.now += self.seconds[pruner.level if pruner else 0]


@pytest.mark.parametrize("target", ["latency:0.77", "speedup:1.3"])
@pytest.mark.parametrize("strategy", ["uniform", "pattern:back", "measured"])
def test_a_latency_target_is_met_by_whole_images(bank, monkeypatch, strategy, target):
    pipe, clock = make_pipe(), Clock()
    monkeypatch.setattr("stageprune.core.planning.latency.time", clock)
    pipe.transformer.register_forward_hook(clock.on_call)
    found = stageprune.allocate(pipe, bank, target=target, strategy=strategy, prompts=PROMPTS, steps=5)
    assert found.target.share - 0.1 < found.spent <= found.target.share + TOLERANCE
    assert "of the dense time" in str(found) and "of the dense MACs" in str(found)
    taken = []
    for enabled in (False, True):
        if enabled:
            pipe.enable_stage_pruning(Bundle(bank, found.schedule))
        started = clock.now
        pipe([1], num_inference_steps=5, output_type="latent")
        taken.append(clock.now - started)
    assert taken[1] / taken[0] == pytest.approx(found.spent, abs=1e-5)


def test_levels_are_timed_in_turn(bank, monkeypatch):
    """A machine that becomes slower while it measures changes no ratio by much."""
    pipe, clock = make_pipe(), Clock()
    monkeypatch.setattr("stageprune.core.planning.latency.time", clock)

    def slower(module, *_):
        clock.seconds = tuple(second * 1.001 for second in clock.seconds)
        clock.on_call(module)

    pipe.transformer.register_forward_hook(slower)
    sampling = Sampling(DiffusersHost(pipe), [1], 4, 1.5)
    with applied(sampling.host, bank) as pruner:
        found = relative_times(sampling, pruner)
        assert not any(pruner.schedule.levels)
    expected = [second / Clock.seconds[0] for second in Clock.seconds]
    assert list(found) == list(SPARSITIES) and list(found.values()) == pytest.approx(expected, rel=0.03)


@pytest.fixture(scope="module")
def measured(dit, calibrated_bank):
    return allocate(dit, calibrated_bank, target=0.7, prompts=PROMPTS, steps=5)


@pytest.fixture(scope="module")
def calibrated_bank(dit):
    return prune(dit, calibrate(dit, [1, 2, 3] * 8, steps=5), levels=[0.2, 0.5], multiple=8)


def test_an_error_table_survives_json(measured):
    table = measured.table
    assert ErrorTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert (table.steps, table.origin.guidance, table.origin.size) == (5, 1.5, (16, 16))
    with pytest.raises(AllocationError, match="no error table, or one of another version: 'origin'"):
        ErrorTable.from_dict({key: value for key, value in table.to_dict().items() if key != "origin"})
    data = json.loads(json.dumps(table.to_dict()))
    for name in ("settings", "taus", "dtype"):
        del data["origin"][name]
    with pytest.raises(AllocationError, match=r"not say with which settings, taus, dtype .* earlier.*Measure a new"):
        ErrorTable.from_dict(data)


def test_a_table_serves_another_target(dit, calibrated_bank, measured, tmp_path):
    """Also one that was saved, with a bank that was saved."""
    Bundle(calibrated_bank).save(tmp_path / "bank")
    bank = Bundle.load(tmp_path / "bank").bank
    table = ErrorTable.from_dict(json.loads(json.dumps(measured.table.to_dict())))
    assert allocate(dit, bank, target=0.8, prompts=PROMPTS, steps=5, table=table).table is table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (32, 32)}, r"measured with size \(32, 32\), this allocation needs \(16, 16\)"),
        ({"guidance": 4.0}, "measured with guidance 4.0, this allocation needs 1.5"),
        ({"steps": 9}, "measured with steps 9, this allocation needs 5"),
        ({"sampler": "DDPMScheduler"}, "measured with sampler DDPMScheduler"),
        ({"settings": {}}, "measured with settings {'beta_end': None"),
        ({"taus": (0.9,)}, r"measured with taus \(0\.9,\), this allocation needs \(0\.999, "),
        ({"dtype": "float16"}, "measured with dtype float16, this allocation needs float32"),
        ({"method": "random"}, "measured with method random, this allocation needs obs"),
        ({"bank": "0"}, "measured with bank 0"),
    ],
)
def test_a_table_measured_otherwise_is_refused(dit, calibrated_bank, measured, change, message):
    table = dataclasses.replace(measured.table, origin=dataclasses.replace(measured.table.origin, **change))
    with pytest.raises(AllocationError, match=message):
        allocate(dit, calibrated_bank, target=0.7, prompts=PROMPTS, steps=5, table=table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "measured with guidance 1.5, this allocation needs 2.0"),
        ({"steps": 6}, "measured with steps 5, this allocation needs 6"),
        ({"stages": 4}, "measured with edges"),
    ],
)
def test_a_table_is_refused_for_other_arguments(dit, calibrated_bank, measured, options, message):
    with pytest.raises(AllocationError, match=message):
        allocate(
            dit, calibrated_bank, **{"target": 0.7, "prompts": PROMPTS, "steps": 5, "table": measured.table, **options}
        )


def test_a_table_of_another_bank_is_refused(dit, calibrated_bank, measured):
    other = prune(dit, calibrate(dit, [3, 2, 1] * 8, steps=5, seed=500), levels=[0.2, 0.5], multiple=8)
    with pytest.raises(AllocationError, match="measured with bank"):
        allocate(dit, other, target=0.7, prompts=PROMPTS, steps=5, table=measured.table)
    fewer = prune(dit, method="random", levels=[0.2], multiple=8)
    with pytest.raises(AllocationError, match="measured with levels"):
        allocate(dit, fewer, target=0.9, prompts=PROMPTS, steps=5, table=measured.table)


def test_a_table_of_another_image_size_is_refused():
    pipe = make_pipeline("flux")
    small, large = DiffusersHost(pipe), DiffusersHost(pipe, (16, 24))
    bank = prune(small, method="random", levels=[0.5], multiple=8)
    options = {"target": 0.8, "prompts": ["red fox"] * 4, "steps": 3, "stages": [0.88]}
    table = allocate(small, bank, **options).table
    with pytest.raises(AllocationError, match=r"measured with size \(16, 16\), this allocation needs \(16, 24\)"):
        allocate(large, bank, **options, table=table)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "dit",
            {"timestep_spacing": "leading"},
            r"settings:? {'timestep_spacing': '\w+'}, this allocation needs {'timestep_spacing': 'leading'}",
        ),
        ("flux", {"shift": 1.7}, r"settings:? {'shift': 3\.0}, this allocation needs {'shift': 1\.7}"),
        ("dit", None, "dtype:? float32, this allocation needs bfloat16"),
    ],
)
def test_tables_of_another_spacing_shift_or_dtype_are_refused(name, change, message):
    pipe = make_pipeline(name)
    bank = prune(DiffusersHost(pipe), method="random", levels=[0.5], multiple=8)
    options = {"target": 0.8, "prompts": ["red fox"] * 4 if name == "flux" else [1, 2, 3, 4], "steps": 3}
    table = allocate(DiffusersHost(pipe), bank, **options, stages=1).table
    jumps = allocate(DiffusersHost(pipe), bank, **options, strategy="steps").jumps
    if change is None:
        pipe.to(torch.bfloat16)
    else:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **change)
    for known in ({"table": table, "stages": 1}, {"jumps": jumps, "strategy": "steps"}):
        with pytest.raises(AllocationError, match=message):
            allocate(DiffusersHost(pipe), bank, **options, **known)
