"""First-order scores of units: by how much the denoising loss would change without each, to first order.

Diff-Pruning (Fang et al., arXiv 2305.10924, "Taylor expansion over pruned timesteps") scores weights by |w dL/dw|, L
the denoising loss summed over the timesteps whose own loss is at least a share of the largest: the others tell little,
and their gradients are noise. Its code adds up signed gradients over a batch and all its timesteps, takes absolute
values weight by weight, and needs a data set. Here they are taken unit by unit, for each sample and step: a sum over
the weights that read the unit, which equals the sum of x dL/dx over its activations x, so that no weight needs a
gradient. The data are the pipeline's own samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..groups import Group, consumer_sites
from ..groups.layer import layer_at
from ..host import Host

THRESHOLD = 0.05
"""Diff-Pruning's: steps with less than this share of the largest loss do not count."""

SEED_SHIFT = 1 << 32
"""The noise that is added back must not be the one that the trajectory began with."""


@dataclass(frozen=True)
class _Call:
    """A call of the denoiser on the trajectory: what it was given, and where."""

    tau: float
    stage: int
    alpha: float
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class TaylorRecorder:
    """Sums first-order scores along a pipeline's own samples: noise is added to what it made, at its own noise levels.

    Each call is repeated once with gradients, which takes the memory of all activations.

    Args:
        host: the pipeline.
        groups: whose units are scored.
        stages: number of stages that are kept apart. The threshold looks at each by itself.
        threshold: least share of a stage's largest loss that counts.
    """

    def __init__(self, host: Host, groups: Sequence[Group], stages: int, threshold: float) -> None:
        self.host = host
        self.groups = groups
        self.threshold = threshold
        self.scores = {f"taylor.{g.name}": torch.zeros(stages, g.size, dtype=torch.float64) for g in groups}
        self.stage = 0
        self.alpha = 1.0
        self.tau = 1.0
        self._calls: list[_Call] = []
        self._latents = next(iter(inspect.signature(host.denoiser.forward).parameters))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the first call at each noise level within the block."""
        self._calls = []

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.alpha and (not self._calls or self._calls[-1].tau != self.tau):
                self._calls.append(_Call(self.tau, self.stage, self.alpha, args, dict(kwargs)))

        hook = self.host.denoiser.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def finish(self, samples: Tensor, seeds: Sequence[int]) -> None:
        """Score the calls that were remembered.

        Args:
            samples: the latents that the trajectory ended with, shape (batch, ...).
            seeds: one a sample; the noise follows from them.
        """
        generators = [torch.Generator().manual_seed(seed + SEED_SHIFT) for seed in seeds]
        done = []
        for call in self._calls:
            drawn = [torch.randn(samples.shape[1:], generator=generator) for generator in generators]
            done.append((call, *self._score(call, samples, torch.stack(drawn).to(samples))))
        self._calls = []
        for call, loss, scores in done:
            if loss >= self.threshold * max(other for same, other, _ in done if same.stage == call.stage):
                for name, values in scores.items():
                    self.scores[name][call.stage] += call.alpha * values

    def _score(self, call: _Call, samples: Tensor, noise: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Loss of one call on noised samples, and the scores of every group's units, shape (units,)."""
        level = self.host.noise_levels([call.tau])[0]
        noisy = (level.signal * samples + level.noise * noise).to(samples)
        target = self.host.target(samples, noise, call.tau)
        seen: dict[str, Tensor] = {}
        with torch.enable_grad(), self._seeing(seen):
            output = self._run(call, noisy)[:, : target.shape[1]]  # the rest is a learned variance
            errors = (output.float() - _repeated(target, len(output)).float()).square().flatten(1).mean(1)
            grads = torch.autograd.grad(errors.sum(), list(seen.values()), allow_unused=True)
        effects = {path: x.detach() * g for (path, x), g in zip(seen.items(), grads, strict=True) if g is not None}
        return float(errors.detach().mean()), {f"taylor.{g.name}": _units(g, effects) for g in self.groups}

    def _run(self, call: _Call, noisy: Tensor) -> Tensor:
        """The call with other latents."""
        args, kwargs = list(call.args), dict(call.kwargs)
        given: Tensor = kwargs[self._latents] if self._latents in kwargs else args[0]
        latents = _repeated(noisy, len(given)).to(given).requires_grad_()
        if self._latents in kwargs:
            kwargs[self._latents] = latents
        else:
            args[0] = latents
        output: Tensor = self.host.denoiser(*args, **kwargs)[0]
        return output

    @contextmanager
    def _seeing(self, seen: dict[str, Tensor]) -> Iterator[None]:
        """Keep the input of every consumer."""
        with ExitStack() as stack:
            for path in consumer_sites(self.groups):
                layer = layer_at(self.host.denoiser, path)
                hook = layer.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
                stack.callback(hook.remove)
            yield


def _repeated(values: Tensor, count: int) -> Tensor:
    """Once more for each pass of guidance in the batch."""
    return torch.cat([values] * (count // len(values)))


def _units(group: Group, effects: Mapping[str, Tensor]) -> Tensor:
    """Sum over samples of |sum of x dL/dx| of each unit, over all that reads it, shape (units,)."""
    total: Tensor | None = None
    for consumer in group.consumers:
        if consumer.path not in effects:
            continue  # nothing of it reaches the output: the text of a last block, say
        effect = effects[consumer.path].double()
        # Channels are last for a Linear, second for a convolution.
        channels = effect.flatten(2).sum(2) if effect.ndim == 4 else effect.flatten(1, -2).sum(1)
        mine = channels[:, consumer.offset : consumer.offset + group.channels].reshape(-1, group.size, group.width)
        total = mine.sum(2) if total is None else total + mine.sum(2)
    return torch.zeros(group.size, dtype=torch.float64) if total is None else total.abs().sum(0).cpu()
