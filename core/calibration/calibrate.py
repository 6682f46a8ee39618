"""Run the pipeline on prompts and accumulate Hessians along its own trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import progress
from ..errors import CalibrationError
from ..fingerprint import Fingerprint
from ..groups import consumer_sites, find_groups, width_groups
from ..host import Host, Prompt
from ..schedule import StageSchedule
from .alpha import Alpha, alpha_name, step_weights
from .calibration import Calibration
from .recorders import Layers, Recorders

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(
    host: Host,
    prompts: Sequence[Prompt],
    *,
    steps: int = 25,
    guidance: float = 1.5,
    stages: int | Sequence[float] = 1,
    alpha: Alpha = "uniform",
    kinds: Sequence[str] = ("head", "neuron"),
    layers: Layers = "consumers",
    skip_blocks: bool = False,
    taylor: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
) -> Calibration:
    """Accumulate the Hessian of every consumer's inputs on dense trajectories, guidance included, without decoding.

    Args:
        host: the pipeline.
        prompts: texts or class labels; each gets its own seed (`seed`, `seed + 1`, ...).
        steps: sampling steps.
        guidance: guidance scale; above 1 the unconditional pass is recorded too.
        stages: number of equal stages kept apart, or the inner boundaries in tau, falling. 1 pools everything.
        alpha: weight of each step: a name in `ALPHAS`, or a function of tau.
        kinds: unit kinds that will be pruned. `channel` is left out by default: the Hessian of a 3 x 3 convolution has
            81 times the numbers of a Linear's of as many channels. `block` scores whole blocks, for `depth`.
        layers: `consumers`, whose inputs `prune` needs, or `all`: the producers' too, which `sparsify` can use. What
            several layers read (q, k and v of an attention) is summed once.
        skip_blocks: with kind `block`, also measure what the denoiser gives without each block, for `depth-output`;
            as many more calls as there are blocks.
        taylor: also score units for method `taylor`, by gradients of the denoising loss on the pipeline's own samples,
            at the steps with at least this share of the largest loss (Diff-Pruning: 0.05). None does not.
        seed: first seed.
        batch_size: prompts that run together.
        checkpoint: a file that is rewritten after each batch. If it exists and belongs to the same call, the run goes
            on from there, to the identical result.

    Raises:
        CalibrationError: no prompts, no such kind of unit or weight, too few data for the Hessians' rank, or a
            checkpoint of another call.

    Example:
        >>> calibration = calibrate(host, prompts=[0, 1, 2, 3] * 8, steps=20, checkpoint="calibration.part")
    """
    if not prompts:
        raise CalibrationError("`prompts` is empty: give at least a few dozen prompts or class labels.")
    if steps < 1 or batch_size < 1:
        raise CalibrationError(f"`steps` and `batch_size` must be at least 1, got {steps} and {batch_size}.")
    schedule = _stages(stages)
    recorders = Recorders(host, len(schedule.stages), kinds, layers, skip_blocks, taylor)
    weights = step_weights(alpha, host.taus(steps))
    provenance = {
        **host.describe(),
        "prompts": list(prompts),
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "alpha": alpha_name(alpha),
        **({"alpha_weights": weights} if callable(alpha) else {}),  # a name does not tell two functions apart
        "kinds": sorted(kinds),
        "layers": layers,
        "skip_blocks": skip_blocks,
        "taylor": taylor,
        "batch_size": batch_size,
    }
    fingerprint = Fingerprint.of(host.denoiser, list(consumer_sites(width_groups(find_groups(host.denoiser)))))
    run = _Run(host, recorders, schedule, weights, provenance, fingerprint)
    done = run.resume(Path(checkpoint)) if checkpoint is not None else 0
    with progress.bar(len(prompts), "calibrating", "prompt") as bar:
        bar.update(done)
        for begin in range(done, len(prompts), batch_size):
            part = prompts[begin : begin + batch_size]
            run.batch(part, list(range(seed + begin, seed + begin + len(part))))
            if checkpoint is not None:
                run.result(begin + len(part)).save(checkpoint)
            bar.update(len(part))
    result = run.result(len(prompts))
    result.check_rank(per_stage=result.stages > 1)
    return result


def _stages(stages: int | Sequence[float]) -> StageSchedule:
    if isinstance(stages, int):
        if stages < 1:
            raise CalibrationError(f"`stages` must be at least 1, got {stages}.")
        return StageSchedule.from_levels([0.0] * stages)
    return StageSchedule.from_levels([0.0] * (len(stages) + 1), list(stages))


class _Run:
    """One calibration under way: the recorders, and what tells two calls apart."""

    def __init__(
        self,
        host: Host,
        recorders: Recorders,
        schedule: StageSchedule,
        weights: Sequence[float],
        provenance: Mapping[str, Any],
        fingerprint: Fingerprint,
    ) -> None:
        self.host = host
        self.recorders = recorders
        self.schedule = schedule
        self.weights = weights
        self.provenance = provenance
        self.fingerprint = fingerprint

    def batch(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Sample one batch of prompts with the recorder on."""
        host, steps, guidance = self.host, self.provenance["steps"], self.provenance["guidance"]
        conditions = host.encode(prompts)
        state = host.start(seeds, steps)
        with self.recorders.recording():
            for tau, weight in zip(host.taus(steps), self.weights, strict=True):
                self.recorders.at(self.schedule.stage_of(tau), weight, tau)
                state = host.advance(state, conditions, guidance, state.index + 1)
        self.recorders.finish(state.latents, seeds)

    def result(self, done: int) -> Calibration:
        """What has been accumulated after `done` prompts."""
        return Calibration(
            hessians=self.recorders.hessians.hessians,
            rows=self.recorders.hessians.rows,
            edges=tuple(self.schedule.edges),
            fingerprint=self.fingerprint,
            provenance={**self.provenance, "done": done},
            shared=self.recorders.shared,
            scores=self.recorders.scores,
        )

    def resume(self, checkpoint: Path) -> int:
        """Load a checkpoint of this very call; the number of prompts that it covers, 0 if there is none."""
        if not checkpoint.exists():
            return 0
        saved = Calibration.load(checkpoint)
        asked = json.loads(json.dumps({**self.provenance, "edges": self.schedule.edges}))
        found = {**saved.provenance, "edges": list(saved.edges)}
        done = int(found.pop("done", 0))
        differing = sorted(key for key in {*asked, *found} if asked.get(key) != found.get(key))
        if saved.fingerprint.mismatch(self.fingerprint):
            differing.append("model")
        if differing:
            raise CalibrationError(
                f"`checkpoint` {checkpoint} belongs to another calibration: not the same {', '.join(differing)}. "
                "Delete it, or name another file."
            )
        self.recorders.resume(saved)
        logger.info("resuming calibration from %s at prompt %d", checkpoint, done)
        return done
