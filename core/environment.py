"""Versions and hardware: what a bug report or a figure needs beside it."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from .groups import families
from .version import __version__

PACKAGES = (
    "torch",
    "diffusers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "transformers",
    "peft",
    "torchmetrics",
)


def describe_environment() -> dict[str, str]:
    """Name -> value, in the order to print."""
    facts = {"stageprune": __version__, "python": platform.python_version(), "system": platform.platform()}
    facts |= {name: _version(name) for name in PACKAGES}
    facts["cpu"] = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    facts["families"] = ", ".join(f"{name} ({denoiser})" for denoiser, name in families().items())
    return facts


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the hardware behind a torch device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
