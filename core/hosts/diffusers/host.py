"""A diffusers pipeline as a `Host`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ...errors import StagePruneError
from ...groups import families
from ...host import Conditions, InputSize, NoiseLevel, Prompt, SamplerState, TauReader, check_prompts
from .listed import first_order as first_order_solver
from .listed import visiting
from .noise import noise_levels, target
from .pipelines import PipelineAdapter, Sampler, Size, adapter_for, as_pixels, find_adapter
from .timesteps import TimestepReader, reader_for

ENCODED_TOGETHER = 32
"""Prompts that are encoded in one batch."""


class DiffusersHost:
    """Drives a pipeline step by step.

    Args:
        pipe: a `DiffusionPipeline` whose denoiser's family is supported.
        size: of the images, in pixels: a side, or (height, width). None is what the pipeline makes by itself.
        scheduler: to sample with; the pipeline's own by default.

    Raises:
        StagePruneError: no supported denoiser, or images of this size cannot be made.

    Example:
        >>> host = DiffusersHost(DiTPipeline.from_pretrained("demo/dit-digits"))
        >>> latents = sample(host, host.encode([3, 7]), seeds=[0, 1], steps=20, guidance=1.5)
        >>> images = host.decode(latents)
    """

    def __init__(self, pipe: Any, size: Size | None = None, scheduler: Any = None) -> None:
        self.pipe = pipe
        self._own_scheduler = scheduler
        self.component, self._denoiser = find_denoiser(pipe)
        self.size = None if size is None else as_pixels(size)
        if self.size is not None:
            self.adapter.check_size(pipe)

    @property
    def denoiser(self) -> nn.Module:
        """The transformer or UNet."""
        return self._denoiser

    @property
    def scheduler(self) -> Any:
        """What it samples with, its timesteps set or not."""
        return self.pipe.scheduler if self._own_scheduler is None else self._own_scheduler

    @property
    def adapter(self) -> PipelineAdapter:
        """How this pipeline class is driven."""
        return adapter_for(self.pipe, self.size)

    @property
    def tau_reader(self) -> TauReader:
        """Reader of the denoiser's timestep argument."""
        return self._reader

    @property
    def _reader(self) -> TimestepReader:
        return reader_for(self._denoiser, self.scheduler.config.num_train_timesteps)

    @property
    def input_size(self) -> InputSize | None:
        """What the pipeline gives the denoiser; None for a pipeline that has no adapter."""
        adapter = find_adapter(self.pipe, self.size)
        return None if adapter is None else adapter.input_size(self.pipe)

    def taus(self, steps: int) -> list[float]:
        """Noise level of every entry of the scheduler's timesteps. Solvers that call twice a step list both; guidance
        by a second call is listed once with its first.
        """
        reader, adapter = self._reader, self.adapter
        timesteps = self._scheduler(steps).timesteps
        return [reader((), {reader.argument: adapter.time_argument(self.pipe, timestep)}) for timestep in timesteps]

    def noise_levels(self, taus: Sequence[float]) -> list[NoiseLevel]:
        """Of the scheduler's noise schedule: DDPM-like, or flow matching, whose tau is sigma, shifted already."""
        return noise_levels(self.scheduler, taus)

    def target(self, samples: Tensor, noise: Tensor, tau: float) -> Tensor:
        """By the scheduler's `prediction_type`."""
        return target(self.scheduler, samples, noise, tau)

    def visiting(self, taus: Sequence[float] | None = None, *, first_order: bool = False) -> DiffusersHost:
        """The same pipeline, sampled at listed noise levels, by a solver of first order if asked."""
        scheduler = first_order_solver(self.scheduler) if first_order else self.scheduler
        return DiffusersHost(self.pipe, self.size, scheduler if taus is None else visiting(scheduler, taus))

    def default_prompts(self) -> list[Prompt]:
        """Prompts to use when the user gives none."""
        return self.adapter.default_prompts(self.pipe)

    @property
    def default_guidance(self) -> float:
        """The guidance that this pipeline's models are used with."""
        return self.adapter.default_guidance(self.pipe)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """Encode texts or class labels, a few at a time: text encoders are large."""
        check_prompts(prompts)
        if not prompts:
            raise StagePruneError("`prompts` is empty: give at least one text or class label.")
        parts = [
            self.adapter.encode(self.pipe, prompts[begin : begin + ENCODED_TOGETHER]).tensors
            for begin in range(0, len(prompts), ENCODED_TOGETHER)
        ]
        return Conditions({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def start(self, seeds: Sequence[int], steps: int) -> SamplerState:
        """Noise as `pipe(generator=[torch.Generator().manual_seed(s) for s in seeds])` draws it, and a fresh copy of
        the pipeline's scheduler, set to `steps`.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (len(seeds), *self.adapter.latent_shape(self.pipe))
        dtype = next(self._denoiser.parameters()).dtype
        noise: Tensor = randn_tensor(shape, generator=generators, device=self.pipe._execution_device, dtype=dtype)
        scheduler = self._scheduler(steps)
        return SamplerState(0, self.adapter.first_latents(self.pipe, scheduler, noise), Sampler(scheduler, generators))

    @torch.no_grad()
    def advance(self, state: SamplerState, conditions: Conditions, guidance: float, until: int) -> SamplerState:
        """Denoise until `until` calls are made. The scheduler is copied first, so `state` can be used again."""
        adapter, sampler, latents = self.adapter, state.sampler.copy(), state.latents
        for timestep in sampler.scheduler.timesteps[state.index : until]:
            latents = adapter.step(self.pipe, sampler, latents, timestep, conditions, guidance)
        return SamplerState(until, latents, sampler)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode to float32 images on the CPU."""
        return self.adapter.decode(self.pipe, latents).float().cpu()

    def describe(self) -> dict[str, Any]:
        """Model, component, size in pixels, scheduler and versions. Local folders are named by their last part only."""
        name = str(getattr(self.pipe.config, "_name_or_path", "") or "")
        scheduler, adapter = self.scheduler, find_adapter(self.pipe, self.size)
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        return {
            "pipeline": type(self.pipe).__name__,
            "model": Path(name).name if Path(name).exists() else name,
            "component": self.component,
            "size": None if adapter is None else list(adapter.pixels(self.pipe)),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {key: value for key, value in sorted(config.items()) if _is_plain(value)},
            "dtype": str(next(self._denoiser.parameters()).dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__},
        }

    def _scheduler(self, steps: int) -> Any:
        """A copy of the pipeline's scheduler, set to `steps`."""
        scheduler = copy.deepcopy(self.scheduler)
        self.adapter.set_timesteps(self.pipe, scheduler, steps)
        return scheduler


def find_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of the pipeline's denoiser: its one component whose family is supported."""
    known = set(families())
    components: dict[str, Any] = getattr(pipe, "components", {})
    found = [
        (name, module)
        for name, module in components.items()
        if isinstance(module, nn.Module) and any(cls.__name__ in known for cls in type(_unwrap(module)).__mro__)
    ]
    if len(found) != 1:
        modules = {name: type(m).__name__ for name, m in components.items() if isinstance(m, nn.Module)}
        raise StagePruneError(
            f"{type(pipe).__name__} must have exactly one denoiser of a supported class ({', '.join(sorted(known))}); "
            f"its modules are {modules}."
        )
    return found[0][0], _unwrap(found[0][1])


def _unwrap(module: nn.Module) -> nn.Module:
    """The module under torch.compile's wrapper, which is no ModelMixin."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
