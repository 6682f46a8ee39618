"""What a plan is made with unless the user says otherwise: the calibration's own prompts, steps and guidance, and the
bank's own stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AllocationError
from ..host import Host, Prompt, check_prompts
from ..pruning import Bank
from ..schedule import StageSchedule
from .mosaic import MosaicSettings
from .partitions import Stages, divide
from .sampling import Sampling

DEFAULT_PROBES = 64
"""How many of the calibration's prompts are used if none are given; a user's own are all used."""

DEFAULT_TARGET = "macs:0.67"


def sampling_for(
    host: Host,
    bank: Bank,
    *,
    prompts: Sequence[Prompt] | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch_size: int,
    mosaic: MosaicSettings | None,
) -> Sampling:
    """What is sampled, as asked for or as the bank's calibration was.

    Raises:
        AllocationError: there are no steps, or no samples in a batch.
        StagePruneError: `prompts` is one text.
    """
    check_prompts(prompts)
    made: Mapping[str, Any] = bank.provenance.get("calibration") or {}
    steps = steps if steps is not None else made.get("steps", 25)
    guidance = guidance if guidance is not None else made.get("guidance", host.default_guidance)
    prompts = list(prompts if prompts is not None else made.get("prompts", [])[:DEFAULT_PROBES])
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise AllocationError(f"`{name}` must be at least 1, got {value}.")
    return Sampling(host, prompts, steps, guidance, seed, batch_size, mosaic or MosaicSettings())


def partition_for(
    sampling: Sampling,
    bank: Bank,
    stages: Stages | None,
    empty: str | None,
    default: Stages = "equal-tau",
    levels: Sequence[float] | None = None,
) -> StageSchedule:
    """The stages that were asked for; those of a bank that distinguishes stages; one a level given by hand; or the
    default ones, of which those that no step visits are left out.
    """
    if stages is None and bank.stages > 1:
        stages = bank.edges[1:-1]
    elif stages is None and levels is not None:
        stages = len(levels)
    if stages is not None:
        return divide(stages, sampling, levels, empty or "refuse")
    return divide(default, sampling, empty=empty or "merge")
