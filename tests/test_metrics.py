"""The evaluation's metrics, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stageprune.core.errors import StagePruneError
from stageprune.core.evaluation import ClassJudge, frechet, frechet_distance, mse, psnr, ssim
from stageprune.core.evaluation.metrics import frechet_without_each, jackknife_error, standard_error


@pytest.fixture
def judge():
    torch.manual_seed(1)
    return ClassJudge([1, 2, 3], held_out_accuracy=0.5, held_out_images=10)


def test_mse_is_a_value_a_sample():
    values = torch.zeros(2, 3, 4, 4)
    values[1] = 0.5
    assert mse(values, torch.zeros_like(values)).tolist() == [0.0, 0.25]


def test_psnr_of_a_known_difference():
    dense = torch.zeros(2, 3, 16, 16)
    # an MSE of 0.01 is 20 dB, one of 0.25 is 6.02 dB
    images = torch.stack([torch.full((3, 16, 16), 0.1), torch.full((3, 16, 16), 0.5)])
    assert psnr(images, dense).tolist() == pytest.approx([20.0, 6.0206], abs=1e-4)
    assert psnr(dense, dense).isinf().all()


def test_ssim_of_constant_images_follows_its_formula():
    first, second = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    luminance = (2 * 0.2 * 0.6 + 0.01**2) / (0.2**2 + 0.6**2 + 0.01**2)  # contrast and structure are 1
    assert ssim(second, first).tolist() == pytest.approx([luminance], abs=1e-4)
    noise = torch.rand(3, 3, 16, 16)
    assert ssim(noise, noise).tolist() == pytest.approx([1.0] * 3)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(StagePruneError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_paired_metrics_refuse_other_shapes():
    for metric in (mse, psnr, ssim):
        with pytest.raises(StagePruneError, match="equal shapes"):
            metric(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))


def test_frechet_of_known_gaussians():
    mean_a, mean_b = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])
    cov_a, cov_b = torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 1.0]))
    # |mean|^2 = 25; commuting covariances: sum of (sqrt a - sqrt b)^2 = 1 + 4
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(30.0)
    assert frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0.0, abs=1e-9)
    for broken in (math.nan, math.inf):  # what a broken model made is not perfect
        assert math.isnan(frechet_distance(mean_a * broken, cov_a, mean_b, cov_b))
        assert math.isnan(frechet_distance(mean_a, cov_a * broken, mean_b, cov_b))


def test_frechet_of_features_against_a_judges_reference(judge):
    features = torch.randn(500, judge.num_features)
    shifted = frechet(judge, features + 2)  # the reference of a fresh judge is a standard normal
    assert shifted == pytest.approx(4 * judge.num_features, rel=0.1)
    assert frechet(judge, features) < 3
    without_each = frechet_without_each(judge, features[:50])
    assert without_each[7] == pytest.approx(frechet(judge, torch.cat([features[:7], features[8:50]])))


def test_jackknife_error_of_a_mean_is_its_standard_error():
    values = torch.randn(20, dtype=torch.float64)
    without_each = (values.sum() - values) / 19
    assert jackknife_error(without_each) == pytest.approx(standard_error(values))


def test_class_hits_and_standard_error(judge):
    judge.eval()
    images = torch.rand(4, 3, 16, 16)
    predicted = torch.tensor(judge.labels)[judge.logits(images).argmax(1)]
    asked = predicted.clone()
    asked[0] = 99
    assert judge.hits(images, asked).tolist() == [False, True, True, True]
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)  # std sqrt(2) over sqrt(2)
