"""Which level where: stages, error table, allocation under a budget, and evolutionary search."""

from . import strategies
from .allocate import allocate
from .allocation import Allocation, Candidate, Request, register_strategy
from .best_levels import best_levels
from .compare import DEFAULT_STRATEGIES, DEFAULT_TARGETS, FEWER_STEPS, compare
from .comparison import Comparison, Point
from .joint import JumpTable
from .mosaic import MosaicSettings
from .partitions import PARTITIONS, Stages, divide, register_partition
from .patterns import PATTERNS
from .probes import Probes
from .sampling import Sampling
from .search import (
    Fitness,
    Generation,
    Round,
    SearchResult,
    SearchSettings,
    register_fitness,
    search,
)
from .table import ErrorTable, TableOrigin, measure_error_table

__all__ = [
    "DEFAULT_STRATEGIES",
    "DEFAULT_TARGETS",
    "FEWER_STEPS",
    "PARTITIONS",
    "PATTERNS",
    "Allocation",
    "Candidate",
    "Comparison",
    "ErrorTable",
    "Fitness",
    "Generation",
    "JumpTable",
    "MosaicSettings",
    "Point",
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
    "compare",
    "divide",
    "measure_error_table",
    "register_fitness",
    "register_partition",
    "register_strategy",
    "search",
    "strategies",
]
