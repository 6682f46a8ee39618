"""What a search minimises, and plans of steps are chosen by; importing this registers the fitnesses by name."""

from . import extras, images, judged, latents
from .base import FITNESS, Fitness, FitnessRequest, Measure, Outcome, fitness_of, register_fitness

__all__ = [
    "FITNESS",
    "Fitness",
    "FitnessRequest",
    "Measure",
    "Outcome",
    "extras",
    "fitness_of",
    "images",
    "judged",
    "latents",
    "register_fitness",
]
