"""Which level where: error table and allocation under a budget."""

from .allocate import Allocation, Candidate, allocate, register_strategy
from .best_levels import best_levels
from .probes import Probes
from .table import ErrorTable, measure_error_table

__all__ = [
    "Allocation",
    "Candidate",
    "ErrorTable",
    "Probes",
    "allocate",
    "best_levels",
    "measure_error_table",
    "register_strategy",
]
