"""What the run time refuses, with the message it gives, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import stageprune
from stageprune import StagePruneError, StageSchedule, disable_stage_pruning, enable_stage_pruning
from stageprune.core.bundle import Bundle
from stageprune.core.errors import BankError, GroupError, ScheduleError
from stageprune.core.evaluation import evaluate
from stageprune.core.evaluation.benchmark import benchmark
from stageprune.core.hosts.diffusers import DiffusersHost, reader_for
from stageprune.core.hosts.diffusers.export import export_level
from stageprune.core.pruning import Bank
from stageprune.core.runtime import applied, pruner, pruner_of, summarise, swap
from support import LABELS, LEVELS, SCHEDULE, TAUS, images, make_pipe, same_state, state_of, untouched


def test_enable_twice(pipe, bundle):
    enable_stage_pruning(pipe, bundle)
    pruned = images(pipe)
    with pytest.raises(StagePruneError, match=r"already enabled on this denoiser.*disable_stage_pruning\(\)"):
        enable_stage_pruning(pipe, bundle)
    assert torch.equal(images(pipe), pruned)


def test_disable_when_not_enabled_warns(pipe, caplog):
    with untouched(pipe), caplog.at_level(logging.WARNING):
        disable_stage_pruning(pipe)
    assert "stage pruning was not enabled on this DiTPipeline" in caplog.text


def test_summary_when_not_enabled(pipe):
    with pytest.raises(StagePruneError, match="not enabled"):
        stageprune.stage_pruning_summary(pipe)


def test_level_that_the_bank_lacks(pipe, bundle, bank):
    with pytest.raises(ScheduleError, match=r"no level of sparsity 0\.6; its levels are 0, 0\.2, 0\.5, 0\.7"):
        Bundle(bank, StageSchedule.from_levels([0.6] * 5))
    enable_stage_pruning(pipe, bundle)
    disable_stage_pruning(pipe)
    with untouched(pipe), pytest.raises(ScheduleError, match=r"no level of sparsity 0.6"):
        enable_stage_pruning(pipe, StageSchedule.from_levels([0.6] * 5))


@pytest.mark.parametrize("name", ["shared-stage", "stage-stage"])
def test_schedule_that_crosses_the_banks_stages(banks, name):
    with pytest.raises(ScheduleError, match=r"stage 0 \(tau 1 to 0\.5\) crosses a boundary of the bank"):
        Bundle(banks[name], StageSchedule.from_levels([0.2, 0.5]))
    finer = StageSchedule.from_levels([0.2] * 10)
    assert [stage for _, stage in banks[name].bind(finer)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_shared_bank_takes_any_stages(pipe, banks):
    enable_stage_pruning(pipe, Bundle(banks["shared-shared"], StageSchedule.from_levels([0.2, 0.7], [0.33])))
    assert len(pruner_of(pipe.transformer).schedule.stages) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seed": 1}, "the weights differ"),
        ({"num_layers": 4}, "parameter names or shapes differ"),
        ({"num_layers": 2}, "does not exist in DiTTransformer2DModel|another DiTTransformer2DModel"),
        ({"num_attention_heads": 4, "attention_head_dim": 10}, "`blocks.0.attn` is not a group of this"),
        ({"activation_fn": "geglu"}, "`blocks.0.ff` is not a group of this"),
        ({"patch_size": 4}, "parameter names or shapes differ"),
    ],
)
def test_bank_of_another_model(bundle, config, message):
    other = make_pipe(**config)
    with untouched(other), pytest.raises(StagePruneError, match=message):
        enable_stage_pruning(other, bundle)


def test_bank_of_another_class(pipe, bundle):
    class Other(type(pipe.transformer)):
        pass

    pipe.transformer.__class__ = Other
    with pytest.raises(BankError, match="the bank is for a DiTTransformer2DModel, got a Other"):
        enable_stage_pruning(pipe, bundle)


def _nth(real, fail_at):
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise MemoryError("out of memory")
        return real(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("fail_at", [1, 3, 6])
def test_enable_that_fails_half_way_changes_nothing(pipe, bundle, monkeypatch, fail_at):
    with untouched(pipe):
        monkeypatch.setattr(pruner, "to_levels", _nth(swap.to_levels, fail_at))
        with pytest.raises(MemoryError):
            enable_stage_pruning(pipe, bundle)
        monkeypatch.undo()
        assert pruner_of(pipe.transformer) is None


@pytest.mark.parametrize("fail_at", [1, 2, 5, 12])
def test_enable_that_runs_out_of_memory_changes_nothing(pipe, bundle, monkeypatch, fail_at):
    """Memory can run out inside the swap of one Linear, when a level's weight or bias is copied to the device."""
    real = torch.Tensor.to
    copies = _nth(real, fail_at)

    def to(self, *args, **kwargs):
        return copies(self, *args, **kwargs) if kwargs.get("copy") else real(self, *args, **kwargs)

    with untouched(pipe):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(torch.Tensor, "to", to)
            enable_stage_pruning(pipe, bundle)
        assert pruner_of(pipe.transformer) is None


class _Wrapped(nn.Module):
    """As peft wraps a Linear: another module that holds it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, inputs):
        return self.base_layer(inputs)


class _Linear4bit(nn.Linear):
    """As quantisers do: a subclass whose weight is something else."""


@pytest.mark.parametrize(("name", "error"), [("_Wrapped", GroupError), ("_Linear4bit", StagePruneError)])
@pytest.mark.parametrize("place", ["to_q", "to_out"])
def test_wrapped_or_quantised_linear_is_refused(pipe, bundle, name, error, place):
    attention = pipe.transformer.transformer_blocks[1].attn1
    old = attention.to_q if place == "to_q" else attention.to_out[0]
    if name == "_Wrapped":
        new = _Wrapped(old)
    else:
        new = copy.deepcopy(old)
        new.__class__ = _Linear4bit
    if place == "to_q":
        attention.to_q = new
    else:
        attention.to_out[0] = new
    path = f"transformer_blocks.1.attn1.{place}"
    with untouched(pipe), pytest.raises(error, match=f"`{path}.*` is a {name}, not a (plain )?torch.nn.Linear"):
        enable_stage_pruning(pipe, bundle)


def test_load_state_dict_while_enabled_is_refused_whole(pipe, bundle):
    """Refused before anything is copied: a half-loaded model would be neither the old one nor the new one."""
    other = state_of(make_pipe(seed=3).transformer)
    state = state_of(pipe.transformer)
    enable_stage_pruning(pipe, bundle)
    with pytest.raises(StagePruneError, match=r"Call disable_stage_pruning\(\) first"):
        pipe.transformer.load_state_dict(other)
    disable_stage_pruning(pipe)
    assert same_state(state_of(pipe.transformer), state)
    pipe.transformer.load_state_dict(other)
    assert same_state(state_of(pipe.transformer), other)


def test_measuring_while_enabled_is_refused(pipe, bundle, calibration, bank):
    enable_stage_pruning(pipe, bundle)
    for call in (
        lambda: stageprune.calibrate(pipe, LABELS, steps=2),
        lambda: stageprune.prune(pipe, calibration, levels=[0.5]),
        lambda: stageprune.allocate(pipe, bank),
    ):
        with pytest.raises(StagePruneError, match="would measure the pruned model as if it were dense"):
            call()


def test_bare_schedule(pipe, calibration):
    with pytest.raises(StagePruneError, match="no bank is known for this denoiser"):
        enable_stage_pruning(pipe, StageSchedule.uniform(0.5))
    bank = stageprune.prune(pipe, calibration, levels=LEVELS, multiple=16)
    enable_stage_pruning(pipe, StageSchedule.from_levels([0.2, 0.5]))
    assert pruner_of(pipe.transformer).bank is bank
    disable_stage_pruning(pipe)
    enable_stage_pruning(pipe, StageSchedule.uniform(0.7))
    disable_stage_pruning(pipe)
    twin = copy.deepcopy(pipe.transformer)
    enable_stage_pruning(twin, StageSchedule.uniform(0.7))


MEASURED = {
    "evaluate": lambda pipe, bundle, _: evaluate(
        DiffusersHost(pipe), bundle, prompts=[1], count=2, steps=2, batch_size=2, curve=False
    ),
    "export": lambda pipe, bundle, folder: export_level(pipe, bundle.bank, folder / "plain", 0.2, 0, "zeros"),
    "bench": lambda pipe, bundle, _: benchmark(pipe.transformer, bundle.bank, DiffusersHost(pipe).tau_reader, rounds=1),
}


@pytest.mark.parametrize("measure", MEASURED)
@pytest.mark.parametrize("known", ["pruned", "enabled"])
def test_a_bank_that_is_only_measured_is_not_the_known_one(pipe, calibration, banks, tmp_path, measure, known):
    """`evaluate` enables the magnitude bank last: it must not be what a bare schedule runs afterwards."""
    bank = stageprune.prune(pipe, calibration, levels=LEVELS, multiple=16)
    if known == "enabled":
        bank = banks["stage-stage"]
        enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
        disable_stage_pruning(pipe)
    MEASURED[measure](pipe, Bundle(banks["shared-shared"], SCHEDULE), tmp_path)
    enable_stage_pruning(pipe, SCHEDULE)
    assert pruner_of(pipe.transformer).bank is bank


def test_bundle_without_a_schedule(pipe, bank):
    with untouched(pipe), pytest.raises(ScheduleError, match="the bundle has no schedule"):
        enable_stage_pruning(pipe, Bundle(bank))
    enable_stage_pruning(pipe, SCHEDULE)  # the message says that the bank is known now


def test_schedule_whose_level_is_not_resident(pipe, bank):
    enable_stage_pruning(pipe, Bundle(bank, StageSchedule.from_levels([0, 0.2, 0.2, 0, 0])))
    running = pruner_of(pipe.transformer)
    with pytest.raises(StagePruneError, match=r"not resident \(resident sparsities: \[0\.0, 0\.2\]\)"):
        running.schedule = StageSchedule.from_levels([0, 0.7, 0.2, 0, 0])
    assert running.schedule.levels == [0, 0.2, 0.2, 0, 0]
    with applied_to_fresh(bank) as every:
        every.schedule = SCHEDULE
        assert every.schedule is SCHEDULE


def applied_to_fresh(bank):
    return applied(DiffusersHost(make_pipe()), bank)


@pytest.mark.parametrize("target", ["text", 3, None])
def test_target_that_is_no_pipeline(bundle, target):
    with pytest.raises(StagePruneError, match="must have exactly one denoiser of a supported class"):
        enable_stage_pruning(target, bundle)


def test_module_that_is_no_denoiser(bundle):
    with pytest.raises(StagePruneError):
        enable_stage_pruning(nn.Linear(3, 3), bundle)


def test_call_without_a_timestep(enabled):
    with pytest.raises(StagePruneError, match="without `timestep`"):
        enabled.transformer(torch.zeros(1, 4, 8, 8), class_labels=torch.tensor([1]))


def test_summary_shows_requested_and_realised(enabled, bank):
    running = pruner_of(enabled.transformer)
    taus = DiffusersHost(enabled).taus(10)
    summary = summarise(running, taus, 10)
    assert [row.requested for row in summary.stages] == SCHEDULE.levels
    assert summary.stages[0].realised == 0 and summary.stages[0].macs == summary.dense_macs
    for row, level in zip(summary.stages, (0, 1, 2, 3, 2), strict=True):
        assert row.macs == bank.macs(running.cost)[LEVELS[level]]
        assert row.heads == f"{sum(bank.kept[f'blocks.{i}.attn'][level] for i in range(3))}/15"
    assert summary.executed.calls == (2, 2, 2, 2, 2)
    text = str(enabled.stage_pruning_summary(steps=10))
    assert "asked" in text and f"{summary.executed.share:.3f} of the dense MACs" in text
    assert "memory" in text
    assert len(str(summarise(running)).splitlines()) == len(text.splitlines()) - 1


def test_summary_of_a_level_given_by_arithmetic(pipe, calibration):
    """0.1 + 0.2 is not 0.3 in floats: what can be enabled must also be summed up."""
    stageprune.prune(pipe, calibration, levels=[0, 0.3], multiple=16)
    enable_stage_pruning(pipe, StageSchedule.from_levels([0, 0.1 + 0.2]))
    assert pipe.stage_pruning_summary(steps=4).executed.calls == (2, 2)


def test_summary_memory_is_what_the_tensors_take(pipe, bank):
    def held():
        module = pipe.transformer
        return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])

    dense = held()
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    summary = pipe.stage_pruning_summary()
    assert summary.dense_bytes == dense
    assert summary.resident_bytes == held()
    assert summary.added_bytes == held() - dense > 0
    disable_stage_pruning(pipe)
    assert held() == dense


def test_reader_of_a_class_without_timesteps():
    with pytest.raises(StagePruneError, match=r"Linear.forward has no argument `timestep`"):
        reader_for(nn.Linear(2, 2))


def test_taus_cover_each_stage():
    assert [SCHEDULE.stage_of(tau) for tau in TAUS] == [0, 1, 2, 3, 4]


def test_companion_norms_are_refused_rather_than_left_whole(pipe, banks, monkeypatch):
    """A group may name norms that must be sliced with it; the run time cannot yet, and says so."""
    bank = banks["shared-shared"]
    first, *rest = bank.groups
    odd = replace(bank, groups=(replace(first, companions=("transformer_blocks.0.norm3",)), *rest))
    monkeypatch.setattr(Bank, "check_denoiser", lambda *_: None)  # as if the family itself declared them
    with untouched(pipe), pytest.raises(StagePruneError, match=r"norm3` is a norm over the channels of a pruned group"):
        enable_stage_pruning(pipe, Bundle(odd, SCHEDULE))
