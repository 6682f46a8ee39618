"""Published architectures, on the meta device: no weight is made, and every figure can still be counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stageprune import find_groups
from stageprune.core import cli
from stageprune.core.groups import family_of, measure_cost, width_groups
from stageprune.core.groups.check import sliced
from stageprune.core.hosts.diffusers.fullsize import FULL_SIZE
from stageprune.core.pruning.levels import kept_counts

EXPECTED = {  # parameters in billions, TFLOP of one forward
    "dit-xl": (0.750, 0.237),
    "sd15": (0.860, 0.803),
    "sdxl": (2.567, 6.761),
    "sd3-medium": (2.028, 8.904),
    "sd35-medium": (2.243, 11.250),
    "sd35-large": (8.057, 31.12),
    "flux-dev": (11.90, 74.39),
}


def test_all_are_named_by_the_command():
    assert ", ".join(FULL_SIZE) == cli.FULL_SIZE and set(EXPECTED) == set(FULL_SIZE)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_parameters_and_cost_are_as_expected(name):
    billions, teraflop = EXPECTED[name]
    model = FULL_SIZE[name].build("meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.001)
    assert 2 * measure_cost(model).dense / 1e12 == pytest.approx(teraflop, rel=0.002)


@pytest.mark.parametrize("name", ["sdxl", "sd35-medium", "flux-dev"])
def test_cost_of_a_pruned_model_is_what_a_counter_counts(name):
    model = FULL_SIZE[name].build("meta")
    groups = find_groups(model)
    cost = measure_cost(model, groups)
    kept = {group: counts[1] for group, counts in kept_counts(width_groups(groups), cost, (0.0, 0.5)).items()}
    keep = {group: torch.arange(count) for group, count in kept.items()}
    inputs = family_of(model).example_inputs(model)
    with sliced(model, groups, keep), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert cost.macs(kept) == counter.get_total_flops() // 2


def test_weights_are_made_in_the_asked_precision():
    before = torch.get_default_dtype()
    model = FULL_SIZE["sd15"].build("meta", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == before
