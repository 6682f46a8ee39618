"""Flow matching: how far the sampler's noise levels are shifted for an image's size."""

from __future__ import annotations

from typing import Any


def shift_for(scheduler: Any, tokens: int, max_shift: float) -> float:
    """The scheduler's `mu` for that many image tokens.

    Args:
        scheduler: its configuration overrides the usual values.
        tokens: of the image, in the transformer.
        max_shift: the pipeline's own value at 4096 tokens.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # noqa: PLC0415  # needs transformers

    config = scheduler.config
    shift: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
    return shift
