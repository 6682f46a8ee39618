"""Probes of a search, in blocks that always run together: a candidate's result then never depends on how it came to be
run, on how many rounds it took or on whether the search was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...host import Conditions, Prompt, SamplerState
from ..sampling import Sampling


@dataclass(frozen=True)
class Block:
    """Some probes.

    Args:
        prompts: one a probe.
        conditions: the prompts, encoded.
        start: before the first denoiser call.
    """

    prompts: tuple[Prompt, ...]
    conditions: Conditions
    start: SamplerState

    def __len__(self) -> int:
        return len(self.prompts)


def blocks_of(sampling: Sampling, cuts: Sequence[int] = ()) -> list[Block]:
    """The probes of a run, at most `batch_size` together.

    Args:
        sampling: prompts, and the seed of the first.
        cuts: numbers of probes after which a block must end: those of a search's rounds.
    """
    blocks = []
    for begin, end in pairwise(sorted({0, *cuts, len(sampling.prompts)})):
        for first in range(begin, end, sampling.batch_size):
            prompts = tuple(sampling.prompts[first : min(first + sampling.batch_size, end)])
            seeds = range(sampling.seed + first, sampling.seed + first + len(prompts))
            start = sampling.host.start(seeds, sampling.steps)
            blocks.append(Block(prompts, sampling.host.encode(prompts), start))
    return blocks


def split(sampling: Sampling) -> tuple[Sampling, Sampling]:
    """Search probes and held-out probes: the first half of the prompts and seeds, and the rest."""
    half = len(sampling.prompts) // 2
    return (
        replace(sampling, prompts=sampling.prompts[:half]),
        replace(sampling, prompts=sampling.prompts[half:], seed=sampling.seed + half),
    )
