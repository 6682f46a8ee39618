"""What each whole block does to what flows through it, and what the denoiser does without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups import Group
from ..groups.check import sliced
from ..groups.passing import passed, places_of
from .hessian import HessianRecorder


class BlockRecorder:
    """Sums scores of whole blocks while the denoiser runs.

    `drift` is the sum over samples of 1 - cos(out, in), each a block's streams flattened: Diff-ES's layerdrop
    (arXiv 2603.05105; the metric is its code's default). It costs next to nothing.
    `output` is the squared error of the denoiser's output when this block alone is skipped, relative to the output's
    square, summed over samples. It takes as many more calls of the denoiser as there are blocks.

    Args:
        denoiser: the denoiser.
        group: its whole blocks.
        stages: number of stages that are kept apart.
        skip: sum `output` too.
        hessians: records the same calls, but must not see those without a block.
    """

    def __init__(self, denoiser: nn.Module, group: Group, stages: int, skip: bool, hessians: HessianRecorder) -> None:
        self.denoiser = denoiser
        self.group = group
        self.skip = skip
        self.hessians = hessians
        names = ("drift", "output") if skip else ("drift",)
        self.scores = {f"{name}.{group.name}": torch.zeros(stages, group.size, dtype=torch.float64) for name in names}
        self.stage = 0
        self.alpha = 1.0
        self._skipping = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every call within the block."""
        with ExitStack() as stack:
            for index, path in enumerate(self.group.blocks):
                block = self.denoiser.get_submodule(path)
                places = places_of(block.forward, self.group.passes)

                def see(
                    _: nn.Module, args: Any, kwargs: Any, result: Any, index: int = index, places: Any = places
                ) -> None:
                    self._add_drift(index, passed(places, args, kwargs), result)

                stack.callback(block.register_forward_hook(see, with_kwargs=True).remove)
            if self.skip:
                stack.callback(self.denoiser.register_forward_hook(self._add_skips, with_kwargs=True).remove)
            yield

    def _add(self, statistic: str, index: int, values: Tensor) -> None:
        self.scores[f"{statistic}.{self.group.name}"][self.stage, index] += self.alpha * float(values.double().sum())

    def _add_drift(self, index: int, given: Any, result: Any) -> None:
        if self._skipping:
            return
        pairs = list(zip(_streams(given), _streams(result), strict=True))
        before, after = (
            torch.cat([pair[side].flatten(1).float() for pair in pairs if pair[1] is not None], 1) for side in (0, 1)
        )
        self._add("drift", index, 1 - F.cosine_similarity(after, before, dim=1))

    def _add_skips(self, denoiser: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Call the denoiser once more without each block."""
        if self._skipping:
            return
        dense, alpha = _output(result), self.hessians.alpha
        self._skipping, self.hessians.alpha = True, 0.0
        try:
            for index in range(self.group.size):
                stay = torch.tensor([other for other in range(self.group.size) if other != index])
                with sliced(denoiser, [self.group], {self.group.name: stay}):
                    error = (_output(denoiser(*args, **kwargs)) - dense).flatten(1).double().square().sum(1)
                self._add("output", index, error / dense.flatten(1).double().square().sum(1))
        finally:
            self._skipping, self.hessians.alpha = False, alpha


def _streams(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _output(result: Any) -> Tensor:
    """The denoiser's output, with or without its return class."""
    output: Tensor = result[0]
    return output
