"""Stages, schedules and what they cost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageprune import Stage, StageSchedule
from stageprune.core.errors import AllocationError, ScheduleError
from stageprune.core.schedule import Target, executed_cost

LEVELS = st.lists(st.floats(0, 0.999), min_size=1, max_size=8)


@st.composite
def schedules(draw):
    levels = draw(LEVELS)
    if draw(st.booleans()):
        return StageSchedule.from_levels(levels)
    inner = draw(
        st.lists(st.floats(0.001, 0.999), min_size=len(levels) - 1, max_size=len(levels) - 1, unique=True).map(sorted)
    )
    return StageSchedule.from_levels(levels, inner[::-1])


@given(schedules())
def test_json_round_trip(schedule):
    assert StageSchedule.from_json(schedule.to_json()) == schedule
    assert StageSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert schedule.with_levels(schedule.levels) == schedule


@given(schedules(), st.floats(0, 1))
def test_stage_of_is_the_interval_that_holds_tau(schedule, tau):
    stage = schedule.stages[schedule.stage_of(tau)]
    assert stage.low <= tau < stage.high or (tau == 1 and stage.high == 1)


@given(schedules())
def test_boundaries_belong_to_the_noisier_stage(schedule):
    for index, stage in enumerate(schedule.stages):
        assert schedule.stage_of(stage.low) == index
        if stage.high < 1:
            assert schedule.stage_of(stage.high) == index - 1
    assert schedule.stage_of(1.0) == schedule.stage_of(1 + 1e-9) == 0
    assert schedule.stage_of(0.0) == schedule.stage_of(-1e-9) == len(schedule.stages) - 1
    assert schedule.edges[0] == 1 and schedule.edges[-1] == 0
    assert schedule.edges == sorted(schedule.edges, reverse=True)


@given(schedules(), st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 10**12))
def test_executed_cost_adds_up(schedule, taus, dense):
    macs = {level: int(dense * (1 - level)) for level in (0.0, *schedule.levels)}
    cost = executed_cost(schedule, taus, macs)
    assert sum(cost.calls) == len(taus)
    assert cost.dense == len(taus) * dense
    assert cost.total == sum(macs[schedule.stages[schedule.stage_of(tau)].sparsity] for tau in taus)
    assert 0 <= cost.share <= 1


def test_a_stage_that_no_step_visits_costs_and_saves_nothing():
    schedule = StageSchedule.from_levels([0, 0.9])
    cost = executed_cost(schedule, [1.0, 0.8, 0.6], {0.0: 100, 0.9: 10})
    assert cost.calls == (3, 0) and cost.macs == (300, 0) and cost.share == 1


def test_equal_and_explicit_stages():
    schedule = StageSchedule.from_levels([0, 0, 0.5, 0.7, 0.5])
    assert schedule.edges == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert schedule.levels == [0, 0, 0.5, 0.7, 0.5]
    by_hand = StageSchedule((Stage(1, 0.9, 0), Stage(0.9, 0.1, 0.5), Stage(0.1, 0, 0)))
    assert by_hand == StageSchedule.from_levels([0, 0.5, 0], [0.9, 0.1])
    assert [by_hand.stage_of(tau) for tau in (1, 0.9, 0.89, 0.1, 0.05)] == [0, 0, 1, 1, 2]
    assert StageSchedule.uniform(0.3).stages == (Stage(1, 0, 0.3),)
    assert StageSchedule([Stage(1, 0, 0)]) == StageSchedule((Stage(1, 0, 0),))
    assert hash(by_hand) == hash(StageSchedule.from_json(by_hand.to_json()))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([(0.9, 0, 0)], r"must cover \[0, 1\]: the first one must begin at tau = 1, got 0.9"),
        ([(1, 0.1, 0)], r"must cover \[0, 1\]: the last one must end at tau = 0, got 0.1"),
        ([(1, 0.5, 0), (0.6, 0, 0)], r"stages overlap: one ends at tau = 0.5, the next begins at 0.6"),
        ([(1, 0.5, 0), (0.4, 0, 0)], r"must cover \[0, 1\]: nothing covers tau from 0.4 to 0.5"),
        ([(0.5, 0, 0), (1, 0.5, 0)], "the first one must begin at tau = 1"),
        ([(1, 0, 0), (1, 0, 0)], "overlap"),
        ([(1, 1, 0)], "0 <= low < high <= 1"),
        ([(0.2, 0.8, 0)], "0 <= low < high <= 1"),
        ([(1.5, 0, 0)], "0 <= low < high <= 1"),
        ([(1, -0.5, 0)], "0 <= low < high <= 1"),
        ([(1, 0, 1)], r"`sparsity` must be in \[0, 1\), got 1.0"),
        ([(1, 0, -0.1)], r"`sparsity` must be in \[0, 1\)"),
        ([(1, 0, float("nan"))], "`sparsity` must be a finite number, got nan"),
        ([(float("inf"), 0, 0)], "`high` must be a finite number, got inf"),
        ([(1, 0, True)], "`sparsity` must be a finite number, got True"),
        ([(1, 0, "0.5")], "`sparsity` must be a finite number, got '0.5'"),
        ([(1, None, 0)], "`low` must be a finite number, got None"),
        ([(1, 0, 10**400)], "`sparsity` must be a finite number"),
    ],
)
def test_bad_stages(stages, message):
    with pytest.raises(ScheduleError, match=message):
        StageSchedule(tuple(Stage(*stage) for stage in stages))


@pytest.mark.parametrize(
    ("levels", "boundaries", "message"),
    [
        ([], None, "at least one stage"),
        ([0, 0.5], [], "2 levels need 1 inner `boundaries`, got 0"),
        ([0, 0.5], [0.6, 0.3], "2 levels need 1 inner `boundaries`, got 2"),
        ([0, 0.5, 0], [0.3, 0.6], "low < high"),
        ([0, 0.5], [0.0], "low < high"),
        ([0, 0.5], [1.0], "low < high"),
        ([0, 0.5], [float("nan")], "finite number, got nan"),
        ([0, 1.5], None, r"`sparsity` must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_levels(levels, boundaries, message):
    with pytest.raises(ScheduleError, match=message):
        StageSchedule.from_levels(levels, boundaries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "must be an object with a list `stages`, got int"),
        ("{}", "a list `stages`"),
        ('{"stages": 3}', "a list `stages`"),
        ('{"stages": [3]}', r"stages\[0\] must have the keys \['high', 'low', 'sparsity'\], got 3"),
        ('{"stages": [{"high": 1, "low": 0}]}', r"stages\[0\] must have the keys"),
        ('{"stages": [{"high": 1, "low": 0, "level": 0}]}', r"stages\[0\] must have the keys"),
        ('{"stages": [{"high": 1, "low": 0, "sparsity": 0, "more": 1}]}', r"stages\[0\] must have the keys"),
        ('{"stages": [{"high": 1, "low": 0, "sparsity": NaN}]}', "finite number, got nan"),
        ('{"stages": [{"high": 1, "low": 0, "sparsity": true}]}', "finite number, got True"),
        ('{"stages": []}', "at least one stage"),
        *(
            (
                f'{{"stages": [{{"high": 1, "low": 0, "sparsity": 0}}], "planned_steps": {bad}}}',
                "a number of steps, got",
            )
            for bad in ("0", "true", "2.5", '"20"')
        ),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ScheduleError, match=message):
        StageSchedule.from_json(text)


def test_what_it_was_planned_for_goes_along_and_decides_nothing():
    plain = StageSchedule.from_levels([0, 0.5])
    planned = plain.planned_for(8)
    assert planned == plain and hash(planned) == hash(plain)
    assert StageSchedule.from_json(planned.to_json()).planned_steps == planned.with_taus((1.0, 0.5)).planned_steps == 8
    assert "planned for 8 steps" in str(planned) and "planned" not in str(plain) + plain.to_json()
    assert planned.with_levels([0, 0.2]).planned_steps is None, "other levels meet another budget"


def test_it_prints_and_draws_itself():
    schedule = StageSchedule.from_levels([0, 0.5, 0.95])
    text = str(schedule)
    assert "StageSchedule of 3 stages" in text
    assert "stage 1: tau 0.667 to 0.333, sparsity 0.500" in text
    drawing = schedule.draw(width=30)
    assert drawing == "█" * 10 + "▄" * 10 + "▁" * 10, "even the least share must leave a mark"
    assert drawing in StageSchedule.from_levels([0, 0.5, 0.95]).draw(30)
    assert schedule.draw() in text


def test_it_plots_itself():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedule = StageSchedule.from_levels([0, 0.5, 0.7], [0.8, 0.3])
    axes = schedule.plot()
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [0, 0.5, 0.7]
    edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert [sorted(map(float, edge)) for edge in edges] == [
        pytest.approx([0.8, 1]),
        pytest.approx([0.3, 0.8]),
        pytest.approx([0, 0.3]),
    ]
    assert axes.get_xlim() == (1, 0)
    own = plt.subplots()[1]
    assert schedule.plot(own) is own
    plt.close("all")


@pytest.mark.parametrize(
    ("text", "value"), [("macs:0.67", 0.67), ("0.5", 0.5), (0.25, 0.25), (1, 1.0), (" macs:.5 ", 0.5)]
)
def test_target(text, value):
    assert Target.parse(text) == Target("macs", value)
    assert Target.parse(Target.parse(text)) == Target("macs", value)


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("latency:0.77", Target("latency", 0.77), 0.77),
        ("speedup:1.25", Target("speedup", 1.25), 0.8),
        ("speedup:1", Target("speedup", 1), 1),
        ("sparsity:0.3", Target("sparsity", 0.3), 0.7),
        ("sparsity:0", Target("sparsity", 0), 1),
    ],
)
def test_other_targets(text, target, share):
    assert Target.parse(text) == target
    assert target.share == pytest.approx(share)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        "macs:0", "0", "1.5", "-0.5", "half", "latency:0", "latency:1.2", "speedup:0", "speedup:0.9", "sparsity:1",
        "seconds:3", "", float("nan"), "macs:", True,
    ],
)  # fmt: skip
def test_bad_target(text):
    with pytest.raises(AllocationError, match=r"`target` must look like 'macs:0.67' with a share in \(0, 1\], got"):
        Target.parse(text)
