"""Running a schedule on a denoiser: staged layers, the switch, and what it reports."""

from .applied import applied, uniform_on
from .memory import resident_bytes
from .pruner import Resident, StagePruner, known_bank, pruner_of, remember_bank
from .summary import StageSummary, summarise

__all__ = [
    "Resident",
    "StagePruner",
    "StageSummary",
    "applied",
    "known_bank",
    "pruner_of",
    "remember_bank",
    "resident_bytes",
    "summarise",
    "uniform_on",
]
