"""The diffusers host: pipelines driven step by step, and the methods added to them."""

from .attach import attach, detach
from .host import DiffusersHost, find_denoiser
from .pipelines import Size
from .timesteps import reader_for

__all__ = ["DiffusersHost", "Size", "attach", "detach", "find_denoiser", "reader_for"]
