"""Which level where: stages, error table and allocation under a budget."""

from . import strategies
from .allocate import allocate
from .allocation import Allocation, Candidate, Request, register_strategy
from .best_levels import best_levels
from .mosaic import MosaicSettings
from .partitions import PARTITIONS, Stages, divide, register_partition
from .patterns import PATTERNS
from .probes import Probes
from .sampling import Sampling
from .table import ErrorTable, TableOrigin, measure_error_table

__all__ = [
    "PARTITIONS",
    "PATTERNS",
    "Allocation",
    "Candidate",
    "ErrorTable",
    "MosaicSettings",
    "Probes",
    "Request",
    "Sampling",
    "Stages",
    "TableOrigin",
    "allocate",
    "best_levels",
    "divide",
    "measure_error_table",
    "register_partition",
    "register_strategy",
    "strategies",
]
