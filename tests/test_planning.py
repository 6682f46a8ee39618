"""Allocation: exact choice, a table that means what it says, and a denoiser left as it was."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stageprune
from stageprune import StageSchedule
from stageprune.core.calibration import calibrate
from stageprune.core.errors import AllocationError, ScheduleError, StagePruneError
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import Probes, allocate, best_levels, measure_error_table
from stageprune.core.planning.allocate import TOLERANCE
from stageprune.core.planning.final import rounds_for
from stageprune.core.planning.probes import stage_starts
from stageprune.core.pruning import prune
from stageprune.core.runtime import applied
from stageprune.core.schedule import executed_cost
from support import GUIDANCE, broken, inside, latents, make_pipe, same_state, state_of

SPARSITIES = (0.0, 0.2, 0.5, 0.7)
PROMPTS = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def fine_bank():
    host = DiffusersHost(make_pipe())
    return prune(host, calibrate(host, [1, 2, 3] * 8, steps=5), levels=SPARSITIES, multiple=8)


@st.composite
def problems(draw):
    stages, levels = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    number = st.integers(0, 30)
    table = st.lists(st.lists(number, min_size=levels, max_size=levels), min_size=stages, max_size=stages)
    return draw(table), draw(table), draw(st.integers(0, 120))


@given(problems(), st.integers(1, 6))
def test_best_levels_is_brute_force(problem, count):
    """The k best, exactly, ties included (tied choices may differ, their errors may not)."""
    costs, errors, budget = problem
    every = []
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        cost = sum(row[level] for row, level in zip(costs, choice, strict=True))
        if cost <= budget:
            every.append((sum(row[level] for row, level in zip(errors, choice, strict=True)), choice))
    every.sort()
    found = best_levels(costs, [[float(e) for e in row] for row in errors], budget, count)
    assert len(found) == len(set(found)) == min(count, len(every))
    assert all(choice in {each for _, each in every} for choice in found)
    got = [sum(row[level] for row, level in zip(errors, choice, strict=True)) for choice in found]
    assert got == [error for error, _ in every[:count]]


def test_table_is_what_independent_runs_give(host, fine_bank):
    steps, stages = 10, StageSchedule.from_levels([0.0] * 5)
    seeds = list(range(50, 58))
    dense = _run(host, seeds, steps)
    with applied(host, fine_bank) as pruner:
        probes = Probes(host, pruner, stages, PROMPTS, seeds, steps=steps, guidance=GUIDANCE, batch_size=3)
        table = measure_error_table(probes, fine_bank.sparsities, steps)
        changes = {}
        for stage, level in itertools.product(range(5), range(4)):
            pruner.schedule = stages.with_levels([SPARSITIES[level] if i == stage else 0.0 for i in range(5)])
            changes[stage, level] = (_run(host, seeds, steps) - dense).flatten(1)
            errors = changes[stage, level].square().mean(1)
            assert table.errors[stage][level] == pytest.approx(float(errors.mean()), rel=1e-3, abs=1e-9)
            if level:
                assert table.standard_errors[stage][level] == pytest.approx(float(errors.std() / 8**0.5), rel=1e-2)
    assert [row[0] for row in table.errors] == [0.0] * 5
    assert all(row[3] > row[1] > 0 for row in table.errors)
    together = (changes[0, 1] + changes[3, 3]).square().mean()
    assert table.predict([0.2, 0, 0, 0.7, 0]) == pytest.approx(float(together), rel=1e-3)
    half = table.interactions(0.5)[0, 1, 3, 3]
    assert float(half) == pytest.approx(float((changes[0, 1] * changes[3, 3]).mean()) / 2, rel=1e-2, abs=1e-9)
    assert table.predict([0.2, 0, 0, 0, 0]) == pytest.approx(table.errors[0][1])
    assert table.probes == 8 and "8 probes, 10 steps" in str(table)


def _run(host, seeds, steps):
    conditions, state = host.encode(PROMPTS), host.start(seeds, steps)
    return host.advance(state, conditions, GUIDANCE, len(host.taus(steps))).latents


@pytest.mark.parametrize("target", [0.8, 0.67, 0.5])
@pytest.mark.parametrize("steps", [5, 10])
def test_measured_is_never_worse_than_uniform(host, fine_bank, target, steps):
    found = allocate(host, fine_bank, target=target, steps=steps, prompts=PROMPTS)
    best = found.candidates[0]
    uniform = next(candidate for candidate in found.candidates if len(set(candidate.levels)) == 1)
    assert list(best.levels) == found.schedule.levels and len({each.levels for each in found.candidates}) == len(
        found.candidates
    )
    if uniform.final is None:  # clearly behind at once, or the choice without a rival
        assert best is uniform or best.measured < uniform.measured
    else:
        assert best.final is not None and best.final <= uniform.final
    assert found.executed.share <= target + TOLERANCE
    macs = fine_bank.macs(stageprune.core.groups.measure_cost(host.denoiser))
    assert found.executed == executed_cost(found.schedule, host.taus(steps), macs)
    assert found.table.predict(best.levels) == best.predicted
    assert json.loads(json.dumps(found.to_dict()))["strategy"] == "measured"
    assert f"target {target:.3f} of the dense MACs, executes {found.executed.share:.3f}" in str(found)


def test_no_two_rounds_of_probes_share_seeds(host, fine_bank, monkeypatch):
    drawn = []
    real = DiffusersHost.start
    monkeypatch.setattr(
        DiffusersHost, "start", lambda self, seeds, steps: drawn.append(list(seeds)) or real(self, seeds, steps)
    )
    allocate(host, fine_bank, target=0.7, prompts=PROMPTS, steps=5)
    assert drawn[:2] == [[10_000, 10_001, 10_002, 10_003], [10_004, 10_005, 10_006, 10_007]], "table, held out"
    assert 2 <= len(drawn) <= 1 + rounds_for(4) and all(len(seeds) == 4 for seeds in drawn)
    assert len({seed for seeds in drawn for seed in seeds}) == 4 * len(drawn)


def test_uniform_is_the_dearest_level_within_the_budget(host, fine_bank):
    macs = fine_bank.macs(stageprune.core.groups.measure_cost(host.denoiser))
    shares = {level: value / macs[0.0] for level, value in macs.items()}
    for level, share in shares.items():
        assert allocate(host, fine_bank, target=min(share, 1.0), strategy="uniform").schedule.levels == [level] * 5
        if level:
            less = allocate(host, fine_bank, target=share + 0.02, strategy="uniform").schedule.levels[0]
            assert less == level
    assert allocate(host, fine_bank, target=1, strategy="uniform").executed.share == 1


def test_defaults_come_from_the_calibration(host, fine_bank):
    found = allocate(host, fine_bank, target=0.7)
    assert found.table.steps == 5 and found.table.probes == 12
    assert len(found.schedule.stages) == 5


@pytest.mark.parametrize("name", ["shared-stage", "stage-stage"])
def test_a_bank_with_stages_is_allocated_over_them(host, banks, name):
    found = allocate(host, banks[name], target=0.7)
    assert found.schedule.edges == list(banks[name].edges)
    with pytest.raises(ScheduleError, match="crosses a boundary of the bank"):
        allocate(host, banks[name], target=0.7, stages=3)


def test_stage_starts():
    stages = StageSchedule.from_levels([0.0] * 3)
    assert stage_starts(stages, [1.0, 0.9, 0.6, 0.3, 0.1], 5) == [0, 2, 3]
    with pytest.raises(AllocationError, match=r"no step of a 2-step run falls in stage 1 \(tau 0.666667 to 0.333333\)"):
        stage_starts(stages, [1.0, 0.1], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.1}, r"`target` 0.1 cannot be met: the bank's highest level still executes 0\.\d{3} of the dense"),
        ({"target": "macs:2"}, "`target` must look like"),
        ({"strategy": "best"}, "`strategy` must be one of .*measured, .*uniform; got 'best'"),
        ({"stages": 12, "steps": 10}, r"no step of a 10-step run falls in stage"),
        ({"stages": [0.99], "steps": 10, "prompts": PROMPTS[:3]}, "needs at least 4 probe prompts, got 3"),
        ({"stages": 0}, "`stages` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": -1, "strategy": "joint"}, "`batch_size` must be at least 1, got -1"),
    ],
)
def test_refused_and_restored(host, fine_bank, arguments, message):
    state, structure = state_of(host.denoiser), inside(host.denoiser)
    with pytest.raises(AllocationError, match=message):
        allocate(host, fine_bank, **{"prompts": PROMPTS, **arguments})
    assert same_state(state, state_of(host.denoiser)) and structure == inside(host.denoiser)


@pytest.mark.parametrize("strategy", ["measured", "uniform"])
def test_the_denoiser_is_restored(pipe, bank, strategy):
    state, structure, before = state_of(pipe.transformer), inside(pipe.transformer), latents(pipe)
    allocate(DiffusersHost(pipe), bank, target=0.7, strategy=strategy)
    assert same_state(state, state_of(pipe.transformer)) and structure == inside(pipe.transformer)
    assert torch.equal(before, latents(pipe))


@pytest.mark.parametrize("calls", [1, 12, 60])
def test_the_denoiser_is_restored_after_an_exception(pipe, bank, calls):
    state, left = state_of(pipe.transformer), [calls]

    def interrupt(*_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(interrupt)
    structure = inside(pipe.transformer)
    with pytest.raises(KeyboardInterrupt):
        allocate(DiffusersHost(pipe), bank, target=0.7)
    assert same_state(state, state_of(pipe.transformer)) and structure == inside(pipe.transformer)
    hook.remove()


def test_a_level_that_breaks_the_model_is_never_chosen(host, fine_bank, monkeypatch):
    """In half precision a level can overflow: its error is NaN, which must not sort as the best."""
    real = Probes.differences

    def differences(self, levels, batch):
        result = real(self, levels, batch)
        return result * float("nan") if max(levels) > 0.6 else result

    monkeypatch.setattr(Probes, "differences", differences)
    for target in (0.7, 0.6):
        found = allocate(host, fine_bank, target=target, prompts=PROMPTS, steps=5)
        assert max(found.schedule.levels) < 0.6
        assert found.candidates[0].measured == found.candidates[0].measured, "not NaN"


def test_a_bank_that_breaks_the_model_throughout_is_refused(fine_bank):
    """Its consumers overflow: there is nothing to choose, and no schedule comes back with an error of NaN."""
    host = DiffusersHost(make_pipe())
    bank = broken(fine_bank)
    for strategy in ("measured", "joint"):
        with pytest.raises(AllocationError, match="samples are finite: the levels of this bank break the model"):
            allocate(host, bank, target=0.45, strategy=strategy, prompts=PROMPTS, steps=2)


@pytest.mark.parametrize("strategy", ["measured", "joint"])
def test_dense_samples_that_are_not_finite_are_refused(host, fine_bank, strategy):
    message = r"not finite \(\d of \d, with `guidance` 1e\+39 in float32\).* The bank is not to blame"
    with pytest.raises(AllocationError, match=message):
        allocate(host, fine_bank, target=0.6, strategy=strategy, prompts=PROMPTS, steps=4, guidance=1e39)


@pytest.mark.parametrize("verb", ["allocate", "search", "compare", "evaluate"])
def test_one_text_is_no_list_of_prompts(pipe, fine_bank, verb):
    """It would be read letter by letter, and here each letter is a class."""
    given = stageprune.Bundle(fine_bank, StageSchedule.uniform(0.5)) if verb == "evaluate" else fine_bank
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(StagePruneError, match=r"`prompts` must be a list of .* got one str; give \['12345678'\]"):
        getattr(stageprune, verb)(pipe, given, prompts="12345678", steps=2)
    assert not calls


def test_allocate_through_the_public_function(pipe, fine_bank):
    found = stageprune.allocate(pipe, fine_bank, target="macs:0.67", prompts=PROMPTS)
    pipe.enable_stage_pruning(stageprune.Bundle(fine_bank, found.schedule))
    assert pipe.stage_pruning_summary(steps=5).executed.share == pytest.approx(found.executed.share)
