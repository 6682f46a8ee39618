"""What differs between pipelines: one adapter a file. Importing this package registers them all."""

from . import dit, flux, sd, sd3, sdxl
from .adapter import PipelineAdapter, Sampler, adapter_for, register_pipeline

__all__ = ["PipelineAdapter", "Sampler", "adapter_for", "dit", "flux", "register_pipeline", "sd", "sd3", "sdxl"]
