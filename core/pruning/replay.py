"""Dense denoiser calls, made again with other consumers: how much of the output do they change?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BankError
from ..groups.layer import layer_at
from ..host import Host, Prompt
from .bank import Consumer


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


class Replay:
    """Denoiser calls of dense trajectories, at noise levels spread evenly over the sampler's steps.

    The inputs stay the dense ones, so that an error is what the change itself costs: smooth in the number of units, and
    reliable with a handful of prompts, which the distance between whole trajectories is not.

    Args:
        host: the pipeline, dense.
        prompts: of the trajectories.
        seed: of the first; each prompt has the next one.
        steps: sampling steps.
        guidance: guidance scale; both passes count.
        noise_levels: how many.

    Raises:
        BankError: there is nothing to replay, or it is not finite.
    """

    def __init__(
        self, host: Host, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float, noise_levels: int
    ) -> None:
        self.denoiser = host.denoiser
        total = len(host.taus(steps))
        wanted = {int((place + 0.5) * total / noise_levels) for place in range(min(noise_levels, total))}
        conditions, state = host.encode(prompts), host.start(range(seed, seed + len(prompts)), steps)
        self.calls: list[_Call] = []
        for index in range(max(wanted, default=-1) + 1):
            with self._recording(index in wanted):
                state = host.advance(state, conditions, guidance, index + 1)
        if not self.calls or not all(bool(torch.isfinite(call.output).all()) for call in self.calls):
            raise BankError("the dense denoiser's output is not finite, so nothing can be compared with it.")

    def error(self, consumers: Mapping[str, Consumer]) -> float:
        """Squared change of the output over its squared size, mean of all calls.

        Args:
            consumers: path -> weight and bias in the dense layer's shape. A bias is left out where the layer has none.
        """
        with replaced(self.denoiser, consumers):
            return sum(self._change(call) for call in self.calls) / len(self.calls)

    def _change(self, call: _Call) -> float:
        output = self.denoiser(*call.args, **call.kwargs)[0]
        return float((output - call.output).double().square().sum() / call.output.double().square().sum())

    @contextmanager
    def _recording(self, on: bool) -> Iterator[None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append(_Call(_cloned(args), _cloned(kwargs), output[0].clone()))

        hook = self.denoiser.register_forward_hook(record, with_kwargs=True) if on else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()


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


def _cloned(value: Any) -> Any:
    """A copy that a sampler cannot write into."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _cloned(each) for name, each in value.items()}
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value
