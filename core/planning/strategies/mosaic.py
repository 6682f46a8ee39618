"""MosaicDiff's allocation (arXiv 2510.11962)."""

from __future__ import annotations

from ..allocation import Allocation, Request, register_strategy
from ..mosaic import relative_sparsities
from ..snap import levels_for


@register_strategy("mosaic", stages="mosaic")
def mosaic(request: Request) -> Allocation:
    """Sparsities in proportion to 1 - mean score of each stage, scaled to the budget and snapped to levels within it.

    Unlike in the paper the budget is that of the steps which the sampler executes.
    """
    request.budget.uniform_level()  # says so if no level is cheap enough
    weights = relative_sparsities(request.sampling.mosaic_scores, request.stages)
    return request.allocation("mosaic", levels_for(weights, request.calls, request.budget.costs, request.limit))
