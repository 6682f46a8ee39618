"""Stage partitions: what they divide equally, and what becomes of a stage that no step visits."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageprune import MosaicSettings, StageSchedule
from stageprune.core.errors import AllocationError, ScheduleError
from stageprune.core.host import NoiseLevel
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import PARTITIONS, Sampling, divide, register_partition
from stageprune.core.schedule import executed_calls
from zoo import make_pipeline

HOSTS = {
    "ddim": ("dit", None),
    "ddim-leading": ("sd15", None),
    "ddim-zero-snr": (
        "sd15",
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ),
    "euler-karras": ("sdxl", diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)),
    "heun": ("sd15", diffusers.HeunDiscreteScheduler()),
    "flow-shift-3": ("sd3", None),
    "flow-dynamic-shift": ("flux", None),
}


@pytest.fixture(scope="module", params=HOSTS)
def driven(request):
    name, scheduler = HOSTS[request.param]
    pipe = make_pipeline(name)
    pipe.scheduler = scheduler or pipe.scheduler
    return DiffusersHost(pipe)


def sampling_of(host, steps, **options):
    return Sampling(host, [], steps, 1.0, mosaic=MosaicSettings(mean_square=0.7), **options)


class FakeHost:
    """Calls at given noise levels of a flow; all that a partition asks for."""

    def __init__(self, taus):
        self.given = taus

    def taus(self, steps):
        return self.given

    def noise_levels(self, taus):
        return [NoiseLevel(1 - tau, tau) for tau in taus]


@pytest.mark.parametrize("steps", [4, 7, 20])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equal_steps(driven, steps, count):
    """To within one call, or as near as calls at one noise level allow."""
    sampling = sampling_of(driven, steps)
    calls = executed_calls(divide(f"equal-steps:{count}", sampling), sampling.taus)
    assert sum(calls) == len(sampling.taus) and len(calls) == count
    repeats = max(sampling.taus.count(tau) for tau in sampling.taus)
    assert max(calls) - min(calls) <= 2 * repeats - 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_log_snr(driven, count):
    sampling = sampling_of(driven, 20)
    stages = divide(f"equal-logsnr:{count}", sampling, empty="merge")
    assert len(stages.stages) == count
    executed = [level.log_snr for level in driven.noise_levels(sampling.taus)]
    finite = [value for value in executed if math.isfinite(value)]
    inner = [level.log_snr for level in driven.noise_levels(stages.edges[1:-1])]
    widths = [after - before for before, after in pairwise([min(finite), *inner, max(finite)])]
    assert widths == pytest.approx([(max(finite) - min(finite)) / count] * count, rel=1e-6)


def test_mosaic(driven):
    """The fast stage between its sides; none is noisier for flow matching. A lower threshold widens it."""
    flow = driven.noise_levels([0.25]) == [NoiseLevel(0.75, 0.25)]
    sampling, widths = sampling_of(driven, 50), []
    score = sampling.mosaic_scores
    for threshold in (0.9, 0.55, 0.3):
        stages = divide(f"mosaic:{threshold}", sampling, empty="merge")
        fast = stages.stage_of(score.index(max(score)) / len(score))
        assert len(stages.stages) <= 3 and (fast == 0) == flow
        widths.append(stages.stages[fast].high - stages.stages[fast].low)
    assert widths == sorted(widths)
    assert divide("mosaic", sampling) == divide("mosaic:0.55", sampling)


def test_mosaic_of_the_linear_schedule():
    stages = divide("mosaic", sampling_of(DiffusersHost(make_pipeline("dit")), 50))
    assert stages.edges == pytest.approx([1, 0.543, 0.097, 0], abs=0.002)


def test_equal_in_tau_and_by_hand():
    sampling = sampling_of(FakeHost([0.95, 0.7, 0.5, 0.3, 0.1]), 5)
    assert divide(4, sampling).edges == divide("equal-tau:4", sampling).edges == [1, 0.75, 0.5, 0.25, 0]
    assert len(divide("equal-tau", sampling).stages) == 5
    assert divide([0.8, 0.2], sampling, [0, 0.5, 0.2]) == StageSchedule.from_levels([0, 0.5, 0.2], [0.8, 0.2])


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=20, unique=True),
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
)
def test_merging_leaves_every_call_at_its_level(times, levels):
    """Every stage is visited afterwards, and nothing changes for the sampler."""
    sampling = sampling_of(FakeHost([time / 1000 for time in times]), len(times))
    asked = StageSchedule.from_levels([level / 10 for level in levels])
    merged = divide(len(levels), sampling, asked.levels, empty="merge")
    assert all(executed_calls(merged, sampling.taus))
    for tau in sampling.taus:
        assert merged.stages[merged.stage_of(tau)].sparsity == asked.stages[asked.stage_of(tau)].sparsity


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 12), st.sampled_from(["steps", "tau"]))
def test_merging_always_gives_a_schedule(taus, count, name):
    sampling = sampling_of(FakeHost(taus), len(taus))
    merged = divide(f"equal-{name}:{count}", sampling, empty="merge")
    assert all(executed_calls(merged, taus)) and 1 <= len(merged.stages) <= count


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (3, {}, "no step of a 2-step run falls in stage 1"),
        ([0.99, 0.95, 0.8], {}, "no step of a 2-step run falls in stage 0"),
        ("equal-steps:3", {}, "visits too few noise levels for 3 stages"),
        (0, {}, "`stages` must be at least 1"),
        ("equal-steps:1.5", {}, "`stages` must be at least 1, and whole; got 1.5"),
        ("equal-steps:nan", {}, "`stages` must be at least 1, and whole; got nan"),
        ("equal-tau:inf", {}, "`stages` must be at least 1, and whole; got inf"),
        ("equal-steps:many", {}, "what follows the colon must be a number"),
        ("thirds", {}, "must be a number, boundaries in tau, or one of equal-tau, equal-steps, equal-logsnr, mosaic"),
        ("mosaic:2", {}, r"takes a threshold in \(0, 1\), got 2"),
        (2, {"empty": "ignore"}, "`empty` must be one of refuse, merge"),
        (2, {"levels": [0.1, 0.2, 0.3]}, "`levels` must be one a stage: got 3 for 2 stages"),
    ],
)
def test_refused(stages, options, message):
    with pytest.raises(AllocationError, match=message):
        divide(stages, sampling_of(FakeHost([0.9, 0.1]), 2), **options)


def test_boundaries_that_do_not_fall_are_refused():
    with pytest.raises(ScheduleError):
        divide([0.2, 0.8], sampling_of(FakeHost([0.9, 0.1]), 2))


@pytest.mark.parametrize("taus", [[0.5], [1.0], [1.0, 0.4]])
def test_one_noise_level_cannot_be_divided_by_log_snr(taus):
    sampling = sampling_of(FakeHost(taus), len(taus))
    with pytest.raises(AllocationError, match="needs at least two noise levels"):
        divide("equal-logsnr:2", sampling)
    assert divide("equal-logsnr:1", sampling).edges == [1, 0]


def test_a_partition_of_ones_own(monkeypatch):
    monkeypatch.setattr("stageprune.core.planning.partitions.PARTITIONS", dict(PARTITIONS))
    register_partition("halves")(lambda sampling, number: [number or 0.5])
    sampling = sampling_of(FakeHost([0.9, 0.1]), 2)
    assert divide("halves", sampling).edges == [1, 0.5, 0] and divide("halves:0.3", sampling).edges == [1, 0.3, 0]
