"""StagePrune: every sparsity level is a prefix of the same weights, every stage of the trajectory runs its own.

>>> import stageprune
>>> pipe.enable_stage_pruning("out/bundle")
>>> print(pipe.stage_pruning_summary())
>>> pipe.disable_stage_pruning()
"""

from .core.api import allocate, calibrate, evaluate, prune
from .core.api_search import compare, search
from .core.api_static import export, sparsify
from .core.bundle import Bundle, load_bundle
from .core.calibration import Calibration
from .core.errors import StagePruneError
from .core.evaluation import Judge, Report
from .core.groups import InputSize, check_slice_equals_mask, families, find_groups, register_family
from .core.hosts.diffusers.attach import (
    attach,
    detach,
    disable_stage_pruning,
    enable_stage_pruning,
    is_stage_pruning_enabled,
    stage_pruning_summary,
)
from .core.planning import (
    Allocation,
    Comparison,
    ErrorTable,
    Fitness,
    MosaicSettings,
    Round,
    SearchResult,
    SearchSettings,
    register_fitness,
)
from .core.pruning import Bank, methods, register_method
from .core.schedule import Stage, StageSchedule
from .core.static import StaticModel, register_sparsifier, sparsifiers
from .core.version import __version__

attach()

__all__ = [
    "Allocation",
    "Bank",
    "Bundle",
    "Calibration",
    "Comparison",
    "ErrorTable",
    "Fitness",
    "InputSize",
    "Judge",
    "MosaicSettings",
    "Report",
    "Round",
    "SearchResult",
    "SearchSettings",
    "Stage",
    "StagePruneError",
    "StageSchedule",
    "StaticModel",
    "__version__",
    "allocate",
    "attach",
    "calibrate",
    "check_slice_equals_mask",
    "compare",
    "detach",
    "disable_stage_pruning",
    "enable_stage_pruning",
    "evaluate",
    "export",
    "families",
    "find_groups",
    "is_stage_pruning_enabled",
    "load_bundle",
    "methods",
    "prune",
    "register_family",
    "register_fitness",
    "register_method",
    "register_sparsifier",
    "search",
    "sparsifiers",
    "sparsify",
    "stage_pruning_summary",
]
