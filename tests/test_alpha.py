"""The weights of the denoising steps: OBS-Diff's formulas, and functions of one's own."""

from __future__ import annotations

import math

import pytest

from stageprune.core.calibration import ALPHAS, calibrate, step_weights
from stageprune.core.errors import CalibrationError
from stageprune.core.hosts.diffusers import DiffusersHost
from support import relative

TAUS = [1 - i / 25 for i in range(25)]
SHAPES = {
    "uniform": lambda i, steps: 1.0,
    "log-decrease": lambda i, steps: 0.8 + 0.4 * math.log(steps - i) / math.log(steps),
    "log-increase": lambda i, steps: 0.8 + 0.4 * math.log(i + 1) / math.log(steps),
    "linear-decrease": lambda i, steps: 0.8 + 0.4 * (steps - 1 - i) / (steps - 1),
    "linear-increase": lambda i, steps: 0.8 + 0.4 * i / (steps - 1),
}
PROMPTS = [1, 2, 3] * 4


@pytest.mark.parametrize("steps", [2, 4, 25])
@pytest.mark.parametrize("name", ALPHAS)
def test_names_are_the_published_formulas(name, steps):
    expected = [SHAPES[name](i, steps) for i in range(steps)]
    assert step_weights(name, TAUS[:steps]) == pytest.approx(expected)


@pytest.mark.parametrize("name", ALPHAS)
def test_a_single_step(name):
    assert step_weights(name, [1.0]) == [1.0 if name == "uniform" else 1.2]


def test_a_function_of_tau():
    assert step_weights(lambda tau: 1 + tau, [1.0, 0.5, 0.0]) == [2, 1.5, 1]
    assert step_weights(lambda tau: int(tau > 0.5), [1.0, 0.2]) == [1, 0]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ("cosine", "`alpha` must be a function of tau or one of uniform, log-decrease, .*; got 'cosine'"),
        ([1.0, 0.5], r"`alpha` must be a function of tau or one of .*; got \[1.0, 0.5\]"),
        (lambda tau: tau - 2, "`alpha` must give finite weights of at least 0; at tau 0.999 it gave -1.001"),
        (lambda tau: math.nan, "finite weights of at least 0; at tau 0.999 it gave nan"),
        (lambda tau: math.inf, "finite weights of at least 0; at tau 0.999 it gave inf"),
        (lambda tau: "much", "`alpha` must give a number; at tau 0.999 it gave 'much'"),
        (lambda tau: 0.0, "`alpha` is 0 at every step"),
    ],
)
def test_refusals(pipe, alpha, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(DiffusersHost(pipe), PROMPTS, steps=2, alpha=alpha)


def test_provenance_names_the_function_and_says_what_it_gave(pipe):
    def early(tau: float) -> float:
        return 2.0 * tau

    host = DiffusersHost(pipe)
    made = calibrate(host, PROMPTS, steps=4, alpha=early)
    assert made.provenance["alpha"] == "early"
    assert made.provenance["alpha_weights"] == [2 * tau for tau in host.taus(4)]
    assert "alpha_weights" not in calibrate(host, PROMPTS, steps=4).provenance


def test_a_checkpoint_knows_functions_of_one_name_apart(pipe, tmp_path):
    host, checkpoint = DiffusersHost(pipe), tmp_path / "c.part"
    first = calibrate(host, PROMPTS, steps=4, alpha=lambda tau: tau, checkpoint=checkpoint)
    again = calibrate(host, PROMPTS, steps=4, alpha=lambda tau: tau, checkpoint=checkpoint)
    assert all(relative(again.hessians[path], first.hessians[path]) == 0 for path in first.hessians)
    with pytest.raises(CalibrationError, match="not the same alpha_weights"):
        calibrate(host, PROMPTS, steps=4, alpha=lambda tau: 1 - tau / 2, checkpoint=checkpoint)


def test_steps_of_weight_0_are_as_if_they_were_not_there(pipe):
    host = DiffusersHost(pipe)
    late = calibrate(host, PROMPTS, steps=4, alpha=lambda tau: float(tau < 0.5))
    staged = calibrate(host, PROMPTS, steps=4, stages=2)
    for path, hessian in late.hessians.items():
        assert relative(hessian[0], staged.hessians[path][1]) < 1e-6
        assert int(late.rows[path]) == int(staged.rows[path][1])
