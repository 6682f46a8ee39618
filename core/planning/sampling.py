"""What is sampled while planning, and how: all of a run that does not depend on the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import AllocationError
from ..host import Host, Prompt, sample
from .mosaic import MosaicSettings, grid, scores

SAMPLES = 8
"""Dense samples that the mean square of the data is measured on."""

FRESH_APART = 100_000
"""Between the seeds of probes and those of fresh ones."""


@dataclass(frozen=True)
class Sampling:
    """A pipeline with its prompts, steps and guidance.

    Args:
        host: the pipeline, dense.
        prompts: of the probes.
        steps: sampling steps.
        guidance: guidance scale.
        seed: first probe seed; each prompt has the next one.
        batch_size: samples that run together.
        mosaic: parameters of MosaicDiff's closed form.
    """

    host: Host
    prompts: Sequence[Prompt]
    steps: int
    guidance: float
    seed: int = 10_000
    batch_size: int = 32
    mosaic: MosaicSettings = field(default_factory=MosaicSettings)

    def part(self, begin: int, end: int) -> Sampling:
        """Probes number `begin` to `end`, with their seeds."""
        return replace(self, prompts=self.prompts[begin:end], seed=self.seed + begin)

    def fresh(self, number: int) -> Sampling:
        """The same prompts with seeds of their own, another set for each `number` from 0 on."""
        return replace(self, seed=self.seed + (number + 1) * FRESH_APART)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of any number of samples, at most `batch_size` at once: decoders need more memory than denoisers."""
        return torch.cat([self.host.decode(part) for part in torch.split(latents, self.batch_size)])

    @cached_property
    def taus(self) -> list[float]:
        """Noise level of each denoiser call."""
        return self.host.taus(self.steps)

    @cached_property
    def mosaic_scores(self) -> list[float]:
        """MosaicDiff's score at tau = 0, 0.001, ... 0.999."""
        return scores(self.host.noise_levels(grid()), self._mean_square(), self.mosaic.snr_weight)

    def _mean_square(self) -> float:
        """Mean square of the data's values: as given, or of the pipeline's own latents (no data set is needed)."""
        if self.mosaic.mean_square is not None:
            return self.mosaic.mean_square
        prompts = list(self.prompts[:SAMPLES]) or self.host.default_prompts()[:SAMPLES]
        seeds = range(self.seed, self.seed + len(prompts))
        latents = sample(self.host, self.host.encode(prompts), seeds, self.steps, self.guidance, self.batch_size)
        value = float(latents.float().square().mean())
        if not 0 < value < float("inf"):
            raise AllocationError(
                f"the mean square of {len(prompts)} dense samples is {value}, so MosaicDiff's closed form says nothing "
                "about this pipeline; give `MosaicSettings(mean_square=...)`."
            )
        return value


def check_dense(latents: Tensor, guidance: float) -> None:
    """Refuse dense samples that are not finite: every distance to them is NaN, which says nothing of any schedule.

    Args:
        latents: final ones, shape (samples, ...).
        guidance: that they were made with.

    Raises:
        AllocationError: some are not finite.
    """
    broken = int((~latents.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise AllocationError(
            f"the dense denoiser's samples are not finite ({broken} of {len(latents)}, with `guidance` {guidance:g} in "
            f"{str(latents.dtype).removeprefix('torch.')}), so nothing can be compared with them. The bank is not to "
            "blame: use a usual `guidance`, or load the pipeline in float32 or bfloat16."
        )
