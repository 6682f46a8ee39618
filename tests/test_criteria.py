"""Criteria that look at data but do not compensate: Wanda and the energy of the inputs."""

from __future__ import annotations

import pytest
import torch

from stageprune.core.calibration import Calibration
from stageprune.core.errors import BankError, CalibrationError
from stageprune.core.groups.layer import layer_at
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import prune
from support import LEVELS, make_pipe

CRITERIA = ("wanda", "activation")
HEADS, NEURONS = "transformer_blocks.1.attn1.to_out.0", "transformer_blocks.2.ff.net.2"


def slow_scores(method, weight, hessian, units):
    """One unit and one column at a time, from the undamped Hessian."""
    width, scores = weight.shape[1] // units, []
    for unit in range(units):
        score = 0.0
        for column in range(unit * width, (unit + 1) * width):
            energy = float(hessian[column, column])
            score += energy if method == "activation" else float(weight[:, column].abs().sum()) * energy**0.5
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize(("path", "group", "units"), [(HEADS, "blocks.1.attn", 5), (NEURONS, "blocks.2.ff", 160)])
def test_order_is_that_of_the_scores(host, pooled, method, path, group, units):
    weight = layer_at(host.denoiser, path).weight.detach().double()
    scores = slow_scores(method, weight, pooled.hessian(path).double(), units)
    bank = prune(host, pooled, method=method, levels=[0.5], multiple=16)
    assert torch.equal(bank.order(group, 0), scores.argsort(descending=True))


@pytest.mark.parametrize("method", CRITERIA)
def test_consumers_are_slices_of_the_dense_ones(host, pooled, method):
    bank = prune(host, pooled, method=method, levels=[0.5], multiple=16)
    linear = layer_at(host.denoiser, NEURONS)
    kept = bank.order("blocks.2.ff", 0)[: bank.kept["blocks.2.ff"][1]]
    assert torch.equal(bank.consumer(NEURONS, 1, 0).weight, linear.weight[:, kept])
    assert torch.equal(bank.consumer(NEURONS, 1, 0).bias, linear.bias)
    assert bank.provenance["calibration"]["prompts"] == pooled.provenance["prompts"]


@pytest.mark.parametrize("method", CRITERIA)
def test_an_order_per_stage_is_that_of_its_stage(host, calibration, method):
    bank = prune(host, calibration, method=method, levels=LEVELS, multiple=16, order="stage")
    weight = layer_at(host.denoiser, NEURONS).weight.detach().double()
    for stage in range(calibration.stages):
        scores = slow_scores(method, weight, calibration.hessian(NEURONS, stage).double(), 160)
        assert torch.equal(bank.order("blocks.2.ff", stage), scores.argsort(descending=True))


@pytest.mark.parametrize("method", CRITERIA)
def test_refusals(host, calibration, pooled, method):
    with pytest.raises(BankError, match=f"method '{method}' needs a `calibration`"):
        prune(host, method=method)
    with pytest.raises(BankError, match=f"method '{method}' does not compensate: .* same per stage"):
        prune(host, calibration, method=method, consumers="stage")
    with pytest.raises(BankError, match="need a calibration with `stages` of at least 2"):
        prune(host, pooled, method=method, order="stage")
    with pytest.raises(CalibrationError, match="of another model"):
        prune(DiffusersHost(make_pipe(seed=2)), pooled, method=method)
    broken = {path: hessian.clone() for path, hessian in pooled.hessians.items()}
    broken[NEURONS][0, 3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="holds NaN or infinity"):
        prune(host, Calibration(broken, pooled.rows, pooled.edges, pooled.fingerprint), method=method, levels=[0.5])
