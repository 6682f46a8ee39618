"""What differs between pipelines: one adapter a file. Importing this package registers them all."""

from . import dit, flux, sd, sd3, sdxl
from .adapter import PipelineAdapter, Sampler, adapter_for, find_adapter, register_pipeline
from .size import Pixels, Size, as_pixels

__all__ = [
    "PipelineAdapter",
    "Pixels",
    "Sampler",
    "Size",
    "adapter_for",
    "as_pixels",
    "dit",
    "find_adapter",
    "flux",
    "register_pipeline",
    "sd",
    "sd3",
    "sdxl",
]
