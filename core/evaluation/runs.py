"""Running the variants: same seeds and prompts, in turn batch by batch, so that the machine's moods hit all alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import progress
from ..host import Conditions, Host, sample
from ..runtime import applied
from .benchmark import timed
from .variants import Variant


@dataclass(frozen=True)
class Job:
    """What all variants sample.

    Args:
        host: the pipeline, dense.
        conditions: encoded prompts, one a sample.
        seeds: one a sample.
        guidance: guidance scale.
        batch_size: samples that run together.
    """

    host: Host
    conditions: Conditions
    seeds: Sequence[int]
    guidance: float
    batch_size: int

    def first(self, count: int) -> Job:
        """The job's first samples only."""
        return Job(self.host, self.conditions[:count], self.seeds[:count], self.guidance, self.batch_size)

    @property
    def batches(self) -> list[slice]:
        """The samples of each batch."""
        size = self.batch_size
        return [slice(begin, min(begin + size, len(self.seeds))) for begin in range(0, len(self.seeds), size)]

    def sample(self, steps: int, part: slice, taus: Sequence[float] | None = None) -> Tensor:
        """Final latents of one batch, by whatever the denoiser is set to; at listed noise levels if there are any."""
        host = self.host if taus is None else self.host.visiting(taus)
        return sample(host, self.conditions[part], self.seeds[part], steps, self.guidance, self.batch_size)


@dataclass
class Run:
    """What a variant yielded.

    Args:
        variant: the variant.
        parts: final latents of each batch.
        seconds: denoising time an image, of each batch.
    """

    variant: Variant
    parts: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def latents(self) -> Tensor:
        """Final latents of all samples, shape (samples, ...)."""
        return torch.cat(self.parts)

    def time_ratios(self, dense: Run) -> list[float]:
        """Time over that of `dense`, round by round."""
        return [mine / other for mine, other in zip(self.seconds, dense.seconds, strict=True)]

    @property
    def median_seconds(self) -> float:
        """Denoising time an image, median over rounds."""
        return statistics.median(self.seconds)


def warm_up(job: Job, variants: Sequence[Variant]) -> None:
    """One step of every variant: first calls allocate memory and choose kernels, which should not be timed."""
    for variant in variants:
        with _running(job.host, variant):
            job.sample(1, job.batches[0])


def run_variants(job: Job, variants: Sequence[Variant]) -> list[Run]:
    """Sample every variant. A round is one batch, run by all of them in turn; attaching their banks is not timed."""
    runs = [Run(variant) for variant in variants]
    with progress.bar(len(variants) * len(job.seeds), "sampling variants", "image") as bar:
        for part in job.batches:
            for run in runs:
                _run_batch(job, run, part)
                bar.update(part.stop - part.start)
    return runs


def _run_batch(job: Job, run: Run, part: slice) -> None:
    with _running(job.host, run.variant):
        taus = run.variant.schedule.taus if run.variant.schedule is not None else None
        seconds = timed(lambda: run.parts.append(job.sample(run.variant.steps, part, taus)), job.host.denoiser)
    run.seconds.append(seconds / (part.stop - part.start))


@contextmanager
def _running(host: Host, variant: Variant) -> Iterator[None]:
    """The denoiser running a variant; truly dense, not a pruner's level 0, if it has no bank."""
    if variant.bank is None or variant.schedule is None:
        yield
        return
    with applied(host, variant.bank) as pruner:
        pruner.schedule = variant.schedule
        yield
