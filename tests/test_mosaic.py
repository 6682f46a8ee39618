"""MosaicDiff's closed form against Monte Carlo, and the stages that it gives."""

from __future__ import annotations

import diffusers
import pytest
import torch

from stageprune import MosaicSettings, StageSchedule
from stageprune.core.errors import AllocationError
from stageprune.core.host import NoiseLevel, sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers.noise import noise_levels
from stageprune.core.planning import Sampling
from stageprune.core.planning.mosaic import (
    expected_gradient,
    expected_mse,
    fast_stage,
    grid,
    mosaic_boundaries,
    relative_sparsities,
    scores,
)
from support import GUIDANCE
from zoo import make_pipeline

SCHEDULERS = {
    "linear": diffusers.DDIMScheduler(beta_schedule="linear"),
    "scaled-linear": diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "cosine": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero-snr": diffusers.DDIMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
TIMES = (1, 20, 97, 300, 543, 800, 950, 999)


def levels_of(name):
    return noise_levels(SCHEDULERS[name], grid())


@pytest.fixture(scope="module")
def draws():
    """Clean values that are far from Gaussian, and noise with its negative, so that odd moments vanish."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2**20, generator=generator, dtype=torch.float64) ** 2 * 2 - 0.3
    noise = torch.randn(2**20, generator=generator, dtype=torch.float64)
    return torch.cat([clean, clean]), torch.cat([noise, -noise])


@pytest.mark.parametrize("mean_square", [0.5, 1.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_closed_form_is_monte_carlo(name, mean_square, draws):
    """Within 1 %, mean squared error and gradient alike."""
    clean, noise = draws
    clean = clean * (mean_square / clean.square().mean()) ** 0.5
    levels = levels_of(name)
    gradient = expected_gradient(levels, mean_square)

    def error(level: NoiseLevel) -> float:
        return float((level.signal * clean + level.noise * noise - clean).square().mean())

    for time in TIMES:
        assert expected_mse(levels[time], mean_square) == pytest.approx(error(levels[time]), rel=0.01)
        assert gradient[time] == pytest.approx(error(levels[time]) - error(levels[time - 1]), rel=0.01)


@pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine"])
def test_gradient_is_the_papers_formula(name):
    """(1/d) [(delta_t + 2 (sqrt(ab_{t-1}) - sqrt(ab_t))) |x_0|^2 - delta_t |I|^2], delta_t = ab_t - ab_{t-1}."""
    alphas, mean_square = SCHEDULERS[name].alphas_cumprod.double(), 0.7
    delta = alphas.diff()
    paper = (delta - 2 * alphas.sqrt().diff()) * mean_square - delta
    torch.testing.assert_close(torch.tensor(expected_gradient(levels_of(name), mean_square))[1:], paper.float())


@pytest.mark.parametrize(
    ("name", "mean_square", "expected"),
    [
        ("linear", 0.5, (90, 509)),
        ("linear", 0.7, (97, 543)),
        ("linear", 1.0, (109, 581)),
        ("linear", 1.5, (132, 618)),
        ("scaled-linear", 0.7, (86, 817)),
        ("scaled-linear", 1.0, (120, 865)),
    ],
)
def test_the_fast_stage_of_known_schedules(name, mean_square, expected):
    """Counted from t = 1; linear with M = 0.55 and m = 0.7 is the paper's 10 / 45 / 45 %."""
    first, last = fast_stage(scores(levels_of(name), mean_square), 0.55)
    assert (first + 1, last + 1) == expected


def test_flow_matching_has_no_early_stage():
    """E[MSE] = sigma^2 (1 + m): its gradient rises up to pure noise."""
    score = scores(levels_of("flow"), 0.7)
    assert score == sorted(score)
    assert mosaic_boundaries(score, 0.55) == [0.55]


def test_the_snr_term_pulls_the_fast_stage_to_the_clean_end():
    found = [fast_stage(scores(levels_of("linear"), 0.7, weight), 0.55) for weight in (0.0, 1e-5, 1e-4, 1e-3)]
    assert found == sorted(found, reverse=True) and found[0] != found[-1]
    assert all(abs(value) < 1 for value in scores(levels_of("flow"), 0.7, 0.01)), "infinite ln SNR is cut off"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_fast_stage_is_pruned_least(name):
    score = scores(levels_of(name), 0.7)
    boundaries = mosaic_boundaries(score, 0.55)
    stages = StageSchedule.from_levels([0.0] * (len(boundaries) + 1), boundaries)
    weights = relative_sparsities(score, stages)
    fast = stages.stage_of(score.index(max(score)) / len(score))
    assert min(range(len(weights)), key=weights.__getitem__) == fast
    assert all(0 <= weight <= 1 for weight in weights)


def test_a_stage_narrower_than_the_grid_has_a_score():
    score = scores(levels_of("linear"), 0.7)
    narrow = StageSchedule.from_levels([0.0] * 3, [0.40051, 0.4005])
    assert relative_sparsities(score, narrow)[1] == pytest.approx(1 - score[400] / max(score))


@pytest.mark.parametrize("name", ["dit", "sd15", "sd3", "flux"])
def test_the_mean_square_is_that_of_the_pipelines_own_samples(name):
    host = DiffusersHost(make_pipeline(name))
    prompts = host.default_prompts()[:3]
    measured = Sampling(host, prompts, 3, GUIDANCE, seed=5).mosaic_scores
    mean_square = float(sample(host, host.encode(prompts), [5, 6, 7], 3, GUIDANCE).square().mean())
    given = Sampling(host, prompts, 3, GUIDANCE, mosaic=MosaicSettings(mean_square=mean_square)).mosaic_scores
    assert measured == pytest.approx(given)


@pytest.mark.parametrize(
    "settings", [{"threshold": 0}, {"threshold": 1}, {"snr_weight": -1}, {"mean_square": 0}, {"mean_square": -1.0}]
)
def test_bad_settings(settings):
    with pytest.raises(AllocationError, match=f"mosaic's `{next(iter(settings))}` must be"):
        MosaicSettings(**settings)
