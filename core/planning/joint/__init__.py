"""Steps and levels together: which noise levels to visit, and what to run there, under one budget."""

from .choose import BALANCED, PAIRED, STEPS, Objective, Plan, plans
from .jumps import JumpTable, grid_points, measure_jumps
from .program import best_path
from .runs import Runs

__all__ = [
    "BALANCED",
    "PAIRED",
    "STEPS",
    "JumpTable",
    "Objective",
    "Plan",
    "Runs",
    "best_path",
    "grid_points",
    "measure_jumps",
    "plans",
]
