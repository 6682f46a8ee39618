"""The run time: what an enabled denoiser computes, and that disabling it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stageprune import StageSchedule, disable_stage_pruning, enable_stage_pruning, is_stage_pruning_enabled
from stageprune.core.bundle import Bundle
from stageprune.core.calibration import calibrate
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import prune
from stageprune.core.runtime import applied, pruner_of
from support import (
    GUIDANCE,
    LABELS,
    LEVELS,
    SCHEDULE,
    SHARING_IDS,
    SHARINGS,
    STEPS,
    TAUS,
    forward,
    images,
    inside,
    latents,
    make_pipe,
    raising,
    reference,
    reference_latents,
    relative,
    same_state,
    state_of,
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("level", range(len(LEVELS)))
@pytest.mark.parametrize("stage", range(5))
def test_every_level_equals_physical_slicing(pipe, bank, level, stage):
    levels = [LEVELS[level] if i == stage else 0.0 for i in range(5)]
    with reference(pipe.transformer, bank, level, stage):
        expected = forward(pipe.transformer, TAUS[stage])
    dense = forward(pipe.transformer, TAUS[stage])
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels(levels)))
    got = forward(pipe.transformer, TAUS[stage])
    assert relative(got, expected) < TOLERANCE
    assert (relative(got, dense) > 100 * TOLERANCE) == (level > 0), "the test must be able to tell the levels apart"


def test_trajectory_equals_reference(pipe, bank):
    expected = reference_latents(pipe, bank, SCHEDULE)
    dense = latents(pipe)
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    got = latents(pipe)
    assert relative(got, expected) < 10 * TOLERANCE
    assert relative(got, dense) > 1000 * TOLERANCE
    assert torch.equal(got, latents(pipe)), "a second image must not depend on the first"


def test_level_zero_everywhere_is_dense(pipe, bank):
    expected = latents(pipe)
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels([0.0] * 5)))
    assert relative(latents(pipe), expected) < TOLERANCE


def test_stages_outside_the_schedules_reach_stay_dense(pipe, bank):
    expected = forward(pipe.transformer, 0.9)
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels([0, 0.7, 0.7, 0.7, 0.7])))
    forward(pipe.transformer, 0.1)
    assert relative(forward(pipe.transformer, 0.9), expected) < TOLERANCE


@pytest.mark.parametrize(("order", "consumers"), SHARINGS, ids=SHARING_IDS)
@pytest.mark.parametrize("config", [{}, {"activation_fn": "geglu"}], ids=["gelu", "geglu"])
@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_a_level_may_keep_all_units_of_a_group(order, consumers, config, multiple):
    """At 0.05 all 5 heads stay (and at a coarse multiple all neurons), while the other groups shrink."""
    pipe = make_pipe(**config)
    host = DiffusersHost(pipe)
    calibration = calibrate(host, LABELS * 6, steps=4, stages=2)
    bank = prune(host, calibration, levels=[0, 0.05, 0.2], multiple=multiple, order=order, consumers=consumers)
    assert bank.kept["blocks.0.attn"][1] == 5
    for level, sparsity in enumerate(bank.sparsities):
        for stage, tau in enumerate((0.8, 0.2)):
            with reference(pipe.transformer, bank, level, stage):
                expected = forward(pipe.transformer, tau)
            with applied(host, bank) as pruner:
                pruner.schedule = StageSchedule.from_levels([sparsity] * 2)
                got = forward(pipe.transformer, tau)
            assert relative(got, expected) < TOLERANCE, (sparsity, stage)


@pytest.mark.parametrize("config", [{"attention_bias": False}, {"num_attention_heads": 3, "attention_head_dim": 12}])
@pytest.mark.parametrize("kinds", [("head", "neuron"), ("neuron",), ("head",)], ids="+".join)
def test_other_shapes_and_kinds(config, kinds):
    pipe = make_pipe(**config)
    host = DiffusersHost(pipe)
    calibration = calibrate(host, LABELS * 6, steps=4, stages=2)
    for order in ("shared", "stage"):
        bank = prune(host, calibration, levels=[0, 0.3, 0.6], multiple=16, kinds=kinds, order=order)
        with reference(pipe.transformer, bank, 2, 1):
            expected = forward(pipe.transformer, 0.2)
        state = state_of(pipe.transformer)
        enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels([0.3, 0.6])))
        assert relative(forward(pipe.transformer, 0.2), expected) < TOLERANCE
        disable_stage_pruning(pipe)
        assert same_state(state, state_of(pipe.transformer))


@pytest.mark.parametrize("interrupt", [None, RuntimeError, KeyboardInterrupt])
def test_enable_disable_leaves_no_trace(pipe, bundle, interrupt):
    before, state, structure = images(pipe), state_of(pipe.transformer), inside(pipe.transformer)
    parameters = {name: id(parameter) for name, parameter in pipe.transformer.named_parameters()}
    for _ in range(2):
        enable_stage_pruning(pipe, bundle)
        pruned = images(pipe)
        if interrupt:
            with pytest.raises(interrupt), raising(pipe.transformer.transformer_blocks[1], interrupt, call=3):
                images(pipe)
            assert torch.equal(images(pipe), pruned), "an exception must not leave a wrong level behind"
        disable_stage_pruning(pipe)
        assert torch.equal(images(pipe), before)
        assert same_state(state_of(pipe.transformer), state)
        assert inside(pipe.transformer) == structure
        assert parameters == {name: id(parameter) for name, parameter in pipe.transformer.named_parameters()}


def test_disable_straight_after_an_exception(pipe, bundle):
    before, state = images(pipe), state_of(pipe.transformer)
    enable_stage_pruning(pipe, bundle)
    with pytest.raises(KeyboardInterrupt), raising(pipe.transformer.transformer_blocks[1], KeyboardInterrupt, call=4):
        images(pipe)
    disable_stage_pruning(pipe)
    assert torch.equal(images(pipe), before)
    assert same_state(state_of(pipe.transformer), state)


def test_state_dict_while_enabled_is_dense(pipe, bundle):
    state = state_of(pipe.transformer)
    enable_stage_pruning(pipe, bundle)
    assert same_state(state_of(pipe.transformer), state)
    images(pipe)
    assert same_state(state_of(pipe.transformer), state)
    fresh = make_pipe(seed=5).transformer
    fresh.load_state_dict(pipe.transformer.state_dict())
    assert same_state(state_of(fresh), state)


def test_save_pretrained_while_enabled_saves_the_dense_model(pipe, bundle, tmp_path):
    before, state = images(pipe), state_of(pipe.transformer)
    enable_stage_pruning(pipe, bundle)
    images(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert same_state(state_of(again.transformer), state)
    assert torch.equal(images(again), before)


def test_deepcopy_is_enabled_and_independent(pipe, bundle):
    dense = images(pipe)
    enable_stage_pruning(pipe, bundle)
    pruned = images(pipe)
    twin = copy.deepcopy(pipe.transformer)
    assert pruner_of(twin).denoiser is twin
    disable_stage_pruning(pipe)
    assert torch.equal(images(pipe), dense)
    pipe.register_modules(transformer=twin)
    switches = pruner_of(twin).switches
    assert torch.equal(images(pipe), pruned)
    assert pruner_of(twin).switches > switches
    disable_stage_pruning(pipe)
    assert torch.equal(images(pipe), dense)
    assert pruner_of(twin) is None and not twin._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_change_while_enabled(pipe, bundle, dtype):
    reference_state = state_of(copy.deepcopy(pipe.transformer).to(dtype))
    enable_stage_pruning(pipe, bundle)
    single = forward(pipe.transformer, 0.3)
    pipe.transformer.to(dtype)
    got = forward(pipe.transformer, 0.3)
    assert got.dtype == dtype
    assert relative(got.float(), single) < (0.05 if dtype == torch.bfloat16 else TOLERANCE)
    forward(pipe.transformer, 0.5)
    assert relative(forward(pipe.transformer, 0.3).float(), got.float()) == 0
    disable_stage_pruning(pipe)
    assert same_state(state_of(pipe.transformer), reference_state)


def test_a_float32_bundle_runs_on_a_half_precision_model(pipe, bundle):
    enable_stage_pruning(pipe, bundle)
    expected = forward(pipe.transformer, 0.3)
    disable_stage_pruning(pipe)
    pipe.transformer.to(torch.bfloat16)
    enable_stage_pruning(pipe, bundle)
    assert relative(forward(pipe.transformer, 0.3).float(), expected) < 0.05


def test_a_switch_sets_integers_only(enabled):
    denoiser = enabled.transformer
    images(enabled)

    def tensors():
        named = [*denoiser.named_parameters(), *denoiser.named_buffers()]
        return {name: (id(tensor), tensor.data_ptr(), tensor.shape) for name, tensor in named}

    before = tensors()
    for tau in (*TAUS, *reversed(TAUS)):
        forward(denoiser, tau)
        assert tensors() == before


def test_switches_count_stage_changes(enabled):
    pruner = pruner_of(enabled.transformer)
    assert pruner.switches == 0
    images(enabled)
    assert pruner.switches == 4  # dense is set at the start; five stages follow, each unlike the one before
    images(enabled)
    assert pruner.switches == 9
    images(enabled, steps=10)
    assert pruner.switches == 14, "steps within a stage must not switch"
    forward(enabled.transformer, 0.1)
    assert pruner.switches == 14, "the same stage again must not switch"


def test_equal_neighbours_do_not_switch(pipe, banks):
    schedule = StageSchedule.from_levels([0.5] * 5)
    for name, expected in zip(SHARING_IDS, (0, 4, 4), strict=True):  # enabling sets the first stage
        enable_stage_pruning(pipe, Bundle(banks[name], schedule))
        images(pipe)
        assert pruner_of(pipe.transformer).switches == expected
        disable_stage_pruning(pipe)


def test_run_from_the_middle_equals_run_in_one_go(enabled):
    """Image-to-image starts inside the trajectory: the stage depends on tau alone."""
    host = DiffusersHost(enabled)
    conditions, start = host.encode(LABELS), host.start(range(3), 10)
    whole = host.advance(start, conditions, GUIDANCE, 10).latents
    for split in (1, 3, 7):
        half = host.advance(start, conditions, GUIDANCE, split)
        forward(enabled.transformer, 0.1)  # another image leaves another level behind
        assert torch.equal(host.advance(half, conditions, GUIDANCE, 10).latents, whole)


def test_guidance_off(pipe, bank):
    dense = latents(pipe, guidance=1.0)
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    assert relative(latents(pipe, guidance=1.0), dense) > TOLERANCE
    assert torch.equal(DiffusersHost(pipe).decode(latents(pipe, guidance=1.0)), images(pipe, guidance=1.0))


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied to another device or dtype."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bank", ["stage-stage"], indirect=True)
def test_switching_again_uploads_nothing(pipe, bundle):
    """The meta device stands in for one that is not the CPU."""
    enable_stage_pruning(pipe, bundle)
    denoiser, running = pipe.transformer, pruner_of(pipe.transformer)
    denoiser.to("meta")
    for expected in (True, False):
        with Copies() as copies:
            for stage in range(5):
                running.switch(stage)
        assert (copies.count > 0) == expected
    denoiser.to_empty(device="cpu")
    for parameter in denoiser.parameters():
        torch.nn.init.uniform_(parameter)
    running.switch(2)
    gathers = [(layer, rows[running._active]) for layer, rows in running._gathers]
    assert gathers and all(torch.equal(layer.stage_weight[: len(rows)], layer.weight[rows]) for layer, rows in gathers)


def test_pipelines_that_share_a_denoiser(pipe, bundle):
    other = type(pipe)(pipe.transformer, pipe.vae, copy.deepcopy(pipe.scheduler))
    other.set_progress_bar_config(disable=True)
    dense = images(pipe)
    enable_stage_pruning(pipe, bundle)
    pruned = images(pipe)
    assert is_stage_pruning_enabled(other) and torch.equal(images(other), pruned)
    disable_stage_pruning(other)
    assert not is_stage_pruning_enabled(pipe) and torch.equal(images(pipe), dense)


def test_a_plain_denoiser_can_be_enabled(pipe, bundle):
    enable_stage_pruning(pipe, bundle)
    expected = forward(pipe.transformer, 0.3)
    disable_stage_pruning(pipe.transformer)
    enable_stage_pruning(pipe.transformer, bundle)
    assert torch.equal(forward(pipe.transformer, 0.3), expected)


def test_applied_restores_whatever_happens(pipe, bank):
    state, structure = state_of(pipe.transformer), inside(pipe.transformer)
    with pytest.raises(KeyboardInterrupt), applied(DiffusersHost(pipe), bank) as pruner:
        pruner.schedule = SCHEDULE
        latents(pipe, steps=STEPS)
        raise KeyboardInterrupt
    assert same_state(state_of(pipe.transformer), state) and inside(pipe.transformer) == structure
