"""First-order scores: against gradients of the weights themselves, by the loss that each scheduler trains."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import stageprune
from stageprune.core.errors import CalibrationError, StagePruneError
from stageprune.core.groups import find_groups, width_groups
from stageprune.core.groups.layer import layer_at, taps_of
from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.hosts.diffusers.bare import DenoiserHost
from stageprune.core.hosts.diffusers.noise import target
from support import inside, make_pipe, same_state, state_of
from zoo import NAMES, make_denoiser, make_pipeline, prompts_for

STEPS = 3
CALL = {"steps": STEPS, "guidance": 1.0, "taylor": 0.0}


def by_weights(pipe, prompt, seed, kinds):
    """Of one sample: |sum of w dL/dw| over each unit's consumer columns, by gradients of the weights, per step."""
    host = DiffusersHost(pipe)
    denoiser, condition = host.denoiser, host.encode([prompt])
    groups = [group for group in width_groups(find_groups(denoiser)) if group.kind in kinds]
    calls = []
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    clean = sample(host, condition, [seed], STEPS, 1.0)
    hook.remove()
    generator = torch.Generator().manual_seed(seed + (1 << 32))
    losses, scores = [], []
    for (args, kwargs), tau in zip(calls, host.taus(STEPS), strict=True):
        noise = torch.randn(clean.shape[1:], generator=generator)[None]
        level = host.noise_levels([tau])[0]
        noisy, wanted = level.signal * clean + level.noise * noise, host.target(clean, noise, tau)
        name = "sample" if "UNet" in type(denoiser).__name__ else "hidden_states"
        kwargs, args = ({**kwargs, name: noisy}, ()) if name in kwargs else (kwargs, (noisy, *args[1:]))
        loss = (denoiser(*args, **kwargs)[0][:, : wanted.shape[1]] - wanted).square().mean()
        denoiser.zero_grad()
        loss.backward()
        losses.append(float(loss))
        scores.append({group.name: weight_effect(denoiser, group).abs() for group in groups})
    denoiser.zero_grad()
    return losses, scores


def weight_effect(denoiser, group):
    """Sum of w dL/dw over each unit's columns in all consumers."""
    total = torch.zeros(group.size)
    for consumer in group.consumers:
        layer = layer_at(denoiser, consumer.path)
        effect = (layer.weight * layer.weight.grad).sum(0).flatten()  # a convolution's channels with their taps
        first, width = consumer.offset * taps_of(layer), group.channels * taps_of(layer)
        total += effect[first : first + width].view(group.size, -1).sum(1).detach()
    return total


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_weights(name):
    pipe = make_pipeline(name)
    kinds = ("head", "neuron", "channel") if name == "sd15" else ("head", "neuron")
    prompt = prompts_for(pipe)[0]
    calibration = stageprune.calibrate(
        pipe, [prompt] * (12 if name == "sd15" else 6), kinds=kinds, stages=1, batch_size=12, **{**CALL, "steps": STEPS}
    )
    expected = {}
    for seed in range(12 if name == "sd15" else 6):
        for scores in by_weights(pipe, prompt, seed, kinds)[1]:
            for group, values in scores.items():
                expected[group] = expected.get(group, 0) + values
    for group, values in expected.items():
        found = calibration.scores_of(group)["taylor"]
        assert torch.allclose(found.float(), values, rtol=2e-3, atol=1e-3 * float(values.max())), group


def test_it_leaves_no_trace_and_no_gradient():
    pipe = make_pipe()
    state, structure = state_of(pipe.transformer), inside(pipe.transformer)
    stageprune.calibrate(pipe, [1, 2, 3] * 3, **CALL)
    assert same_state(state, state_of(pipe.transformer)) and inside(pipe.transformer) == structure
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


def test_hessians_are_those_without_it_and_a_run_resumes(tmp_path):
    pipe, prompts = make_pipe(), [1, 2, 3] * 4
    plain = stageprune.calibrate(pipe, prompts, steps=STEPS, guidance=1.0, batch_size=4)
    with_it = stageprune.calibrate(pipe, prompts, **CALL, batch_size=4)
    assert all(torch.equal(plain.hessians[path], with_it.hessians[path]) for path in plain.hessians)
    part = tmp_path / "part"
    with pytest.raises(ZeroDivisionError):
        calls = []
        hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1) if len(calls) < 8 else 1 / 0)
        stageprune.calibrate(pipe, prompts, **CALL, batch_size=4, checkpoint=part)
    hook.remove()
    resumed = stageprune.calibrate(pipe, prompts, **CALL, batch_size=4, checkpoint=part)
    assert all(torch.equal(resumed.scores[name], with_it.scores[name]) for name in with_it.scores)


def test_the_batch_size_changes_nothing_but_rounding():
    """Each sample's absolute value is its own."""
    pipe, prompts = make_pipe(), [1, 2, 3] * 4
    first, second = (stageprune.calibrate(pipe, prompts, **CALL, batch_size=size) for size in (3, 12))
    for name, table in first.scores.items():
        assert torch.allclose(table, second.scores[name], rtol=1e-3)


def test_steps_of_little_loss_do_not_count():
    pipe = make_pipe()
    losses, scores = by_weights(pipe, 1, 0, ("head", "neuron"))
    threshold = sorted(losses)[-2] / max(losses) + 1e-3  # all steps but the one of the largest loss go
    best = scores[losses.index(max(losses))]
    # The Hessians need more than one sample, so the same one comes again and again, each seed by itself.
    calibration = stageprune.calibrate(pipe, [1] * 12, **{**CALL, "taylor": threshold}, batch_size=1)
    every = stageprune.calibrate(pipe, [1] * 12, **CALL, batch_size=1)
    for name, table in calibration.scores.items():
        assert bool((table <= every.scores[name] + 1e-12).all()) and float(table.sum()) < float(
            every.scores[name].sum()
        )
        assert bool((table[0] >= best[name.partition(".")[2]].double() * 0.99 - 1e-9).all()), "seed 0 is among them"


def test_stages_are_kept_apart():
    pipe = make_pipe()
    pooled = stageprune.calibrate(pipe, [1, 2, 3] * 4, **CALL)
    staged = stageprune.calibrate(pipe, [1, 2, 3] * 4, **CALL, stages=[0.5])
    for name, table in staged.scores.items():
        assert table.shape[0] == 2 and torch.allclose(table.sum(0), pooled.scores[name][0], rtol=1e-6)
    bank = stageprune.prune(pipe, staged, method="taylor", order="stage", levels=[0.5], multiple=16)
    assert bank.orders["blocks.0.ff"].shape == (2, 160)


def test_taylor_orders_by_the_scores():
    pipe = make_pipe()
    calibration = stageprune.calibrate(pipe, [1, 2, 3] * 4, **CALL)
    bank = stageprune.prune(pipe, calibration, method="taylor", levels=[0.5], multiple=16)
    scores = calibration.scores_of("blocks.1.ff")["taylor"]
    assert scores[bank.order("blocks.1.ff", 0)].tolist() == sorted(scores.tolist(), reverse=True)
    kept = bank.order("blocks.1.ff", 0)[: bank.kept["blocks.1.ff"][1]]
    dense = layer_at(pipe.transformer, "transformer_blocks.1.ff.net.2").weight
    assert torch.equal(bank.consumer("transformer_blocks.1.ff.net.2", 1, 0).weight, dense[:, kept])


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", 3.0), ("sample", 5.0), ("v_prediction", None)])
def test_targets_of_ddpm_like_schedulers(kind, expected):
    scheduler = DDIMScheduler(prediction_type=kind)
    samples, noise = torch.full((1, 1), 5.0), torch.full((1, 1), 3.0)
    found = float(target(scheduler, samples, noise, 0.5))
    alpha = float(scheduler.alphas_cumprod[500])
    assert found == pytest.approx(alpha**0.5 * 3 - (1 - alpha) ** 0.5 * 5 if expected is None else expected, rel=1e-5)


def test_targets_of_flows_and_unknown_ones():
    samples, noise = torch.full((1, 1), 5.0), torch.full((1, 1), 3.0)
    assert float(target(FlowMatchEulerDiscreteScheduler(), samples, noise, 0.3)) == -2
    with pytest.raises(
        StagePruneError, match="`prediction_type` must be one of epsilon, sample, v_prediction, got 'x'"
    ):
        target(DDIMScheduler(prediction_type="x"), samples, noise, 0.3)
    with pytest.raises(StagePruneError, match="has no sampler"):
        DenoiserHost(make_denoiser("dit")).target(samples, noise, 0.3)


def test_refusals():
    pipe = make_pipe()
    for threshold in (-0.1, 1.0):
        with pytest.raises(CalibrationError, match=r"`taylor` must be a share of the largest loss in \[0, 1\), got"):
            stageprune.calibrate(pipe, [1], steps=STEPS, taylor=threshold)
    with pytest.raises(CalibrationError, match=r"under 'taylor': calibrate with taylor=0.05"):
        stageprune.prune(pipe, stageprune.calibrate(pipe, [1, 2, 3] * 4, steps=STEPS), method="taylor")
