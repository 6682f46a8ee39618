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
from ..host import Host, Prompt, check_prompts
from ..processes import Processes, Single, own_file
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
    tokens: float | None = None,
    hessian_budget: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    processes: Processes | None = None,
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
        tokens: share of each call's inputs that Hessians are summed over, drawn at random. None is as many as a Hessian
            needs, layer by layer: about 24 for each of its columns in each stage, all if there are fewer.
        hessian_budget: GiB of Hessians that are held where the denoiser is. What does not fit is summed in further runs
            over the same prompts. None is one run; on a GPU with too little room the sums are then held by the host,
            which is slow.
        seed: first seed.
        batch_size: prompts that run together.
        checkpoint: a file that is rewritten after each batch. If it exists and belongs to the same call, the run goes
            on from there, to the identical result. Each of several processes has its own beside it.
        processes: that share the prompts; this one alone by default.

    Raises:
        CalibrationError: no prompts, no such kind of unit or weight, too few data for the Hessians' rank, a budget that
            is too small, or a checkpoint of another call.
        StagePruneError: `prompts` is one text, or another process has ended.

    Example:
        >>> calibration = calibrate(host, prompts=[0, 1, 2, 3] * 8, steps=20, checkpoint="calibration.part")
    """
    check_prompts(prompts)
    if not prompts:
        raise CalibrationError("`prompts` is empty: give at least a few dozen prompts or class labels.")
    if steps < 1 or batch_size < 1:
        raise CalibrationError(f"`steps` and `batch_size` must be at least 1, got {steps} and {batch_size}.")
    schedule = _stages(stages)
    calls = len(prompts) * len(host.taus(steps))
    recorders = Recorders(host, len(schedule.stages), kinds, layers, skip_blocks, taylor, tokens, calls)
    packages = recorders.packages(hessian_budget)
    processes = processes or Single()
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
        "tokens": tokens,
        "hessian_budget": hessian_budget,
        "batch_size": batch_size,
    }
    fingerprint = Fingerprint.of(host.denoiser, list(consumer_sites(width_groups(find_groups(host.denoiser)))))
    run = _Run(host, recorders, schedule, weights, provenance, fingerprint, processes.part(len(prompts)))
    run.go(packages, own_file(Path(checkpoint), processes) if checkpoint is not None else None, processes.first)
    processes.sum(recorders.sums)
    result = run.result()
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
        share: range,
    ) -> None:
        self.host = host
        self.recorders = recorders
        self.schedule = schedule
        self.weights = weights
        self.provenance = provenance
        self.fingerprint = fingerprint
        self.share = share

    def go(self, packages: Sequence[Sequence[str]], checkpoint: Path | None, shown: bool) -> None:
        """Run this process's share of the prompts once for each package, from where the checkpoint ends."""
        done = self.resume(checkpoint) if checkpoint is not None else 0
        batch_size = self.provenance["batch_size"]
        work = [(package, begin) for package in packages for begin in self.share[::batch_size]]
        with progress.bar(len(self.share) * len(packages), "calibrating", "prompt", shown=shown) as bar:
            for number, (package, begin) in enumerate(work):
                prompts = range(begin, min(begin + batch_size, self.share.stop))
                if number >= done:
                    self.batch(prompts, package, scores=package is packages[0])
                    if checkpoint is not None:
                        self.result({"share": [self.share.start, self.share.stop], "done": number + 1}).save(checkpoint)
                bar.update(len(prompts))

    def batch(self, places: range, layers: Sequence[str], scores: bool) -> None:
        """Sample the prompts at these places, with the recorders on."""
        host, steps, guidance = self.host, self.provenance["steps"], self.provenance["guidance"]
        seeds = [self.provenance["seed"] + place for place in places]
        conditions = host.encode([self.provenance["prompts"][place] for place in places])
        state = host.start(seeds, steps)
        self.recorders.begin(self.provenance["seed"])
        with self.recorders.recording(layers, scores):
            for tau, weight in zip(host.taus(steps), self.weights, strict=True):
                self.recorders.at(self.schedule.stage_of(tau), weight, tau)
                state = host.advance(state, conditions, guidance, state.index + 1)
        if scores:
            self.recorders.finish(state.latents, seeds)

    def result(self, progress: Mapping[str, Any] | None = None) -> Calibration:
        """What has been accumulated; a checkpoint says how far."""
        return Calibration(
            hessians=self.recorders.hessians.hessians,
            rows=self.recorders.hessians.rows,
            edges=tuple(self.schedule.edges),
            fingerprint=self.fingerprint,
            provenance={**self.provenance, **(progress or {})},
            shared=self.recorders.shared,
            scores=self.recorders.scores,
        )

    def resume(self, checkpoint: Path) -> int:
        """Load a checkpoint of this very call; the number of batches that it covers, 0 if there is none."""
        if not checkpoint.exists():
            return 0
        saved = Calibration.load(checkpoint)
        asked = json.loads(json.dumps({**self.provenance, "edges": self.schedule.edges}))
        asked["share"] = [self.share.start, self.share.stop]
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
        logger.info("resuming calibration from %s after %d batches", checkpoint, done)
        return done
