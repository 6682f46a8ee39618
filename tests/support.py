"""What several test modules share: a tiny pipeline, the three ways to hold weights, and a slow reference run time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from stageprune.core.groups.check import sliced
from stageprune.core.groups.layer import layer_at
from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning.joint import Runs
from stageprune.core.planning.rivals import calls_of
from stageprune.core.pruning import Bank
from stageprune.core.schedule import StageSchedule

SHARINGS = (("shared", "shared"), ("shared", "stage"), ("stage", "stage"))
SHARING_IDS = [f"{order}-{consumers}" for order, consumers in SHARINGS]
LEVELS = (0.0, 0.2, 0.5, 0.7)
SCHEDULE = StageSchedule.from_levels([0, 0.2, 0.5, 0.7, 0.5])
STEPS = 5
GUIDANCE = 1.5
LABELS = [1, 2, 3]
TAUS = [0.9, 0.7, 0.5, 0.3, 0.1]
"""One noise level in each of the five equal stages."""


def make_denoiser(seed: int = 0, **config: Any) -> DiTTransformer2DModel:
    """A random DiT whose every weight matters."""
    return zoo.make_denoiser("dit", seed, **config)


def make_pipe(seed: int = 0, **config: Any) -> DiTPipeline:
    """A tiny DiT pipeline; the same seed and configuration give the same weights."""
    return zoo.make_pipeline("dit", seed, **config)


def images(pipe: Any, steps: int = STEPS, guidance: float = GUIDANCE, labels: Sequence[int] = LABELS) -> Tensor:
    """What `pipe(...)` itself gives for fixed seeds."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    result = pipe(list(labels), num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="pt")
    return result.images


def latents(pipe: Any, steps: int = STEPS, guidance: float = GUIDANCE, labels: Sequence[int] = LABELS) -> Tensor:
    """Final latents through the host, for fixed seeds."""
    host = DiffusersHost(pipe)
    return sample(host, host.encode(labels), list(range(len(labels))), steps, guidance)


def forward(denoiser: nn.Module, tau: float, batch: int = 2) -> Tensor:
    """One denoiser call at noise level `tau` on fixed inputs, in the denoiser's dtype."""
    generator = torch.Generator().manual_seed(7)
    size = denoiser.config.sample_size
    hidden = torch.randn(batch, denoiser.config.in_channels, size, size, generator=generator)
    times = torch.full((batch,), round(tau * 1000))
    hidden = hidden.to(next(denoiser.parameters()).dtype)
    with torch.no_grad():
        return denoiser(hidden, timestep=times, class_labels=torch.arange(batch)).sample


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dictionary."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Same keys in the same order, bit-equal values."""
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def inside(module: nn.Module) -> dict[str, Any]:
    """All that a module tree holds besides parameter values: classes, plain attributes, hooks, buffers."""
    return {
        name: (
            type(child),
            sorted(key for key in child.__dict__ if key != "_stage_bank"),
            len(child._forward_pre_hooks) + len(child._forward_hooks),
            sorted(child._buffers),
            {key: value for key, value in child.__dict__.items() if isinstance(value, int)},
        )
        for name, child in module.named_modules()
    }


COMPILED = ("whole", "blocks", "wrapped")
"""Ways to compile a denoiser."""


def compile_and_run(pipe: Any, how: str, batch: int) -> list[int]:
    """Compile a pipeline's transformer with a backend that changes no number, and run so many samples: the graphs for
    batches of this size are there from then on. Every capture of a graph, and every run of one, adds to the list.
    """
    seen: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(1)
        return lambda *args: (seen.append(1), graph.forward(*args))[1]

    for block in pipe.transformer.transformer_blocks if how == "blocks" else ():
        block.compile(backend=backend)
    if how == "whole":
        pipe.transformer.compile(backend=backend)
    if how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    latents(pipe, labels=[1] * batch)
    assert seen
    return seen


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """The denoiser after the block is what it was before: weights bit for bit, classes, attributes, hooks, images."""
    state, structure, before = state_of(pipe.transformer), inside(pipe.transformer), images(pipe)
    yield
    assert same_state(state, state_of(pipe.transformer))
    assert structure == inside(pipe.transformer)
    assert torch.equal(before, images(pipe))


@contextmanager
def reference(denoiser: nn.Module, bank: Bank, level: int, stage: int) -> Iterator[None]:
    """The slow, plain way to run a level: slice everything physically, then put the bank's consumers in place."""
    if level == 0:
        yield
        return
    keep = {group.name: bank.order(group.name, stage)[: bank.kept[group.name][level]] for group in bank.groups}
    with sliced(denoiser, bank.groups, keep):
        biases = {}
        for path in bank.consumer_shapes:
            linear, consumer = layer_at(denoiser, path), bank.consumer(path, level, stage)
            assert linear.weight.shape == consumer.weight.shape
            biases[path] = linear.bias
            linear.weight = nn.Parameter(consumer.weight.to(linear.weight.dtype), requires_grad=False)
            linear.bias = nn.Parameter(consumer.bias.to(linear.weight.dtype), requires_grad=False)
        try:
            yield
        finally:
            for path, bias in biases.items():
                layer_at(denoiser, path).bias = bias


def reference_latents(pipe: Any, bank: Bank, schedule: StageSchedule, steps: int = STEPS) -> Tensor:
    """The whole trajectory through `reference`, one denoiser call at a time, on a copy of the denoiser."""
    twin = copy.copy(pipe)
    twin.register_modules(transformer=copy.deepcopy(pipe.transformer))
    host = DiffusersHost(twin)
    conditions, state = host.encode(LABELS), host.start(range(len(LABELS)), steps)
    bound = bank.bind(schedule)
    for tau in host.taus(steps):
        with reference(host.denoiser, bank, *bound[schedule.stage_of(tau)]):
            state = host.advance(state, conditions, GUIDANCE, state.index + 1)
    return state.latents


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def least_squares(weight: Tensor, rows: Tensor, kept: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Weight and bias on the kept columns that best keep the dense output on `rows`, ridge on all but the bias.

    Fits [X; sqrt(lambda) I] on the kept columns to the dense output, damping rows included, by torch's SVD solver.
    """
    width = rows.shape[1]
    data = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    ridge = torch.eye(width, width + 1, dtype=rows.dtype) * damping**0.5
    data = torch.cat([data, ridge])
    columns = torch.cat([kept, torch.tensor([width])])
    solution = torch.linalg.lstsq(data[:, columns], data @ weight.T, driver="gelsd").solution.T
    return solution[:, :-1], solution[:, -1]


def broken(bank: Bank) -> Bank:
    """The bank with consumers that overflow whatever they are given, as a level in half precision may."""
    consumers = {key: each._replace(weight=each.weight * 1e30) for key, each in bank.consumers.items()}
    return replace(bank, consumers=consumers)


def hessian_of(rows: Tensor) -> Tensor:
    """Second moments of `rows` and a constant 1, as a calibration sums them."""
    data = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    return data.T @ data


class raising:
    """Raise from a block's forward at its n-th call within the context."""

    def __init__(self, block: nn.Module, error: BaseException, call: int) -> None:
        self.block, self.error, self.left = block, error, call

    def __enter__(self):
        self.hook = self.block.register_forward_hook(self._count)

    def __exit__(self, *_):
        self.hook.remove()

    def _count(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error


@st.composite
def path_problems(draw: st.DrawFn) -> tuple[Tensor, list[float], float]:
    """Prices of jumps on a small grid, costs of levels in tenths, and a budget."""
    points, levels = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    number = st.floats(0, 10)
    prices = torch.full((points, points + 1, levels), math.inf, dtype=torch.float64)
    for here in range(points):
        for there in range(here + 1, points + 1):
            prices[here, there] = torch.tensor([draw(number) for _ in range(levels)])
    costs = [draw(st.integers(1, 10)) / 10 for _ in range(levels)]
    return prices, costs, draw(st.integers(0, 40)) / 10


class PlantedErrors:
    """Errors of runs as they are planted, and nothing is run: some by what a schedule runs, one for all others.

    Probes differ a little, alike for all. `ran` lists first seed and calls of each run.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, errors: Mapping[StageSchedule, float], others: float = 1.0
    ) -> None:
        self.errors, self.others, self.ran = {calls_of(key): value for key, value in errors.items()}, others, []
        monkeypatch.setattr(Runs, "statistics", lambda runs, schedule, steps=None: self.run(runs, schedule))

    def run(self, runs: Runs, schedule: StageSchedule | None) -> Tensor:
        calls = calls_of(schedule) if schedule else ()
        self.ran.append((runs.sampling.seed, calls))
        generator = torch.Generator().manual_seed(runs.sampling.seed)
        hard = 1 + 0.1 * torch.randn(len(runs.sampling.prompts), generator=generator, dtype=torch.float64)
        return (hard * self.errors.get(calls, self.others))[:, None]
