"""Which level where: stages, error table, allocation under a budget, and evolutionary search."""

from . import strategies
from .allocate import allocate
from .allocation import Allocation, Candidate, Request, register_strategy
from .best_levels import best_levels
from .joint import JumpTable
from .mosaic import MosaicSettings
from .partitions import PARTITIONS, Stages, divide, register_partition
from .patterns import PATTERNS
from .probes import Probes
from .sampling import Sampling
from .search import (
    Fitness,
    Round,
    SearchResult,
    SearchSettings,
    register_fitness,
    search,
)
from .table import ErrorTable, TableOrigin, measure_error_table

__all__ = [
    "PARTITIONS",
    "PATTERNS",
    "Allocation",
    "Candidate",
    "ErrorTable",
    "Fitness",
    "JumpTable",
    "MosaicSettings",
    "Probes",
    "Request",
    "Round",
    "Sampling",
    "SearchResult",
    "SearchSettings",
    "Stages",
    "TableOrigin",
    "allocate",
    "best_levels",
    "divide",
    "measure_error_table",
    "register_fitness",
    "register_partition",
    "register_strategy",
    "search",
    "strategies",
]
