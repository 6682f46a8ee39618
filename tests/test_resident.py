"""Less memory on the device: dense weights that no stage uses trimmed, inactive levels offloaded. Same results."""

from __future__ import annotations

import copy

import pytest
import torch

from stageprune import Bundle, StagePruneError, StageSchedule, disable_stage_pruning, enable_stage_pruning
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.runtime import StagePruner, pruner, pruner_of, resident_bytes, roles, swap
from support import SCHEDULE, TAUS, forward, images, inside, latents, same_state, state_of, untouched

PRUNED = StageSchedule.from_levels([0.2, 0.5, 0.7, 0.5, 0.2])
WAYS = {
    "trimmed": {"schedule": PRUNED, "trim": True},
    "offloaded": {"schedule": SCHEDULE, "resident": "active"},
    "offloaded and trimmed": {"schedule": PRUNED, "resident": "active"},
    "offloaded, not trimmed": {"schedule": PRUNED, "resident": "active", "trim": False},
}


@pytest.fixture(params=list(WAYS))
def way(request):
    return WAYS[request.param]


def attach(pipe, bank, way):
    return StagePruner(pipe.transformer, bank, read_tau=DiffusersHost(pipe).tau_reader, **way)


def held(denoiser):
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*denoiser.parameters(), *denoiser.buffers()])


def plain(pipe, bank, way):
    """Latents with everything resident, the way the other tests hold to the reference."""
    enable_stage_pruning(pipe, Bundle(bank, way["schedule"]))
    result = latents(pipe)
    disable_stage_pruning(pipe)
    return result


def test_same_images_and_no_trace(pipe, bank, way):
    expected = plain(pipe, bank, way)
    state = state_of(pipe.transformer)
    structure, before = inside(pipe.transformer), images(pipe)
    parameters = {name: id(parameter) for name, parameter in pipe.transformer.named_parameters()}
    for _ in range(2):
        attach(pipe, bank, way)
        assert same_state(state_of(pipe.transformer), state)
        assert torch.equal(latents(pipe), expected)
        assert torch.equal(latents(pipe), expected)
        assert same_state(state_of(pipe.transformer), state)
        disable_stage_pruning(pipe)
        assert same_state(state_of(pipe.transformer), state)
        assert inside(pipe.transformer) == structure
        assert torch.equal(images(pipe), before)
        assert parameters == {name: id(parameter) for name, parameter in pipe.transformer.named_parameters()}


def test_offloaded_never_holds_more_than_the_dense_model(pipe, bank):
    dense = held(pipe.transformer)
    for schedule in (SCHEDULE, PRUNED):
        attach(pipe, bank, {"schedule": schedule, "resident": "active"})
        for tau in TAUS:
            forward(pipe.transformer, tau)
            assert held(pipe.transformer) <= dense
            assert resident_bytes(pipe.transformer) <= dense
        disable_stage_pruning(pipe)
    assert held(pipe.transformer) == dense


@pytest.mark.parametrize("bank", ["shared-shared"], indirect=True)
def test_trimmed_holds_what_its_largest_level_uses(pipe, bank):
    dense = held(pipe.transformer)
    running = attach(pipe, bank, WAYS["trimmed"])
    levels = sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in pipe.transformer.named_buffers()
        if "stage_weight" in name or "stage_bias" in name
    )
    gone = {group.name: group.size - bank.kept[group.name][1] for group in bank.groups}  # at the largest level
    heads, neurons = (sum(gone[f"blocks.{i}.{kind}"] for i in range(3)) for kind in ("attn", "ff"))
    cut = heads * 3 * 8 * 41 + neurons * 41 + 3 * (40 * 40 + 40 * 160)  # q, k, v and up; the dense consumers
    assert held(pipe.transformer) == dense + levels - 4 * cut
    with pytest.raises(StagePruneError, match=r"not resident \(resident sparsities: \[0\.2, 0\.5, 0\.7\]\)"):
        running.schedule = StageSchedule.from_levels([0.0] * 5)


@pytest.mark.parametrize("bank", ["shared-shared"], indirect=True)
def test_trimming_needs_a_schedule_without_dense(pipe, bank):
    running = attach(pipe, bank, {"schedule": SCHEDULE, "trim": True})
    assert not running.trimmed and sum(p.numel() for p in pipe.transformer.parameters()) == running.dense_parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_change(pipe, bank, way, dtype):
    expected = state_of(copy.deepcopy(pipe.transformer).to(dtype))
    attach(pipe, bank, way)
    forward(pipe.transformer, 0.5)
    pipe.transformer.to(dtype)
    for tau in (0.5, 0.3):
        assert forward(pipe.transformer, tau).dtype == dtype
    assert same_state(state_of(pipe.transformer), expected)
    disable_stage_pruning(pipe)
    assert same_state(state_of(pipe.transformer), expected)


def test_a_bank_of_another_dtype_is_held_in_the_layers_own(pipe, bank):
    """A float32 bank on a bfloat16 pipeline would take twice the host memory, and twice the traffic of a switch."""
    pipe.to(torch.bfloat16)
    way = {"schedule": SCHEDULE, "resident": "active"}
    assert {consumer.weight.dtype for consumer in bank.consumers.values()} == {torch.float32}
    expected = plain(pipe, bank, way)
    attach(pipe, bank, way)
    layers = [module for module in pipe.transformer.modules() if isinstance(module, roles.OffloadedColumns)]
    waiting = [tensor for layer in layers for pair in layer.stage_held for tensor in pair if tensor is not None]
    assert layers and {tensor.dtype for tensor in waiting} == {torch.bfloat16}
    assert torch.equal(latents(pipe), expected)


def test_deepcopy_is_independent(pipe, bank, way):
    state, expected = state_of(pipe.transformer), plain(pipe, bank, way)
    attach(pipe, bank, way)
    twin = copy.deepcopy(pipe.transformer)
    disable_stage_pruning(pipe)
    assert same_state(state_of(pipe.transformer), state)
    dense = pipe.transformer
    pipe.register_modules(transformer=twin)
    assert torch.equal(latents(pipe), expected)
    disable_stage_pruning(twin)
    assert same_state(state_of(twin), state) and same_state(state_of(dense), state)


def test_save_pretrained(pipe, bank, way, tmp_path):
    state = state_of(pipe.transformer)
    attach(pipe, bank, way)
    forward(pipe.transformer, 0.3)
    pipe.transformer.save_pretrained(tmp_path)
    assert same_state(state_of(type(pipe.transformer).from_pretrained(tmp_path)), state)


def test_exception_in_the_middle(pipe, bank, way):
    expected, left = plain(pipe, bank, way), [3]

    def interrupt(*_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with untouched(pipe):
        attach(pipe, bank, way)
        hook = pipe.transformer.transformer_blocks[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            latents(pipe)
        hook.remove()
        assert torch.equal(latents(pipe), expected)
        disable_stage_pruning(pipe)


@pytest.mark.parametrize("function", ["to_levels", "to_offloaded", "to_prefix", "to_gathered", "to_offloaded_rows"])
@pytest.mark.parametrize("fail_at", [1, 4])
def test_enabling_that_fails_changes_nothing(pipe, bank, way, monkeypatch, function, fail_at):
    calls, real = [], getattr(swap, function)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise MemoryError
        return real(*args, **kwargs)

    with untouched(pipe), monkeypatch.context() as patch:
        patch.setattr(pruner, function, failing)
        try:
            attach(pipe, bank, way)
        except MemoryError:
            assert pruner_of(pipe.transformer) is None
        else:
            disable_stage_pruning(pipe)


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_trimming_that_fails_changes_nothing(pipe, bank, way, monkeypatch, fail_at):
    """`trim` moves weights to host memory, which can run out too."""
    calls, real = [], roles.StagedLayer.trim

    def failing(self, kept):
        calls.append(1)
        if len(calls) == fail_at:
            raise MemoryError
        real(self, kept)

    with untouched(pipe), monkeypatch.context() as patch:
        patch.setattr(roles.StagedLayer, "trim", failing)
        try:
            attach(pipe, bank, way)
        except MemoryError:
            assert pruner_of(pipe.transformer) is None
        else:
            disable_stage_pruning(pipe)


def test_public_argument(pipe, bank):
    bundle = Bundle(bank, PRUNED)
    running = enable_stage_pruning(pipe, bundle, resident="active")
    assert running.resident == "active" and running.trimmed
    assert "resident" in str(pipe.stage_pruning_summary())
    pipe.disable_stage_pruning()
    with untouched(pipe), pytest.raises(StagePruneError, match="`resident` must be 'all' or 'active', got 'some'"):
        pipe.enable_stage_pruning(bundle, resident="some")
