"""Schedulers that visit listed noise levels, whatever their own spacing."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch

from ...errors import ScheduleError
from .noise import is_flow_matching

OWN_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings that choose noise levels by a formula, which a list replaces."""


def visiting(scheduler: Any, taus: Sequence[float]) -> Any:
    """A copy of a scheduler whose runs visit these noise levels, and end at no noise. Its class and solver stay.

    Args:
        scheduler: of diffusers: flow matching by Euler steps, DDIM, or any that takes `timesteps` itself.
        taus: in (0, 1], falling. A model with discrete timesteps runs the nearest ones.

    Raises:
        ScheduleError: the noise levels do not fall, or the scheduler cannot visit a list.

    Example:
        >>> pipe.scheduler = visiting(pipe.scheduler, [0.999, 0.8, 0.5, 0.25, 0.1])
        >>> images = pipe("a red circle", num_inference_steps=5).images
    """
    listed = original(scheduler)
    config = {name: False for name in OWN_SPACINGS if listed.config.get(name)}
    listed = type(listed).from_config({**listed.config, **config}) if config else copy.deepcopy(listed)
    timesteps = _timesteps(listed, taus)
    for name, function in _methods_for(listed).items():
        # An attribute of the instance: the class stays as it is, for saving and for the pipeline's own checks.
        wrapped = functools.wraps(getattr(type(listed), name))(function)
        setattr(listed, name, types.MethodType(wrapped, listed))
    listed.stageprune_timesteps = timesteps
    listed.stageprune_original = original(scheduler)
    return listed


def original(scheduler: Any) -> Any:
    """The scheduler that `visiting` was given; itself if it was not."""
    return getattr(scheduler, "stageprune_original", scheduler)


def is_listed(scheduler: Any) -> bool:
    """Whether `visiting` made it."""
    return original(scheduler) is not scheduler


def first_order(scheduler: Any) -> Any:
    """A deterministic solver of first order for the same model: x = signal x_0 + noise eps, from one call a step."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # noqa: PLC0415  # diffusers loads slowly

    config = original(scheduler).config
    if is_flow_matching(scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config({**config, "stochastic_sampling": False})
    plain = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
    return DDIMScheduler.from_config({**config, **plain})


def _timesteps(scheduler: Any, taus: Sequence[float]) -> tuple[float, ...]:
    """The scheduler's timesteps for these noise levels: whole ones unless it matches flows."""
    count = scheduler.config.num_train_timesteps
    timesteps = tuple(float(tau) * count for tau in taus)
    if not is_flow_matching(scheduler):
        timesteps = tuple(float(round(timestep)) for timestep in timesteps)
    falls = all(noisier > cleaner for noisier, cleaner in pairwise(timesteps))
    least = 0.0 if is_flow_matching(scheduler) else -1.0
    if not timesteps or not falls or not least < timesteps[-1] or not timesteps[0] <= count:
        raise ScheduleError(
            f"the noise levels of the steps must fall within (0, 1] and differ by a timestep of {count}, got "
            f"{[round(float(tau), 4) for tau in taus]}."
        )
    return timesteps


def _check_count(scheduler: Any, steps: int | None, options: Any) -> None:
    """ScheduleError if the pipeline was asked for another number of steps."""
    given = next((options[name] for name in ("timesteps", "sigmas") if options.get(name) is not None), None)
    asked = steps if steps is not None else None if given is None else len(given)
    count = len(scheduler.stageprune_timesteps)
    if asked != count:
        raise ScheduleError(
            f"this pipeline runs {count} listed noise levels, those of its bundle: call it with num_inference_steps="
            f"{count}, got {asked}. For other step counts disable stage pruning, or enable a schedule without steps."
        )


def _set_by_itself(self: Any, num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
    _check_count(self, num_inference_steps, options)
    type(self).set_timesteps(self, timesteps=[int(timestep) for timestep in self.stageprune_timesteps], device=device)


def _set_flow(self: Any, num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
    """As its own, but that no shift is applied: the list says where to be."""
    _check_count(self, num_inference_steps, options)
    self.num_inference_steps = len(self.stageprune_timesteps)
    self.timesteps = torch.tensor(self.stageprune_timesteps, dtype=torch.float32, device=device)
    sigmas = self.timesteps / self.config.num_train_timesteps
    self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    self._step_index = self._begin_index = None


def _set_flow_by_sigmas(
    self: Any, num_inference_steps: int | None = None, device: Any = None, mu: float | None = None, **options: Any
) -> None:
    """As its own, with other noise levels; a shift that the pipeline asks for has nothing to shift."""
    _check_count(self, num_inference_steps, options)
    type(self).set_timesteps(self, len(self.stageprune_timesteps), device=device)
    self.timesteps = torch.tensor(self.stageprune_timesteps, dtype=torch.float32, device=device)
    sigmas = self.timesteps.cpu() / self.config.num_train_timesteps
    self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])


def _set_ddim(self: Any, num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
    _check_count(self, num_inference_steps, options)
    self.num_inference_steps = len(self.stageprune_timesteps)
    self.timesteps = torch.tensor(self.stageprune_timesteps, dtype=torch.int64, device=device)


def _step_ddim(self: Any, model_output: Any, timestep: Any, *args: Any, **options: Any) -> Any:
    """DDIM's own step. It takes the next timestep for this one less `num_train_timesteps // num_inference_steps`."""
    timesteps = [*self.stageprune_timesteps, -1.0]
    place = timesteps.index(float(timestep))
    gap = int(timesteps[place] - timesteps[place + 1])
    self.num_inference_steps = Fraction(self.config.num_train_timesteps, gap)
    try:
        return type(self).step(self, model_output, timestep, *args, **options)
    finally:
        self.num_inference_steps = len(self.stageprune_timesteps)


_METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "FlowMatchEulerDiscreteScheduler": {"set_timesteps": _set_flow},
    "DDIMScheduler": {"set_timesteps": _set_ddim, "step": _step_ddim},
}
"""Class -> methods that make it visit a list. Others take `timesteps` themselves."""

BY_SIGMAS = ("DPMSolverMultistepScheduler",)
"""Classes that step along `sigmas`, whatever made them, when they match flows."""


def _methods_for(scheduler: Any) -> dict[str, Callable[..., Any]]:
    name = type(scheduler).__name__
    if name in _METHODS:
        return _METHODS[name]
    if name in BY_SIGMAS and is_flow_matching(scheduler):
        return {"set_timesteps": _set_flow_by_sigmas}
    if is_flow_matching(scheduler) or "timesteps" not in inspect.signature(type(scheduler).set_timesteps).parameters:
        raise ScheduleError(
            f"{name} cannot visit listed noise levels. Give the pipeline a DPMSolverMultistepScheduler, or a "
            "FlowMatchEulerDiscreteScheduler if its model matches flows; else a DDIMScheduler, or one that takes "
            "`timesteps`."
        )
    return {"set_timesteps": _set_by_itself}
