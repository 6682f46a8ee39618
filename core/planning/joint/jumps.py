"""What any jump from one noise level to another costs, at any level of the bank, from one call a point and level.

A solver of first order makes from x_i and the denoiser's clean estimate c of it, whatever the distance,

    x_j = n_j / n_i x_i + (s_j - s_i n_j / n_i) c

(DDIM, arXiv 2010.02502, equation 12 without noise; for flow matching an Euler step: signal s = 1 - sigma, noise
n = sigma). So along a dense trajectory on a fine grid, one call at a point and level tells where every jump from there
ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ... import progress
from ...errors import AllocationError
from ...host import Conditions, Host, NoiseLevel, SamplerState
from ...runtime import StagePruner
from ..sampling import Sampling, check_dense
from ..table import TableOrigin

WEIGHED = 10
"""Points at which it is measured how much an error still means at the end; between them it is interpolated."""

LEAST_POINTS = 40
"""Noise levels of the grid, at least."""


def grid_points(steps: int) -> int:
    """How many noise levels a grid has: a multiple of the sampler's own steps, so that these are among them."""
    return steps * math.ceil(LEAST_POINTS / steps)


@dataclass(frozen=True)
class JumpTable:
    """The price of each jump along dense trajectories, means over probes and values.

    Args:
        taus: the grid, falling.
        sparsities: the levels.
        final: squared error of the final latents that a jump from point i to point j (of `len(taus)`: the end) causes
            at a level, shape (points, points + 1, levels); infinite for j <= i. The local error, times what
            a squared error at j was seen to grow to.
        origin: what it was measured with.
    """

    taus: tuple[float, ...]
    sparsities: tuple[float, ...]
    final: Tensor
    origin: TableOrigin


def falling_taus(host: Host, steps: int) -> list[float]:
    """Noise levels of a sampler's own steps.

    Raises:
        AllocationError: the sampler makes more than one call a step.
    """
    taus = host.taus(steps)
    if len(taus) != steps or any(noisier <= cleaner for noisier, cleaner in pairwise(taus)):
        raise AllocationError(
            f"steps and levels together need a sampler with one call a step and falling noise levels; this one visits "
            f"{len(taus)} in {steps} steps. Use DPMSolverMultistepScheduler, DDIMScheduler or "
            "FlowMatchEulerDiscreteScheduler."
        )
    return taus


def measure_jumps(sampling: Sampling, pruner: StagePruner, points: int) -> JumpTable:
    """One call of each level at each of `points` noise levels, as the sampler spaces so many steps.

    Args:
        sampling: the pipeline with the probes.
        pruner: the bank on its denoiser, dense, every level resident; left so.
        points: of the grid.

    Raises:
        AllocationError: the sampler makes more than one call a step, or the dense trajectories are not finite.
    """
    host = sampling.host.visiting(falling_taus(sampling.host, points), first_order=True)
    grid = host.taus(points)
    levels = [*host.noise_levels(grid), NoiseLevel(1.0, 0.0)]
    sparsities = pruner.bank.sparsities
    shape = (points, points + 1, len(sparsities))
    local = torch.zeros(shape, dtype=torch.float64)
    growth = torch.zeros(points + 1, dtype=torch.float64)
    prompts, size = sampling.prompts, sampling.batch_size
    batches = range(0, len(prompts), size)
    with progress.bar(len(batches) * points * len(sparsities), "measuring jumps", "call") as bar:
        for begin in batches:
            part = prompts[begin : begin + size]
            seeds = range(sampling.seed + begin, sampling.seed + begin + len(part))
            batch = _Batch(host, pruner, host.encode(part), sampling.guidance, levels, seeds)
            share = len(part) / len(prompts)
            for place in range(points):
                for level, sparsity in enumerate(sparsities):
                    local[place, place + 1 :, level] += share * batch.jumps(place, sparsity)
                    bar.update(1)
            growth += share * batch.growth()
    later = torch.arange(points + 1)[None, :] > torch.arange(points)[:, None]
    final = (local * growth[None, :, None]).masked_fill(~later[:, :, None], math.inf)
    origin = TableOrigin.of(sampling.host, pruner.bank, sampling.steps, sampling.guidance)
    return JumpTable(tuple(grid), sparsities, final, origin)


class _Batch:
    """Dense trajectories of some probes on the grid, and jumps off them."""

    def __init__(
        self,
        host: Host,
        pruner: StagePruner,
        conditions: Conditions,
        guidance: float,
        levels: Sequence[NoiseLevel],
        seeds: Sequence[int],
    ) -> None:
        self.host, self.pruner, self.conditions, self.guidance = host, pruner, conditions, guidance
        self.signal, self.noise = ([getattr(level, name) for level in levels] for name in ("signal", "noise"))
        points = len(levels) - 1
        states = [host.start(seeds, points)]
        for place in range(points):
            states.append(self._advance(states[-1], place + 1))
        check_dense(states[-1].latents, guidance)
        self.states = states
        self.latents = torch.stack([state.latents.flatten().double() for state in states])

    def jumps(self, place: int, sparsity: float) -> Tensor:
        """Local squared errors of all jumps from `place`, at a level, shape (points - place,)."""
        after = self.states[place + 1]
        if sparsity:
            with _running(self.pruner, sparsity):
                after = self._advance(self.states[place], place + 1)
        clean = self._clean(place, after.latents.flatten().double())
        errors = torch.stack(
            [
                (self._jump(place, there, clean) - self.latents[there]).square().mean()
                for there in range(place + 1, len(self.states))
            ]
        )
        return errors.cpu()

    def growth(self) -> Tensor:
        """What a squared error at each point has become at the end, if the rest is dense; shape (points + 1,).

        Measured for the errors of one call at the bank's middle level, and interpolated in its logarithm.
        """
        points = len(self.states) - 1
        sparsities = self.pruner.bank.sparsities
        known = {points: 1.0}
        for place in sorted({round(index * (points - 1) / (WEIGHED - 1)) for index in range(WEIGHED)} - {0}):
            with _running(self.pruner, sparsities[len(sparsities) // 2]):
                moved = self._advance(self.states[place - 1], place)
            error = _mean_square(moved.latents.flatten().double() - self.latents[place])
            final = self._advance(moved, points).latents.flatten().double()
            if error:
                known[place] = _mean_square(final - self.latents[-1]) / error
        return _interpolated(known, points)

    def _jump(self, here: int, there: int, clean: Tensor) -> Tensor:
        shrink = self.noise[there] / self.noise[here]
        made: Tensor = shrink * self.latents[here] + (self.signal[there] - self.signal[here] * shrink) * clean
        return made

    def _clean(self, place: int, after: Tensor) -> Tensor:
        """The clean estimate that took the latents at `place` to `after` in one step of the grid."""
        shrink = self.noise[place + 1] / self.noise[place]
        gain = self.signal[place + 1] - self.signal[place] * shrink
        clean: Tensor = (after - shrink * self.latents[place]) / gain
        return clean

    def _advance(self, state: SamplerState, until: int) -> SamplerState:
        return self.host.advance(state, self.conditions, self.guidance, until)


@contextmanager
def _running(pruner: StagePruner, sparsity: float) -> Iterator[None]:
    """The denoiser at one level for the length of a block."""
    before = pruner.schedule
    pruner.schedule = before.with_levels([sparsity] * len(before.stages))
    try:
        yield
    finally:
        pruner.schedule = before


def _interpolated(known: dict[int, float], points: int) -> Tensor:
    """Geometrically between what is known, constant beyond."""
    places = sorted(place for place, value in known.items() if value > 0)
    values = torch.ones(points + 1, dtype=torch.float64)
    for place in range(points + 1):
        below = max((known_place for known_place in places if known_place <= place), default=places[0])
        above = min((known_place for known_place in places if known_place >= place), default=places[-1])
        part = (place - below) / (above - below) if above > below else 0.0
        values[place] = math.exp((1 - part) * math.log(known[below]) + part * math.log(known[above]))
    return values


def _mean_square(difference: Tensor) -> float:
    return float(difference.square().mean())
