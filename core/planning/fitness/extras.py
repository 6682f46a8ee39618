"""Learned image metrics, each behind a library of the extra `iqa`. They download their weights when first used."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ...errors import FitnessError
from .base import Fitness, FitnessRequest, Outcome, register_fitness


@register_fitness("lpips")
def lpips(_: FitnessRequest) -> Fitness:
    """Learned perceptual distance to the dense model's image, by the library `lpips` with AlexNet's features."""
    model = _library("lpips", "lpips").LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(made: Outcome, dense: Outcome) -> Tensor:
        values: Tensor = model(made.images, dense.images, normalize=True)
        return values.flatten()

    return Fitness("lpips", distance, floor=0.0)


@register_fitness("iqa")
def iqa(request: FitnessRequest) -> Fitness:
    """Any metric of the library `pyiqa`, by name. `iqa:topiq_nr`, Diff-ES's objective for DiT, looks at the image
    alone; others compare it with the dense model's.
    """
    library = _library("pyiqa", "iqa")
    if request.argument not in library.list_models():
        raise FitnessError(
            f"fitness 'iqa' takes the name of a metric of pyiqa behind a colon, such as 'iqa:topiq_nr'; "
            f"got {request.argument!r}."
        )
    metric: Any = library.create_metric(request.argument)
    sign, paired = 1 if metric.lower_better else -1, metric.metric_mode == "FR"

    @torch.no_grad()
    def score(made: Outcome, dense: Outcome) -> Tensor:
        shown = (made, dense) if paired else (made,)
        values: Tensor = sign * metric(*(each.images.to(metric.device) for each in shown))
        return values.reshape(len(made.images))

    return Fitness(f"iqa:{request.argument}", score, paired=paired)


def _library(name: str, fitness: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise FitnessError(
            f"fitness {fitness!r} needs {name}, which is not installed: pip install 'stageprune[iqa]'."
        ) from None
