"""Per-layer allocation: the removals it chooses, what it measures, and that the denoiser is left alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from stageprune.core.api import host_for
from stageprune.core.bundle import Bundle
from stageprune.core.calibration import calibrate
from stageprune.core.errors import BankError, BundleError
from stageprune.core.evaluation.pictures import layers_picture
from stageprune.core.groups import find_groups, measure_cost, width_groups
from stageprune.core.pruning import prune
from stageprune.core.pruning.bank import Consumer
from stageprune.core.pruning.layer_allocation import replay_for
from stageprune.core.pruning.layerwise import Sensitivity, choose, grid_counts, spread
from stageprune.core.pruning.levels import Widths, kept_counts
from stageprune.core.pruning.replay import Replay, replaced
from stageprune.core.pruning.states import zero_filled_state
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule
from support import make_denoiser, same_state, state_of

LEVELS = (0.0, 0.2, 0.4, 0.6)
NAMES = ("dit", "sd15", "sd3", "flux")


@pytest.fixture(scope="module")
def groups():
    return [group for group in width_groups(find_groups(make_denoiser())) if group.kind in ("head", "neuron")]


@pytest.fixture(scope="module")
def cost(groups):
    return measure_cost(make_denoiser(), groups)


def convex(group, factor, multiple):
    """Errors that rise ever faster with what is removed."""
    counts = grid_counts(group, Widths(multiple))
    return counts, tuple(factor * (1 - count / group.size) ** 2 for count in counts)


def sensitivity_of(groups, factors, multiple=16):
    found = {group.name: convex(group, factor, multiple) for group, factor in zip(groups, factors, strict=True)}
    return Sensitivity({name: c for name, (c, _) in found.items()}, {name: e for name, (_, e) in found.items()})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_levels_are_nested_and_remove_what_was_asked(groups, cost, data):
    multiple = data.draw(st.sampled_from([8, 16, 24]))
    factors = data.draw(st.lists(st.floats(1e-6, 10), min_size=len(groups), max_size=len(groups)))
    gap = data.draw(
        st.sampled_from([0.05, 0.01, 0.002])
    )  # of the smallest a level may take more than the next asks for
    begin = data.draw(st.floats(0.001, 0.6))
    steps = data.draw(st.sets(st.integers(0, 10 if gap < 0.05 else 2), min_size=1))
    levels = [0.0, *(begin + gap * step for step in sorted(steps))]
    power = data.draw(st.sampled_from([1.0, 0.5]))
    kept = spread(groups, cost, levels, sensitivity_of(groups, factors, multiple), power, Widths(multiple))
    total = sum(cost.units[group.name] * group.size for group in groups)
    largest = max(cost.units[group.name] * (multiple if group.kind == "neuron" else 1) for group in groups)
    for group in groups:
        counts = kept[group.name]
        assert counts[0] == group.size and list(counts) == sorted(counts, reverse=True) and counts[-1] >= 1
        if group.kind == "neuron":
            assert all(count % multiple == 0 or count == group.size for count in counts)
    for index, level in enumerate(levels):
        gone = sum(cost.units[g.name] * (g.size - kept[g.name][index]) for g in groups)
        assert level * total <= gone + 1e-6 and gone < level * total + largest


@settings(max_examples=30, deadline=None)
@given(factors=st.lists(st.floats(1e-3, 10), min_size=3, max_size=3), share=st.floats(0.1, 0.8))
def test_no_other_division_of_units_at_one_price_errs_less(groups, cost, factors, share):
    """Brute force over heads of three attentions, whose errors are convex and whose heads cost the same."""
    heads = [group for group in groups if group.kind == "head"]
    heads = [replace(heads[0], name=f"{index}") for index in range(3)]
    same = replace(cost, units={g.name: 5 for g in heads}, sizes={g.name: g.size for g in heads})
    size = heads[0].size
    every = tuple(range(size, 0, -1))
    errors = {g.name: tuple(f * (1 - c / size) ** 2 for c in every) for g, f in zip(heads, factors, strict=True)}
    kept = spread(heads, same, [0.0, share], Sensitivity(dict.fromkeys(errors, every), errors))
    gone = sum(size - kept[g.name][1] for g in heads)

    def error(counts):
        return sum(errors[g.name][size - count] for g, count in zip(heads, counts, strict=True))

    rivals = [c for c in itertools.product(range(1, size + 1), repeat=3) if sum(c) == 3 * size - gone]
    assert math.isclose(error([kept[g.name][1] for g in heads]), min(map(error, rivals)), rel_tol=1e-9)


def test_what_costs_nothing_goes_first(groups, cost):
    worthless = groups[1].name
    factors = [0.0 if group.name == worthless else 1.0 for group in groups]
    kept = spread(groups, cost, [0.0, 0.05], sensitivity_of(groups, factors), widths=Widths(16))
    assert kept[worthless][1] < groups[1].size
    assert all(kept[group.name][1] == group.size for group in groups if group.name != worthless)


def test_all_is_removed_that_may_be_and_no_more(groups, cost):
    kept = spread(groups, cost, [0.0, 0.99], sensitivity_of(groups, [1.0] * len(groups)), widths=Widths(16))
    assert all(kept[group.name][1] == grid_counts(group, Widths(16))[-1] for group in groups)


def test_what_breaks_the_samples_goes_last(groups, cost):
    """In half precision a group that is pruned hard may overflow."""
    sensitivity = sensitivity_of(groups, [1.0] * len(groups))
    fragile = groups[0].name
    broken = (*sensitivity.errors[fragile][:2], *(math.inf for _ in sensitivity.errors[fragile][2:]))
    kept = spread(groups, cost, [0.0, 0.5, 0.99], replace(sensitivity, errors={**sensitivity.errors, fragile: broken}))
    assert kept[fragile][1] >= sensitivity.counts[fragile][1] > kept[fragile][2]


def test_a_candidate_that_breaks_the_samples_is_not_chosen():
    broken = {"uniform": [math.inf, 0.01], "squares": [0.1, 0.1], "lengths": [0.2, 0.2]}
    assert choose(broken) == "squares"
    assert choose({"uniform": [math.inf, 0.1], "squares": [math.inf, 0.2]}) == "uniform"


def test_the_candidate_of_least_geometric_mean_wins():
    assert choose({"uniform": [0.1, 0.4], "squares": [0.05, 0.6], "lengths": [0.3, 0.3]}) == "squares"
    assert choose({"uniform": [0.1, 0.4], "squares": [0.2, 0.6]}) == "uniform"


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """Host, calibration and a measured bank of a family."""
    pipe = zoo.make_pipeline(request.param)
    host = host_for(pipe)
    prompts = zoo.prompts_for(pipe)
    kinds = ("head", "neuron", "channel") if request.param == "sd15" else ("head", "neuron")
    calibration = calibrate(host, (list(prompts) * 4)[:4], steps=6, guidance=2.0, kinds=kinds)
    before = state_of(host.denoiser)
    bank = prune(host, calibration, levels=LEVELS, multiple=8)
    assert same_state(before, state_of(host.denoiser))
    return host, calibration, bank


def test_the_error_is_that_of_the_running_level(case):
    """Consumers with zeros in the dense layers give what the pruned layers give."""
    host, calibration, bank = case
    replay = replay_for(host, calibration, 2)
    for level in (1, 3):
        state = zero_filled_state(host.denoiser, bank, level)
        paths = list(bank.consumer_shapes)
        with torch.no_grad():
            replayed = replay.error({p: Consumer(state[f"{p}.weight"], state[f"{p}.bias"]) for p in paths})
        with applied(host, bank) as pruner, torch.no_grad():
            pruner.schedule = StageSchedule.uniform(bank.sparsities[level])
            running = replay.error({})
        assert replayed > 0 and math.isclose(replayed, running, rel_tol=1e-3)


def test_a_step_counts_by_what_its_error_means_at_the_end(case):
    """Once weighed, the error is the mean of what each step, made with these consumers alone, does to the sample."""
    host, calibration, bank = case
    replay = replay_for(host, calibration, 2)
    state = zero_filled_state(host.denoiser, bank, 2)
    consumers = {p: Consumer(state[f"{p}.weight"], state[f"{p}.bias"]) for p in bank.consumer_shapes}
    finals = []
    with applied(host, bank) as pruner, torch.no_grad():
        for step in replay.steps:
            pruner.schedule = StageSchedule.uniform(bank.sparsities[2])
            after = host.advance(step.before, replay.conditions, replay.guidance, step.before.index + 1)
            pruner.schedule = StageSchedule.uniform(0.0)
            final = host.advance(after, replay.conditions, replay.guidance, replay.total).latents
            finals.append(float((final.double() - replay.final.double()).square().mean()))
    assert all(finals) and replay.weights == [1.0] * len(finals)
    with torch.no_grad():
        replay.weigh(consumers)
        assert len(set(replay.weights)) > 1 and min(replay.weights) > 0
        error = replay.error(consumers)
    assert math.isclose(error, sum(finals) * replay.total / len(finals), rel_tol=1e-3)


@pytest.mark.parametrize("steps", range(1, 8))
def test_the_steps_reach_from_the_noisiest_to_the_cleanest(steps):
    host = host_for(zoo.make_pipeline("dit"))
    replay = Replay(host, [1], 0, steps, 2.0, 5)
    places = [step.before.index for step in replay.steps]
    if steps <= 5:
        assert places == list(range(steps))
    else:
        assert len(places) == 5 and places[0] == steps - 1 - places[-1]


def test_samples_that_are_not_finite_are_told_and_saved(tmp_path):
    """A level that overflows has an infinite error; what was measured is recorded as JSON has it, and read again."""
    host = host_for(zoo.make_pipeline("dit"))
    replay = Replay(host, [1], 0, 6, 2.0, 5)
    path = "transformer_blocks.0.ff.net.2"
    layer = host.denoiser.get_submodule(path)
    broken = {path: Consumer(torch.full_like(layer.weight, 3e38), layer.bias)}
    with torch.no_grad():
        assert replay.error(broken) == math.inf
        replay.weigh(broken)
    assert replay.weights == [1.0] * 5
    calibration = calibrate(host, [1, 2, 3, 4], steps=4)
    bank = prune(host, calibration, levels=LEVELS, multiple=8)
    told = replace(bank, provenance={**bank.provenance, "layer_errors": {"squares": [0.1, math.inf, 0.2]}})
    Bundle(told).save(tmp_path / "bundle")
    loaded = Bundle.load(tmp_path / "bundle").bank
    assert loaded.provenance["layer_errors"] == {"squares": [0.1, "inf", 0.2]}
    assert all("squares: 0.1, inf, 0.2" in str(each) for each in (told, loaded))
    with pytest.raises(BundleError, match="not a finite number"):
        Bundle(replace(bank, provenance={"realised": [0.0, math.nan, 0.4, 0.6]})).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_choice_is_measured_and_recorded(case):
    host, calibration, bank = case
    errors = bank.provenance["layer_errors"]
    assert bank.provenance["layer_allocation"] == choose(errors)
    assert set(errors) == {"uniform", "squares", "lengths"} and all(len(each) == 3 for each in errors.values())
    groups = list(bank.groups)
    uniform = kept_counts(groups, measure_cost(host.denoiser, size=host.input_size), LEVELS, Widths(8))
    again = prune(host, calibration, levels=LEVELS, multiple=8, layer_allocation="uniform")
    assert again.kept == uniform and again.provenance["layer_allocation"] == "uniform"
    same = prune(host, calibration, levels=LEVELS, multiple=8)
    assert same.kept == bank.kept and same.provenance["layer_errors"] == errors


def test_an_order_per_stage_is_divided_by_the_pooled_one():
    host = host_for(zoo.make_pipeline("dit"))
    calibration = calibrate(host, [1, 2, 3, 4] * 3, steps=6, guidance=2.0, stages=2)
    shared = prune(host, calibration, levels=LEVELS, multiple=8)
    staged = prune(host, calibration, levels=LEVELS, multiple=8, order="stage")
    assert staged.kept == shared.kept and staged.order_sharing == "stage"


def test_methods_that_do_not_compensate_stay_uniform_unless_asked():
    host = host_for(zoo.make_pipeline("dit"))
    assert prune(host, method="magnitude").provenance["layer_allocation"] == "uniform"
    asked = prune(host, method="magnitude", layer_allocation="measured", multiple=8)
    assert set(asked.provenance["layer_errors"]) == {"uniform", "squares", "lengths"}


def test_replaced_gives_the_very_tensors_back():
    denoiser = make_denoiser()
    path = "transformer_blocks.0.ff.net.2"
    layer = denoiser.get_submodule(path)
    weight, bias = layer.weight.data, layer.bias.data
    other = Consumer(torch.zeros_like(weight), torch.ones_like(bias))
    with pytest.raises(KeyboardInterrupt), replaced(denoiser, {path: other}):
        assert not layer.weight.any() and layer.bias.all()
        raise KeyboardInterrupt
    assert layer.weight.data.data_ptr() == weight.data_ptr() and layer.bias.data.data_ptr() == bias.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "random", "layer_allocation": "best"},
            "`layer_allocation` must be 'measured' or 'uniform', got 'best'",
        ),
        ({"method": "random", "layer_prompts": 0}, "`layer_prompts` must be at least 1, got 0"),
        ({"method": "random", "kinds": ["block"], "layer_allocation": "measured"}, "whole blocks are one group"),
        ({"method": "random", "kept": {}, "layer_allocation": "measured"}, "`kept` says what each group keeps"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(BankError, match=message):
        prune(host_for(zoo.make_pipeline("dit")), **options)


def test_the_picture_of_layers_is_an_image():
    """More layers than names fit under it, too."""
    for count in (3, 90):
        shares = {f"blocks.{index}.ff": (1.0, 0.8, 0.1) for index in range(count)}
        assert layers_picture(shares, (0.0, 0.2, 0.5)).startswith(b"\x89PNG")
