"""Running a schedule on a denoiser: staged Linears, the switch, and what it reports."""

from .applied import applied
from .pruner import StagePruner, known_bank, pruner_of, remember_bank, resident_bytes
from .summary import StageSummary, summarise

__all__ = [
    "StagePruner",
    "StageSummary",
    "applied",
    "known_bank",
    "pruner_of",
    "remember_bank",
    "resident_bytes",
    "summarise",
]
