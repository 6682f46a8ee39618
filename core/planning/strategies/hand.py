"""Levels that the user gives."""

from __future__ import annotations

from ...errors import AllocationError
from ..allocation import Allocation, Request, register_strategy
from ..costs import TOLERANCE


@register_strategy("hand")
def hand(request: Request) -> Allocation:
    """The levels as given, if they are within the budget."""
    allocation = request.allocation("hand", request.stages.levels)
    budget = request.budget
    if allocation.spent > budget.target.share + TOLERANCE:
        raise AllocationError(
            f"the given `levels` are over the budget: over the {len(request.sampling.taus)} calls that the sampler "
            f"makes, the schedule {budget.unit.verb} {allocation.spent:.3f} of the dense {budget.unit.name}, and "
            f"`target` {budget.target} allows {budget.target.share:.3f}."
        )
    return allocation
