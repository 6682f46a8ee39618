"""Steps and levels together: which noise levels to visit, and what to run there, under one budget."""

from .choose import Objective, Plan, objectives, plans
from .jumps import JumpTable, falling_taus, grid_points, measure_jumps
from .program import best_path
from .runs import Runs

__all__ = [
    "JumpTable",
    "Objective",
    "Plan",
    "Runs",
    "best_path",
    "falling_taus",
    "grid_points",
    "measure_jumps",
    "objectives",
    "plans",
]
