"""Noise levels, stages, schedules and what they cost."""

from .budget import ExecutedCost, Target, executed_calls, executed_cost
from .schedule import Stage, StageSchedule

__all__ = ["ExecutedCost", "Stage", "StageSchedule", "Target", "executed_calls", "executed_cost"]
