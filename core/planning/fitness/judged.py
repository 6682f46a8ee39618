"""Set metrics, which go through a judge: are the images like real ones, and do they show what was asked for?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import FitnessError
from .base import Fitness, FitnessRequest, Outcome, register_fitness

if TYPE_CHECKING:
    from ...evaluation.judge import Judge


@register_fitness("frechet")
def frechet(request: FitnessRequest) -> Fitness:
    """Squared Frechet distance to the judge's real images.

    The probes' prompts must ask for what those show: the distance between images of other things says nothing of
    pruning. Few probes overstate it, and not all candidates' alike: with fewer than twice the judge's features (64)
    their order is partly chance.
    """
    from ...evaluation.judge import feature_statistics, frechet_distance  # noqa: PLC0415  (it builds on planning)

    judge = _judge_of(request, "frechet")

    def features(made: Outcome, _: Outcome) -> Tensor:
        return judge.features(made.images.to(judge.device))

    def distance(values: Tensor) -> float:
        return frechet_distance(*feature_statistics(values), judge.real_mean, judge.real_cov)

    return Fitness("frechet", features, distance, probes=2, paired=False)


@register_fitness("accuracy")
def accuracy(request: FitnessRequest) -> Fitness:
    """Share of images that do not show what was asked for. Coarse: many schedules share a value."""
    judge = _judge_of(request, "accuracy")

    def misses(made: Outcome, _: Outcome) -> Tensor:
        wanted = judge.wanted(made.prompts, made.conditions)
        if wanted is None:
            raise FitnessError(
                f"fitness 'accuracy': a judge of kind {judge.kind!r} cannot check prompts such as {made.prompts[0]!r}."
            )
        return 1 - judge.hits(made.images, wanted).double()

    return Fitness("accuracy", misses, floor=0.0, paired=False)


def _judge_of(request: FitnessRequest, name: str) -> Judge:
    if request.judge is None:
        raise FitnessError(
            f"fitness {name!r} needs a `judge`, a small network that scores images; the demo pipelines carry one in "
            "their folder `judge`. Give one, or take a paired fitness such as 'latent_mse'."
        )
    return request.judge
