"""Diff-ES's fixed patterns (arXiv 2603.05105), each a strategy: `pattern:front` and so on."""

from __future__ import annotations

from ..allocation import Allocation, Request, Strategy, register_strategy
from ..patterns import PATTERNS, Pattern
from ..snap import levels_for


def strategy_of(name: str, pattern: Pattern) -> Strategy:
    """The strategy that gives the sparsities a shape: scaled to the budget, and snapped to levels within it."""

    def strategy(request: Request) -> Allocation:
        request.budget.uniform_level()  # says so if no level is cheap enough
        weights = pattern(len(request.stages.stages))
        return request.allocation(name, levels_for(weights, request.calls, request.budget.costs, request.limit))

    return strategy


for key, shape in PATTERNS.items():
    register_strategy(f"pattern:{key}")(strategy_of(f"pattern:{key}", shape))
