"""Evolutionary search over the levels of all stages, on any fitness."""

from ..fitness import FITNESS, Fitness, Outcome, register_fitness
from .initial import INITIALS
from .result import Cost, Finalist, Generation, SearchResult
from .run import search
from .settings import Round, SearchSettings

__all__ = [
    "FITNESS",
    "INITIALS",
    "Cost",
    "Finalist",
    "Fitness",
    "Generation",
    "Outcome",
    "Round",
    "SearchResult",
    "SearchSettings",
    "register_fitness",
    "search",
]
