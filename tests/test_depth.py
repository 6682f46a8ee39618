"""Whole blocks: scored on dense trajectories, ordered, skipped at run time, saved, and back."""

from __future__ import annotations

import copy
import functools
import json
from functools import cache

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import stageprune
from stageprune import Bundle, StageSchedule, disable_stage_pruning, enable_stage_pruning
from stageprune.core.bundle import MANIFEST
from stageprune.core.calibration import Calibration
from stageprune.core.errors import BankError, BundleError, CalibrationError, StagePruneError
from stageprune.core.groups import family_of, find_groups, measure_cost
from stageprune.core.groups.check import sliced
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers.bare import DenoiserHost
from stageprune.core.pruning.levels import kept_blocks
from stageprune.core.runtime import pruner_of
from support import inside, raising, relative, same_state, state_of
from zoo import NAMES, drive, make_denoiser, make_pipeline, prompts_for

GUIDANCE = 3.0
EDGES = [0.7, 0.4]
"""Four steps of each family's sampler fall into all three stages."""
LEVELS = (0.0, 0.3, 0.6)
SCHEDULE = StageSchedule.from_levels([0.6, 0, 0.3], EDGES)


@cache
def calibration_for(name: str) -> Calibration:
    pipe = make_pipeline(name)
    return stageprune.calibrate(
        pipe, prompts_for(pipe), steps=4, guidance=GUIDANCE, stages=EDGES, kinds=["block"], skip_blocks=True
    )


def bank_for(name: str, method: str = "depth", order: str = "shared", levels=LEVELS):
    return stageprune.prune(make_pipeline(name), calibration_for(name), method=method, order=order, levels=levels)


def denoiser_of(pipe):
    return DiffusersHost(pipe).denoiser


def blocks_of(denoiser):
    return next(group for group in find_groups(denoiser) if group.kind == "block")


def reference(pipe, bank, schedule=SCHEDULE):
    """The whole trajectory, each call with the blocks physically left out."""
    host = DiffusersHost(pipe)
    groups = find_groups(host.denoiser)
    conditions, state = host.encode(prompts_for(pipe)), host.start(range(len(prompts_for(pipe))), 4)
    for tau in host.taus(4):
        level, stage = bank.bind(schedule)[schedule.stage_of(tau)]
        keep = bank.order("blocks", stage)[: bank.kept["blocks"][level]]
        with sliced(host.denoiser, groups, {"blocks": keep}):
            state = host.advance(state, conditions, GUIDANCE, state.index + 1)
    return state.latents


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "shared") for name in NAMES), ("dit", "stage"), ("flux", "stage")]
)
def test_skipped_blocks_are_as_if_not_there(name, order):
    """And the dense model is back bit for bit; a stage at level 0 is dense bit for bit, for nothing is permuted."""
    pipe, bank = make_pipeline(name), bank_for(name, order=order)
    denoiser = denoiser_of(pipe)
    assert bank.order_sharing == order and bank.kept["blocks"][2] < bank.kept["blocks"][0]
    state, structure, dense = state_of(denoiser), inside(denoiser), drive(pipe, GUIDANCE)
    expected = reference(pipe, bank)
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    assert torch.equal(drive(pipe, GUIDANCE), expected) and relative(expected, dense) > 1e-4
    disable_stage_pruning(pipe)
    assert same_state(state, state_of(denoiser)) and inside(denoiser) == structure
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE.with_levels([0.0] * 3)))
    assert torch.equal(drive(pipe, GUIDANCE), dense)


def rows_of(value):
    return torch.cat([part.flatten(1) for part in value if part is not None], 1)


@pytest.mark.parametrize("name", ["dit", "sdxl", "flux"])
def test_drift_is_the_angle_between_input_and_output(name):
    """By hooks of our own, which know each family's arguments."""
    pipe = make_pipeline(name)
    denoiser, seen = denoiser_of(pipe), {}

    def record(index):
        def hook(_, args, kwargs, result):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            given = (kwargs["encoder_hidden_states"], hidden) if isinstance(result, tuple) else (hidden,)
            result = result if isinstance(result, tuple) else (result,)
            cos = F.cosine_similarity(rows_of(given).double(), rows_of(result).double(), dim=1)
            seen[index] = seen.get(index, 0.0) + float((1 - cos).sum())

        return hook

    for index, path in enumerate(blocks_of(denoiser).blocks):
        denoiser.get_submodule(path).register_forward_hook(record(index), with_kwargs=True)
    drive(pipe, GUIDANCE)
    found = calibration_for(name).scores_of("blocks")["drift"]
    assert torch.allclose(found, torch.tensor([seen[i] for i in range(len(found))], dtype=torch.float64), rtol=1e-3)
    bank = bank_for(name)
    assert found[bank.order("blocks", 0)].tolist() == sorted(found.tolist(), reverse=True)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_output_error_is_that_of_the_denoiser_without_the_block(name):
    pipe = make_pipeline(name)
    denoiser, calls = denoiser_of(pipe), []
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    drive(pipe, GUIDANCE)
    hook.remove()
    group, totals = blocks_of(denoiser), []
    with torch.no_grad():
        for index in range(group.size):
            stay, total = torch.tensor([i for i in range(group.size) if i != index]), 0.0
            for args, kwargs in calls:
                dense = denoiser(*args, **kwargs)[0].flatten(1)
                with sliced(denoiser, [group], {"blocks": stay}):
                    error = denoiser(*args, **kwargs)[0].flatten(1) - dense
                total += float((error.square().sum(1) / dense.square().sum(1)).sum())
            totals.append(total)
    found = calibration_for(name).scores_of("blocks")["output"]
    assert torch.allclose(found, torch.tensor(totals, dtype=torch.float64), rtol=1e-4)
    bank = bank_for(name, "depth-output")
    assert found[bank.order("blocks", 0)].tolist() == sorted(found.tolist(), reverse=True)


def test_scores_and_hessians_together_are_those_apart():
    """The calls without a block are hidden from the Hessians."""
    pipe = make_pipeline("dit")
    call = {"steps": 4, "guidance": GUIDANCE, "stages": EDGES}
    prompts = prompts_for(pipe) * 4
    both = stageprune.calibrate(pipe, prompts, kinds=["head", "neuron", "block"], skip_blocks=True, **call)
    widths, blocks = (stageprune.calibrate(pipe, prompts, kinds=k, **call) for k in (["head", "neuron"], ["block"]))
    assert all(torch.equal(both.hessians[path], widths.hessians[path]) for path in widths.hessians)
    assert torch.equal(both.scores["drift.blocks"], blocks.scores["drift.blocks"]) and not blocks.hessians
    assert stageprune.prune(pipe, both, levels=[0.5], multiple=16).kept["blocks.0.ff"]
    assert [group.kind for group in stageprune.prune(pipe, both, method="depth", levels=[0.5]).groups] == ["block"]


def test_calibration_round_trip_and_resume(tmp_path):
    first = calibration_for("dit")
    again = Calibration.load(first.save(tmp_path / "c.safetensors"))
    assert all(torch.equal(first.scores[name], again.scores[name]) for name in first.scores)
    pipe, interrupted = make_pipeline("dit"), tmp_path / "part"
    call = {"steps": 4, "guidance": GUIDANCE, "stages": EDGES, "kinds": ["block"], "batch_size": 1}
    with (
        raising(pipe.transformer.transformer_blocks[1], KeyboardInterrupt(), call=7),
        pytest.raises(KeyboardInterrupt),
    ):
        stageprune.calibrate(pipe, [1, 2, 3], checkpoint=interrupted, **call)
    resumed = stageprune.calibrate(pipe, [1, 2, 3], checkpoint=interrupted, **call)
    whole = stageprune.calibrate(pipe, [1, 2, 3], **call)
    assert torch.equal(resumed.scores["drift.blocks"], whole.scores["drift.blocks"])


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_what_a_counter_counts(name):
    denoiser, bank = make_denoiser(name), bank_for(name)
    cost, inputs = measure_cost(denoiser), family_of(denoiser).example_inputs(denoiser)
    macs = bank.macs(cost)
    assert macs[0.0] == cost.dense
    for level, sparsity in enumerate(LEVELS):
        keep = bank.order("blocks", 0)[: bank.kept["blocks"][level]]
        meta = copy.deepcopy(denoiser).to("meta")
        inputs = {k: _meta(v) for k, v in family_of(denoiser).example_inputs(denoiser).items()}
        with sliced(meta, find_groups(meta), {"blocks": keep}), FlopCounterMode(display=False) as counter:
            meta(**inputs)
        assert macs[sparsity] == counter.get_total_flops() // 2
    assert bank.provenance["realised"][0] == 0 and bank.provenance["realised"] == sorted(bank.provenance["realised"])


def _meta(value):
    return {k: _meta(v) for k, v in value.items()} if isinstance(value, dict) else value.to("meta")


def test_kept_counts_come_nearest_to_the_asked_share():
    cost = measure_cost(make_denoiser("flux"))
    order = torch.tensor([3, 0, 2, 1])
    shares = torch.tensor(cost.block_macs, dtype=torch.float64) / sum(cost.block_macs)
    removed = {kept: float(shares[order[kept:]].sum()) for kept in range(1, 5)}
    asked = (0.0, 0.1, 0.3, 0.5, 0.9)
    counts = kept_blocks(order, cost, asked)
    assert counts[0] == 4 and list(counts) == sorted(counts, reverse=True)
    for sparsity, count in zip(asked[1:], counts[1:], strict=True):
        assert abs(removed[count] - sparsity) == pytest.approx(min(abs(value - sparsity) for value in removed.values()))


def test_a_budget_counts_the_dearest_order():
    """With an order a stage the skipped blocks differ, and so may their cost."""
    denoiser, bank = make_denoiser("flux"), bank_for("flux", order="stage")
    cost = measure_cost(denoiser)
    each = [cost.macs({}, bank.skipped(2, stage)) for stage in range(3)]
    assert bank.macs(cost)[0.6] == max(each)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_bundle_round_trip(name, tmp_path):
    pipe, bank = make_pipeline(name), bank_for(name, order="stage")
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    expected = drive(pipe, GUIDANCE)
    disable_stage_pruning(pipe)
    again = Bundle.load(Bundle(bank, SCHEDULE).save(tmp_path / "b"))
    assert again.bank.groups == bank.groups and again.bank.kept == bank.kept
    enable_stage_pruning(pipe, tmp_path / "b")
    assert torch.equal(drive(pipe, GUIDANCE), expected)
    small = Bundle.load(Bundle(bank, SCHEDULE.with_levels([0.6] * 3)).save(tmp_path / "s", only_used=True)).bank
    assert small.sparsities == (0.0, 0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1}, "`blocks` must name 3 blocks, of width 0; got 3 of width 1"),
        ({"blocks": ["a"]}, "`blocks` must name 3 blocks, of width 0; got 1 of width 0"),
        ({"consumers": [{"path": "a", "offset": 0}]}, "`consumers` must be empty for whole blocks"),
        ({"passes": None}, "`passes` must be list"),
    ],
)
def test_bad_manifests(change, message, tmp_path):
    folder = Bundle(bank_for("dit")).save(tmp_path / "b")
    data = json.loads((folder / MANIFEST).read_text())
    data["groups"][0] |= change
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        Bundle.load(folder)


def test_a_bundle_that_names_other_blocks_is_refused(tmp_path):
    folder = Bundle(bank_for("dit"), SCHEDULE).save(tmp_path / "b")
    data = json.loads((folder / MANIFEST).read_text())
    data["groups"][0]["blocks"][0] = "pos_embed"
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BankError, match="the bank's group `blocks` is not a group of this"):
        enable_stage_pruning(make_pipeline("dit"), folder)


class Counting:
    """A backend that runs the captured graph as it is and counts the captures."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize("first", ["enable", "compile"])
def test_compiled_blocks(name, first):
    torch._dynamo.reset()
    pipe, bank, backend = make_pipeline(name), bank_for(name), Counting()
    denoiser = denoiser_of(pipe)
    expected = reference(pipe, bank)
    if first == "enable":
        enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    for path in blocks_of(denoiser).blocks:
        denoiser.get_submodule(path).compile(backend=backend, fullgraph=True)
    if first == "compile":
        drive(pipe, GUIDANCE)
        enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    assert relative(drive(pipe, GUIDANCE), expected) < 1e-4
    graphs = backend.graphs
    drive(pipe, GUIDANCE)
    assert backend.graphs == graphs, "no later image compiles again"
    torch._dynamo.reset()


def test_whole_compiled_model():
    torch._dynamo.reset()
    pipe, bank = make_pipeline("dit"), bank_for("dit")
    expected = reference(pipe, bank)
    pipe.transformer = torch.compile(pipe.transformer, backend=Counting())
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    assert relative(drive(pipe, GUIDANCE), expected) < 1e-4
    torch._dynamo.reset()


def test_deepcopy_is_enabled_and_independent():
    pipe, bank = make_pipeline("dit"), bank_for("dit")
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    expected, twin = drive(pipe, GUIDANCE), copy.deepcopy(pipe.transformer)
    disable_stage_pruning(pipe)
    dense = drive(pipe, GUIDANCE)
    pipe.register_modules(transformer=twin)
    assert torch.equal(drive(pipe, GUIDANCE), expected)
    disable_stage_pruning(pipe)
    assert torch.equal(drive(pipe, GUIDANCE), dense)


@pytest.mark.parametrize("resident", ["all", "active"])
def test_summary_counts_blocks(resident):
    pipe, bank = make_pipeline("dit"), bank_for("dit")
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE), resident=resident)
    summary = pipe.stage_pruning_summary(steps=4)
    kept = bank.kept["blocks"]
    assert [row.blocks for row in summary.stages] == [f"{kept[2]}/3", "3/3", f"{kept[1]}/3"]
    assert "blocks" in str(summary) and "heads" not in str(summary) and "neurons" not in str(summary)
    block = sum(parameter.numel() for parameter in pipe.transformer.transformer_blocks[0].parameters())
    assert summary.dense_parameters - summary.stages[0].parameters == (3 - kept[2]) * block
    assert summary.stages[0].realised == pytest.approx(bank.provenance["realised"][2], abs=1e-6)
    assert pruner_of(pipe.transformer).bank is bank and "of blocks" in str(bank)


def test_a_schedule_can_be_allocated():
    pipe, bank = make_pipeline("dit"), bank_for("dit")
    result = stageprune.allocate(pipe, bank, target="macs:0.8", stages=2, steps=4, prompts=[1, 2, 3, 4])
    assert result.schedule is not None


def test_random_blocks_need_no_data():
    pipe = make_pipeline("flux")
    bank = stageprune.prune(pipe, method="random", kinds=["block"], levels=[0.5])
    assert bank.groups[0].kind == "block" and sorted(bank.orders["blocks"].tolist()) == [0, 1, 2, 3]
    assert stageprune.prune(pipe, method="random", levels=[0.5]).groups[0].kind == "head"
    bare = DenoiserHost(make_denoiser("dit"))
    assert stageprune.prune(bare, method="random", kinds=["block"]).kept["blocks"][-1] == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"method": "obs", "kinds": ["block"]}, BankError, "method 'obs' orders units of kind head, neuron, channel;"),
        ({"method": "depth", "kinds": ["head"]}, BankError, "method 'depth' orders units of kind block; got"),
        ({"method": "random", "kinds": ["head", "block"]}, BankError, "must be whole blocks alone"),
        ({"method": "depth", "consumers": "stage"}, BankError, "does not compensate"),
        ({"method": "obs"}, CalibrationError, "has no Hessian for"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        stageprune.prune(make_pipeline("dit"), calibration_for("dit"), **call)


def test_what_was_not_calibrated():
    pipe = make_pipeline("dit")
    with pytest.raises(BankError, match="method 'depth' needs a `calibration`"):
        stageprune.prune(pipe, method="depth")
    plain = stageprune.calibrate(pipe, [1, 2, 3] * 2, steps=4)
    with pytest.raises(CalibrationError, match=r"nothing on `blocks` under 'drift': calibrate with kinds="):
        stageprune.prune(pipe, plain, method="depth")
    drift = stageprune.calibrate(pipe, [1], steps=4, kinds=["block"])
    with pytest.raises(CalibrationError, match="skip_blocks=True"):
        stageprune.prune(pipe, drift, method="depth-output")
    with pytest.raises(CalibrationError, match=r"`skip_blocks` scores whole blocks"):
        stageprune.calibrate(pipe, [1], skip_blocks=True)
    with pytest.raises(CalibrationError, match=r"no call was scored for `drift.blocks` in one of its stages"):
        stageprune.calibrate(pipe, [1], steps=2, stages=5, kinds=["block"])


def test_a_block_whose_forward_was_replaced():
    pipe, bank = make_pipeline("dit"), bank_for("dit")
    block = pipe.transformer.transformer_blocks[1]
    structure = inside(pipe.transformer)
    block.forward = functools.partial(block.forward)
    with pytest.raises(StagePruneError, match=r"the forward of `transformer_blocks.1` has been replaced"):
        enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    del block.forward
    assert inside(pipe.transformer) == structure


def test_an_interrupted_run_can_be_disabled():
    pipe, bank = make_pipeline("dit"), bank_for("dit")
    structure, dense = inside(pipe.transformer), drive(pipe, GUIDANCE)
    enable_stage_pruning(pipe, Bundle(bank, SCHEDULE))
    with raising(pipe.transformer.transformer_blocks[0], KeyboardInterrupt(), call=2), pytest.raises(KeyboardInterrupt):
        drive(pipe, GUIDANCE)
    disable_stage_pruning(pipe)
    assert inside(pipe.transformer) == structure and torch.equal(drive(pipe, GUIDANCE), dense)
