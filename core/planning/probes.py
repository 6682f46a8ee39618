"""Probe trajectories: dense states cached at the stages' boundaries, and the error of running a schedule along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AllocationError
from ..host import Conditions, Host, Prompt, SamplerState
from ..runtime import StagePruner
from ..schedule import StageSchedule
from .sampling import check_dense


@dataclass(frozen=True)
class _Batch:
    conditions: Conditions
    states: tuple[SamplerState, ...]  # at the start of each stage
    final: Tensor


class Probes:
    """Dense reference trajectories of some prompts and seeds.

    Args:
        host: the pipeline.
        pruner: a pruner on its denoiser with every level resident; it is left dense.
        stages: the stages whose boundaries are cached; their levels do not matter.
        prompts: one a probe.
        seeds: one a probe.
        steps: sampling steps.
        guidance: guidance scale.
        batch_size: probes that run together.

    Raises:
        AllocationError: the sampler visits some stage with no step, or the dense samples are not finite.
    """

    def __init__(
        self,
        host: Host,
        pruner: StagePruner,
        stages: StageSchedule,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        batch_size: int = 32,
    ) -> None:
        self.host, self.pruner, self.guidance = host, pruner, guidance
        self.dense = stages.with_levels([0.0] * len(stages.stages))
        self.starts = stage_starts(self.dense, host.taus(steps), steps)
        self.calls = len(host.taus(steps))
        pruner.schedule = self.dense
        self.batches = [
            self._dense_batch(prompts[begin : begin + batch_size], seeds[begin : begin + batch_size], steps)
            for begin in range(0, len(prompts), batch_size)
        ]

    def errors(self, levels: Sequence[float], on_batch: Callable[[], None] | None = None) -> Tensor:
        """Mean squared error of each probe's final latents when the stages run at `levels`, shape (probes,)."""
        parts = []
        for batch in range(len(self.batches)):
            parts.append(self.differences(levels, batch).square().mean(1).cpu())
            if on_batch:
                on_batch()
        return torch.cat(parts)

    def differences(self, levels: Sequence[float], batch: int) -> Tensor:
        """What running the stages at `levels` changes in the final latents of one batch of probes, float32, on the
        host's device, shape (probes, numbers).

        Only what differs from dense is run: from the first pruned stage on.
        """
        probes = self.batches[batch]
        first = next((i for i, level in enumerate(levels) if level > 0), None)
        if first is None:
            return torch.zeros_like(probes.final, dtype=torch.float32).flatten(1)
        self.pruner.schedule = self.dense.with_levels(levels)
        try:
            state = self.host.advance(probes.states[first], probes.conditions, self.guidance, self.calls)
        finally:
            self.pruner.schedule = self.dense
        return (state.latents - probes.final).float().flatten(1)

    def _dense_batch(self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int) -> _Batch:
        conditions = self.host.encode(prompts)
        state = self.host.start(seeds, steps)
        states = []
        for start in self.starts:
            state = self.host.advance(state, conditions, self.guidance, start)
            states.append(state)
        final = self.host.advance(state, conditions, self.guidance, self.calls).latents
        check_dense(final, self.guidance)
        return _Batch(conditions, tuple(states), final)


def stage_starts(stages: StageSchedule, taus: Sequence[float], steps: int) -> list[int]:
    """Index of the first denoiser call of each stage. AllocationError if a stage gets none."""
    visited = [stages.stage_of(tau) for tau in taus]
    unvisited = sorted(set(range(len(stages.stages))) - set(visited))
    if unvisited:
        stage = stages.stages[unvisited[0]]
        raise AllocationError(
            f"no step of a {steps}-step run falls in stage {unvisited[0]} (tau {stage.high:g} to {stage.low:g}), so "
            "pruning it would save nothing. Use fewer `stages`, or boundaries that the steps visit, as those of "
            "`stages='equal-steps'`; or `empty='merge'`."
        )
    return [visited.index(stage) for stage in range(len(stages.stages))]
