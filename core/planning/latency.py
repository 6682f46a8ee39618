"""How long a denoiser call takes at each level, beside a dense one: measured on this device, interleaved."""

from __future__ import annotations

import statistics
import time

import torch

from .. import progress
from ..host import Conditions, Host, SamplerState
from ..runtime import StagePruner
from .sampling import Sampling

ROUNDS = 7
CALLS = 4
"""Calls that are timed together, so that preparing the sampler hardly counts."""


@torch.no_grad()
def relative_times(sampling: Sampling, pruner: StagePruner, rounds: int = ROUNDS) -> dict[float, float]:
    """Sparsity -> time of a call over that of a dense call, median over rounds of the ratio within one round.

    Each round runs every level once, so that whatever slows the machine slows all of them alike; one more round goes
    before them, uncounted. A call is what the sampler makes of it: guidance and the sampler's own step included, one
    image, which is what most people generate at a time. Switching between levels is not included.

    Args:
        sampling: the run; its first calls are timed, with its first prompt.
        pruner: with every level resident; left dense.
        rounds: counted rounds.
    """
    host, dense = sampling.host, pruner.schedule
    prompts = list(sampling.prompts[:1]) or host.default_prompts()[:1]
    conditions, state = host.encode(prompts), host.start([sampling.seed], sampling.steps)
    until = min(CALLS, len(sampling.taus))
    seconds: dict[float, list[float]] = {sparsity: [] for sparsity in pruner.bank.sparsities}
    try:
        with progress.bar((rounds + 1) * len(seconds), "timing levels", "run") as bar:
            for _ in range(rounds + 1):
                for sparsity, taken in seconds.items():
                    pruner.schedule = dense.with_levels([sparsity] * len(dense.stages))
                    taken.append(_seconds(host, state, conditions, sampling.guidance, until))
                    bar.update(1)
    finally:
        pruner.schedule = dense
    return {sparsity: _ratio(taken[1:], seconds[0.0][1:]) for sparsity, taken in seconds.items()}


def _ratio(taken: list[float], dense: list[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(taken, dense, strict=True))


def _seconds(host: Host, state: SamplerState, conditions: Conditions, guidance: float, until: int) -> float:
    device = state.latents.device
    _synchronise(device)
    started = time.perf_counter()
    host.advance(state, conditions, guidance, until)
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    """Wait for the device's queue, where it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
