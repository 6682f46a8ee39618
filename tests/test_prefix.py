"""Blocks before a change are not run again, and nothing else is different from running all."""

import pytest
import torch
from torch import nn

import zoo
from stageprune.core.api import host_for
from stageprune.core.calibration import calibrate
from stageprune.core.groups import width_groups
from stageprune.core.groups.layer import layer_at
from stageprune.core.groups.registry import find_groups
from stageprune.core.pruning import prune
from stageprune.core.pruning.bank import Consumer
from stageprune.core.pruning.prefix import Prefix, _Call, blocks_of
from stageprune.core.pruning.replay import replaced
from support import COMPILED, compile_and_run

NAMES = ("dit", "sd15", "sdxl", "sd35", "flux")


class Step:
    """A guided step of a host, again and again from one state."""

    def __init__(self, name):
        self.host = host_for(zoo.make_pipeline(name))
        self.denoiser = self.host.denoiser
        prompts = zoo.prompts_for(self.host.pipe)[:1]
        self.conditions = self.host.encode(prompts)
        self.ran = []
        for path in blocks_of(self.denoiser):
            self.spy(path)

    def spy(self, path):
        """Put a forward of its own into a block, as accelerate's hooks do."""
        block = self.denoiser.get_submodule(path)
        own = block.forward

        def forward(*args, **kwargs):
            self.ran.append(path)
            return own(*args, **kwargs)

        block.forward = forward

    def __call__(self, index=1, seed=7):
        self.ran.clear()
        with torch.no_grad():
            return self.host.advance(self.host.start([seed], 4), self.conditions, 3.0, index).latents

    def forwards(self):
        return {path: module.__dict__.get("forward") for path, module in self.denoiser.named_modules()}

    def halved(self, group):
        """Other weights in all consumers of a group."""
        layers = {site.path: layer_at(self.denoiser, site.path) for site in group.consumers}
        return {path: Consumer(layer.weight / 2, layer.bias) for path, layer in layers.items()}


@pytest.fixture(scope="module", params=NAMES)
def step(request):
    return Step(request.param)


@pytest.fixture(scope="module")
def recorded(step):
    prefix = Prefix(step.denoiser, blocks_of(step.denoiser), 2**30)
    with prefix.recording():
        step()
    assert 0 < prefix.held < 2**30
    return prefix


def test_a_changed_group_gives_what_running_all_gives_and_runs_less(step, recorded):
    every = blocks_of(step.denoiser)
    before, counts = step.forwards(), []
    for group in width_groups(find_groups(step.denoiser)):
        consumers = step.halved(group)
        with replaced(step.denoiser, consumers):
            whole = step()
            all_ran = len(step.ran)
            with recorded.resumed(consumers):
                part = step()
        counts.append(len(step.ran))
        assert torch.equal(whole, part) and len(step.ran) <= all_ran
        holders = [block for block in every if any(f"{path}.".startswith(f"{block}.") for path in consumers)]
        assert set(holders) <= set(step.ran)
    assert min(counts) < all_ran / 2 and sum(counts) / len(counts) < 0.8 * all_ran
    assert step.forwards() == before


def test_other_inputs_run_all(step, recorded):
    consumers = step.halved(width_groups(find_groups(step.denoiser))[-1])
    with replaced(step.denoiser, consumers):
        whole, other = step(index=2), step(seed=8)
        all_ran = len(step.ran)
        with recorded.resumed(consumers):
            assert torch.equal(step(seed=8), other) and len(step.ran) == all_ran
        with recorded.resumed(consumers):
            part = step(index=2)  # no call was recorded to compare the second step with
        assert torch.equal(whole, part) and all_ran < len(step.ran) < 2 * all_ran


def test_no_change_that_is_known_runs_all(step, recorded):
    whole = step()
    all_ran = [*step.ran]
    for changed in ([], ["a.layer.of.no.block"]):
        with recorded.resumed(changed):
            assert torch.equal(step(), whole) and step.ran == all_ran


def test_without_room_less_is_held_and_nothing_else_differs(step, recorded):
    consumers = step.halved(width_groups(find_groups(step.denoiser))[-1])
    counts = []
    for room in (0, recorded.held // 2, recorded.held):
        prefix = Prefix(step.denoiser, blocks_of(step.denoiser), room)
        with prefix.recording():
            step()
        assert prefix.held <= room
        with replaced(step.denoiser, consumers):
            whole = step()
            with prefix.resumed(consumers):
                assert torch.equal(step(), whole)
        counts.append(len(step.ran))
    assert counts[0] > counts[1] > counts[2]


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        return x + self.bias


class Chain(nn.Module):
    """Blocks one after the other, with what a host may do to them between."""

    def __init__(self, overwrite=False, twice=False):
        super().__init__()
        self.blocks = nn.ModuleList(Add() for _ in range(3))
        self.overwrite, self.twice = overwrite, twice

    def forward(self, x):
        x = self.blocks[0](x)
        if self.overwrite:
            x += 1
        if self.twice:
            x = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](x))


@pytest.mark.parametrize("odd", [{"overwrite": True}, {"twice": True}, {}])
def test_what_a_block_did_not_give_alone_is_not_given_back(odd):
    chain, x = Chain(**odd), torch.zeros(2)
    prefix = Prefix(chain, [f"blocks.{i}" for i in range(3)], 2**20)
    with prefix.recording():
        whole = chain(x)
    ran = []
    own = chain.blocks[0].forward
    chain.blocks[0].forward = lambda x: ran.append(0) or own(x)
    for _ in range(2):
        with prefix.resumed(["blocks.2"]):
            assert torch.equal(chain(x), whole)
    assert bool(ran) == bool(odd)


def test_blocks_divide_no_group():
    denoiser = Step("sdxl").denoiser
    blocks = blocks_of(denoiser)
    assert any(block.endswith("transformer_blocks.0") for block in blocks)
    assert any(".resnets." in block for block in blocks)
    assert not any("to_out" in block or ".net." in block for block in blocks)


@pytest.mark.parametrize(("how", "warm"), [("blocks", False), *((how, True) for how in COMPILED)])
def test_a_compiled_denoiser_gives_the_same_bank_by_the_same_blocks(how, warm, monkeypatch):
    banks, skipped = [], []
    before = _Call.before
    monkeypatch.setattr(_Call, "before", lambda call, changed: skipped.append(found := before(call, changed)) or found)
    for compiled in (False, True):
        pipe = zoo.make_pipeline("dit")
        host = host_for(pipe)
        calibration = calibrate(host, [0, 1, 2, 3], steps=4)
        if compiled:
            compile_and_run(pipe, how, 8 if warm else 3)
        skipped.clear()
        banks.append((prune(host_for(pipe), calibration, levels=(0.0, 0.2, 0.4), multiple=8), [*skipped]))
    (eager, some), (graphs, same) = banks
    assert eager.kept == graphs.kept and eager.provenance["layer_errors"] == graphs.provenance["layer_errors"]
    assert some == same and any(some)
