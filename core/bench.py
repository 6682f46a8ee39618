"""`stageprune bench`: a full-size architecture by name, or a pipeline with a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .api import host_at
from .bundle import load_bundle
from .errors import StagePruneError
from .evaluation.benchmark import Benchmark, benchmark
from .evaluation.benchmark_image import ImageBenchmark, benchmark_image
from .groups import find_groups
from .host import Host
from .hosts.diffusers import Size
from .hosts.diffusers.bare import DenoiserHost
from .hosts.diffusers.fullsize import FULL_SIZE, random_bank
from .hosts.diffusers.load import load_pipeline, pick_device, pick_dtype

LEVELS = (0.0, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class BenchResult:
    """Timings of the levels, and of whole images if there was a pipeline and a schedule."""

    levels: Benchmark
    images: ImageBenchmark | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"levels": self.levels.to_dict(), "images": self.images.to_dict() if self.images else None}

    def __str__(self) -> str:
        return str(self.levels) + (f"\n{self.images}" if self.images else "")


def run_bench(
    target: str,
    bundle: Path | None = None,
    *,
    levels: Sequence[float] | None = None,
    batch: int = 4,
    rounds: int = 5,
    compile_blocks: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    size: Size | None = None,
) -> BenchResult:
    """Time dense against pruned.

    Args:
        target: a key of `FULL_SIZE` (random weights), or a pipeline.
        bundle: its bank and schedule; without one, a random bank, since speed does not depend on which units go.
        levels: sparsities to time; the bundle's, or 0, 0.2, 0.3, 0.5.
        batch: samples of a forward, and images of a run.
        rounds: measured rounds.
        compile_blocks: torch.compile the denoiser's blocks first.
        device: `auto` or a torch device.
        dtype: `float32`, `bfloat16` or `float16`.
        size: of a pipeline's images in pixels; what the bundle was made for, or the pipeline's own, by default.
    """
    loaded = load_bundle(bundle) if bundle is not None else None
    if target not in FULL_SIZE:
        pipe = load_pipeline(target, device, dtype)
        host: Host = host_at(pipe, size, None if loaded is None else loaded.bank)
    elif size is not None:
        raise StagePruneError(f"`size` goes with a pipeline; {target} is timed at {FULL_SIZE[target].pixels} pixels.")
    else:
        host = DenoiserHost(FULL_SIZE[target].build(pick_device(device), pick_dtype(dtype)))
    denoiser, calls = host.denoiser, host.input_size
    bank = loaded.bank if loaded is not None else random_bank(denoiser, levels or LEVELS, size=calls)
    chosen = list(levels if levels is not None else bank.sparsities)
    unknown = [level for level in chosen if level not in bank.sparsities]
    if unknown:
        have = ", ".join(f"{level:g}" for level in bank.sparsities)
        raise StagePruneError(f"--levels {unknown[0]:g}: the bundle's levels are {have}.")
    if compile_blocks:
        _compile_blocks(denoiser)
    timed = benchmark(
        denoiser, bank, host.tau_reader, sparsities=chosen, batch=batch, rounds=rounds, warmup=2, size=calls
    )
    if target in FULL_SIZE or loaded is None or loaded.schedule is None:
        return BenchResult(timed)
    prompts = host.default_prompts()
    images = benchmark_image(
        host,
        loaded,
        [prompts[index % len(prompts)] for index in range(batch)],
        steps=loaded.planned_steps or 20,
        guidance=(bank.provenance.get("calibration") or {}).get("guidance", 1.5),
        rounds=rounds,
    )
    return BenchResult(timed, images)


def _compile_blocks(denoiser: nn.Module) -> None:
    """Compile block by block: few graphs a level, and the switch stays outside of them."""
    for group in find_groups(denoiser):
        for path in group.blocks:
            denoiser.get_submodule(path).compile()
