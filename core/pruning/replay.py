"""Single steps of dense trajectories, made again with other consumers: how much would that change the final sample?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BankError
from ..groups.layer import layer_at
from ..host import Host, Prompt, SamplerState
from .bank import Consumer
from .prefix import Prefix, blocks_of, room_on


class _Step(NamedTuple):
    """One denoiser call of a dense trajectory, guidance and the sampler's update included."""

    before: SamplerState
    after: Tensor
    prefix: Prefix


class Replay:
    """Steps of dense trajectories, at noise levels spread evenly over the sampler's.

    A step is made again from the dense state before it, so that its error is what the change itself costs: smooth in
    the number of units, and reliable with a handful of prompts, which the distance between whole trajectories is not.
    It is taken after guidance and the sampler's update. What it still means at the end differs from step to step, and
    is measured once, for one change (`weigh`). Blocks before the first change are not run again (see `prefix.py`).

    Args:
        host: the pipeline, dense.
        prompts: of the trajectories.
        seed: of the first; each prompt has the next one.
        steps: sampling steps.
        guidance: guidance scale.
        noise_levels: how many.

    Raises:
        BankError: there is nothing to replay, or it is not finite.
    """

    def __init__(
        self, host: Host, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float, noise_levels: int
    ) -> None:
        self.host = host
        self.guidance = guidance
        self.total = len(host.taus(steps))
        places = {int((place + 0.5) * self.total / noise_levels) for place in range(noise_levels)}
        self.conditions, state = host.encode(prompts), host.start(range(seed, seed + len(prompts)), steps)
        self.steps: list[_Step] = []
        blocks, room = blocks_of(host.denoiser), room_on(state.latents.device)
        for index in sorted(places):
            before = self._advance(state, index)
            prefix = Prefix(host.denoiser, blocks, room)
            with prefix.recording():
                state = self._advance(before, index + 1)
            room -= prefix.held
            self.steps.append(_Step(before, state.latents, prefix))
        self.final = self._advance(state, self.total).latents
        if not self.steps or not bool(torch.isfinite(self.final).all()):
            raise BankError("the dense denoiser's samples are not finite, so nothing can be compared with them.")
        self.weights = [1.0] * len(self.steps)

    def weigh(self, consumers: Mapping[str, Consumer]) -> None:
        """From here on, count each step by how much an error there still means at the end: make it with `consumers`,
        go on with the dense denoiser, and divide the squared error of the final sample by that of the step. A step that
        is not finite with them counts once.

        Args:
            consumers: as in `error`; of about the sparsity that is of interest.
        """
        self.weights = []
        for step in self.steps:
            state = self._remade(step, consumers)
            error = _squared(state.latents, step.after)
            final = _squared(self._advance(state, self.total).latents, self.final)
            known = math.isfinite(error) and math.isfinite(final)
            self.weights.append(1.0 if not known else final / error if error else 0.0)

    def error(self, consumers: Mapping[str, Consumer]) -> float:
        """Mean squared error of the final sample that these consumers would cause, if the errors of its steps were
        independent. Infinite if the samples are not finite.

        Args:
            consumers: path -> weight and bias in the dense layer's shape. A bias is left out where the layer has none.
        """
        errors = [_squared(self._remade(step, consumers).latents, step.after) for step in self.steps]
        weighted = sum(weight * error for weight, error in zip(self.weights, errors, strict=True))
        return weighted * self.total / len(self.steps) if math.isfinite(weighted) else math.inf

    def _remade(self, step: _Step, consumers: Mapping[str, Consumer]) -> SamplerState:
        """The state after a step that is made with these consumers."""
        with replaced(self.host.denoiser, consumers), step.prefix.resumed(consumers):
            return self._advance(step.before, step.before.index + 1)

    def _advance(self, state: SamplerState, until: int) -> SamplerState:
        return self.host.advance(state, self.conditions, self.guidance, until)


@contextmanager
def replaced(denoiser: nn.Module, consumers: Mapping[str, Consumer]) -> Iterator[None]:
    """Other weights in some layers for the length of a block; then the very tensors that were there before."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for path, consumer in consumers.items():
            layer = layer_at(denoiser, path)
            for parameter, tensor in ((layer.weight, consumer.weight), (layer.bias, consumer.bias)):
                if parameter is not None:
                    saved.append((parameter, parameter.data))
                    parameter.data = tensor.to(parameter)
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data


def _squared(latents: Tensor, reference: Tensor) -> float:
    return float((latents.double() - reference.double()).square().mean())
