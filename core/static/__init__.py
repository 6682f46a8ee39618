"""Static sparse models: single weights become zeros, the same ones at every step; no levels, no stages."""

from .apply import Applied
from .kernels import KernelChoice
from .make import sparsify
from .methods import register_sparsifier, sparsifiers
from .model import SparseLayer, StaticModel

__all__ = [
    "Applied",
    "KernelChoice",
    "SparseLayer",
    "StaticModel",
    "register_sparsifier",
    "sparsifiers",
    "sparsify",
]
