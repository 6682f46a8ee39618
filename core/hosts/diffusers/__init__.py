"""The diffusers host: pipelines driven step by step, and the methods added to them."""

from .attach import attach, detach
from .export import Form, export_level
from .host import DiffusersHost, find_denoiser
from .pipelines import Size
from .timesteps import reader_for

__all__ = [
    "DiffusersHost",
    "Form",
    "Size",
    "attach",
    "detach",
    "export_level",
    "find_denoiser",
    "reader_for",
]
