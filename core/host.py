"""What a host implements. The engine reaches a model only through this protocol, so it knows neither diffusers nor
ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import StagePruneError

Prompt = int | str
"""A text, or a class label for class-conditional models."""

TauReader = Callable[[tuple[Any, ...], Mapping[str, Any]], float]
"""Reads the noise level from the arguments of a denoiser call. Small and copyable: it travels with the denoiser."""


@dataclass(frozen=True)
class InputSize:
    """What one denoiser call is given. Its cost depends on nothing else.

    Args:
        height: of the latents (before FLUX packs them).
        width: of the latents.
        text: tokens of text; None is what the family's pipelines give by default.
    """

    height: int
    width: int
    text: int | None = None

    def __str__(self) -> str:
        text = "" if self.text is None else f" and {self.text} text tokens"
        return f"latents of {self.height} x {self.width}{text}"


@dataclass(frozen=True)
class NoiseLevel:
    """What the denoiser's input is made of: x_t = signal * x_0 + noise * eps, eps of unit variance.

    Args:
        signal: sqrt(alpha_bar_t) for DDPM-like models, 1 - sigma for flow matching.
        noise: sqrt(1 - alpha_bar_t), or sigma.
    """

    signal: float
    noise: float

    @property
    def log_snr(self) -> float:
        """ln(signal^2 / noise^2): infinite for a clean image, minus infinite for pure noise (zero terminal SNR)."""
        if self.signal <= 0:
            return -math.inf
        return 2 * math.log(self.signal / self.noise) if self.noise > 0 else math.inf


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts: tensors whose first dimension is the prompt."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, part: slice) -> Conditions:
        return Conditions({name: tensor[part] for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class SamplerState:
    """A point on a sampling trajectory, complete: advancing from it gives the same result however often it is done.

    Args:
        index: number of denoiser calls made so far.
        latents: the noisy latents, shape (batch, ...).
        sampler: the host's own state (history of a multistep solver, say); never changed in place.
    """

    index: int
    latents: Tensor
    sampler: Any


class Host(Protocol):
    """A pipeline seen by the engine. Stateless: all of a run is in its `SamplerState`."""

    component: str
    """Name of the denoiser in its pipeline (`transformer`, `unet`)."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that is pruned."""

    @property
    def tau_reader(self) -> TauReader:
        """How to read the noise level from a call of the denoiser."""

    @property
    def input_size(self) -> InputSize | None:
        """What the sampler gives the denoiser in each call, for counting MACs. None is the family's default."""

    def taus(self, steps: int) -> list[float]:
        """Noise level of each call of the (guided) denoiser that the sampler makes for `steps`, in order."""

    def visiting(self, taus: Sequence[float] | None = None, *, first_order: bool = False) -> Host:
        """The same model and prompts, with a sampler that visits these noise levels, falling, and ends at no noise. Its
        runs take as many `steps`.

        Args:
            taus: of the calls; the sampler's own spacing by default.
            first_order: with a deterministic solver of first order, whose latents are `signal * x_0 + noise * eps` (see
                `NoiseLevel`), whatever the sampler's own solver is.

        Raises:
            ScheduleError: the noise levels do not fall, or the sampler cannot visit a list.
        """

    def noise_levels(self, taus: Sequence[float]) -> list[NoiseLevel]:
        """Signal and noise in the denoiser's input at each tau. They depend on the model's noise schedule alone, not on
        the steps that a sampler takes.
        """

    def target(self, samples: Tensor, noise: Tensor, tau: float) -> Tensor:
        """What the denoiser is trained to give for `signal * samples + noise * noise` at this tau (see `NoiseLevel`):
        the noise, the sample, or a velocity, in the latents' shape.
        """

    def default_prompts(self) -> list[Prompt]:
        """Prompts to use when the user gives none."""

    @property
    def default_guidance(self) -> float:
        """Guidance scale to use when the user gives none."""

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """Encode prompts once. ValueError names the first prompt that the model cannot take."""

    def start(self, seeds: Sequence[int], steps: int) -> SamplerState:
        """The state before the first call: noise, one seed a sample. A sampler that draws more noise on its way draws
        it from the same seeds.
        """

    def advance(self, state: SamplerState, conditions: Conditions, guidance: float, until: int) -> SamplerState:
        """Make denoiser calls until `until` of them are made. `state` itself stays valid."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], shape (batch, 3, height, width), float32 on the CPU."""

    def describe(self) -> dict[str, Any]:
        """Provenance in plain JSON values: model, component, sampler and its configuration."""


def check_prompts(prompts: Sequence[Prompt] | None) -> None:
    """Refuse a single text, which as a sequence is one of letters. Whoever takes prompts from a user calls this first.

    Raises:
        StagePruneError: it is one text.
    """
    if isinstance(prompts, str):
        raise StagePruneError(f"`prompts` must be a list of texts or class labels, got one str; give [{prompts!r}].")


@torch.no_grad()
def sample(
    host: Host,
    conditions: Conditions,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Final latents of whole trajectories, batch by batch.

    Args:
        host: the pipeline.
        conditions: one entry a sample.
        seeds: one seed a sample.
        steps: sampling steps.
        guidance: guidance scale.
        batch_size: samples that run together. It changes results by float rounding only.
        on_batch: called with the number of samples of each finished batch (for progress).
    """
    if len(conditions) != len(seeds):
        raise ValueError(f"one seed a sample: got {len(conditions)} conditions and {len(seeds)} seeds.")
    calls = len(host.taus(steps))
    parts = []
    for begin in range(0, len(seeds), batch_size):
        part = slice(begin, begin + batch_size)
        state = host.start(seeds[part], steps)
        parts.append(host.advance(state, conditions[part], guidance, calls).latents)
        if on_batch:
            on_batch(len(parts[-1]))
    return torch.cat(parts)
