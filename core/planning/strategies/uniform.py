"""One level everywhere."""

from __future__ import annotations

from ..allocation import Allocation, Request, register_strategy


@register_strategy("uniform")
def uniform(request: Request) -> Allocation:
    """The one level, everywhere, that spends most of the budget."""
    return request.allocation("uniform", [request.budget.uniform_level()] * len(request.stages.stages))
