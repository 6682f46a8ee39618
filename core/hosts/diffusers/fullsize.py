"""Full-size architectures with random weights: true speed and memory without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ...bundle import load_bundle
from ...errors import StagePruneError
from ...evaluation.benchmark import Benchmark, benchmark
from ...groups import find_groups
from ...pruning import Bank, prune
from .bare import DenoiserHost
from .host import DiffusersHost
from .timesteps import reader_for


def dit_xl(device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """DiT-XL/2 at 256 x 256: 28 blocks, 16 heads of 72, 750 M parameters as diffusers builds it."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: nn.Module = DiTTransformer2DModel(sample_size=32, out_channels=8)
    model.to(dtype).eval()
    return model


FULL_SIZE: dict[str, Callable[..., nn.Module]] = {"dit-xl": dit_xl}


def random_bank(denoiser: nn.Module, levels: Sequence[float], multiple: int = 64) -> Bank:
    """A bank with a random order: for speed and memory, which do not depend on which units go."""
    return prune(DenoiserHost(denoiser), method="random", levels=levels, multiple=multiple)


def benchmark_target(
    name: str,
    bundle: Path | None,
    *,
    levels: Sequence[float],
    batch: int,
    rounds: int,
    compile_blocks: bool,
    load: Callable[[], Any],
    device: str,
    dtype: torch.dtype,
) -> Benchmark:
    """Benchmark a full-size architecture by name, or a pipeline's denoiser.

    Args:
        name: key of `FULL_SIZE`, or a pipeline.
        bundle: its bank; a random one at `levels` if None.
        levels: sparsities to time.
        batch: samples of a forward.
        rounds: measured rounds.
        compile_blocks: compile the denoiser's blocks first.
        load: loads the pipeline if `name` is one.
        device: for full-size architectures.
        dtype: for full-size architectures.
    """
    denoiser = FULL_SIZE[name](device, dtype) if name in FULL_SIZE else DiffusersHost(load()).denoiser
    bank = load_bundle(bundle).bank if bundle is not None else random_bank(denoiser, levels)
    unknown = [level for level in levels if bundle is not None and level not in bank.sparsities]
    if unknown:
        raise StagePruneError(
            f"--levels {unknown[0]:g}: the bundle's levels are {', '.join(map(str, bank.sparsities))}."
        )
    if compile_blocks:
        _compile_blocks(denoiser)
    return benchmark(denoiser, bank, reader_for(denoiser), sparsities=levels, batch=batch, rounds=rounds, warmup=2)


def _compile_blocks(denoiser: nn.Module) -> None:
    """Compile block by block: few graphs a level, and the switch stays outside of them."""
    for group in find_groups(denoiser):
        for path in group.blocks:
            denoiser.get_submodule(path).compile()
