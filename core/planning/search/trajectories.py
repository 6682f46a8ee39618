"""Running candidates: each begins where it departs from what was run before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from ...host import SamplerState
from ..allocation import Request
from ..fitness import Outcome
from ..sampling import Sampling, check_dense
from .footprint import footprint
from .probes import Block
from .space import Genome
from .trie import Key, StateTrie


class Segment(NamedTuple):
    """Consecutive denoiser calls in one stage.

    Args:
        stage: its index.
        until: calls made at its end.
    """

    stage: int
    until: int


class Trajectories:
    """Candidates on the probes of some blocks.

    The state after a segment depends on the levels of the segments so far and on nothing else: a host's states are
    complete, generators of a stochastic sampler included (`copies_hold` checks it). So states are kept under these
    levels, and the next candidate starts from the longest prefix that it shares. Segments, not stages, are what counts:
    a sampler whose noise level does not fall all the way visits a stage twice.

    A denoiser step, here and in all counts of a search, is one call of the denoiser for one probe, guidance included.

    Args:
        request: pipeline, bank and stages, and a pruner with every level resident.
        blocks: the probes.
        memory: bytes of states to keep; 0 shares none.

    Raises:
        AllocationError: the dense samples are not finite.
    """

    def __init__(self, request: Request, blocks: Sequence[Block], memory: int) -> None:
        self.request, self.blocks = request, blocks
        self.segments = segments_of(request)
        self.steps = self.shared = self.repeated = 0
        self._sizes: list[list[int]] = [[] for _ in blocks]
        self.trie = StateTrie(memory, self._size)
        self.dense = [self.run(index, (0,) * len(request.stages.stages)) for index in range(len(blocks))]
        for outcome in self.dense:
            check_dense(outcome.latents, request.sampling.guidance)

    def run(self, index: int, genome: Genome) -> Outcome:
        """What a genome makes of a block of probes, and count what it takes.

        Args:
            index: of the block.
            genome: a level for each stage.
        """
        block, path, request = self.blocks[index], self._path(genome), self.request
        known, begin = self._begin(index, path)
        state = self.trie.state((index, path[:begin])) if begin else None
        state = state or block.start
        self._count(index, known, begin)
        request.pruner.schedule = request.stages.with_levels([request.bank.sparsities[level] for level in genome])
        try:
            for length, segment in enumerate(self.segments[begin:], begin + 1):
                state = request.sampling.host.advance(state, block.conditions, request.sampling.guidance, segment.until)
                if length < len(self.segments):
                    self._keep((index, path[:length]), state, new=length > known)
            self.trie.use(index, path)
        finally:
            request.pruner.schedule = request.stages.with_levels([0.0] * len(genome))
        return Outcome(state.latents, block.prompts, block.conditions, request.sampling.decode)

    def pretend(self, index: int, genome: Genome) -> None:
        """Count what `run` would, and note the states that it would leave, which are in another process."""
        path = self._path(genome)
        known = self.trie.longest(index, path[:-1])
        self._count(index, known, known)
        for length in range(known + 1, len(path)):
            self.trie.put((index, path[:length]), None)
        self.trie.use(index, path)

    def full(self, index: int) -> int:
        """Denoiser steps of a block from the start."""
        return self.segments[-1].until * len(self.blocks[index])

    def _path(self, genome: Genome) -> Genome:
        return tuple(genome[segment.stage] for segment in self.segments)

    def _begin(self, index: int, path: Genome) -> tuple[int, int]:
        """Segments whose result is known, and those whose result is here: fewer, if states were lost."""
        known = begin = self.trie.longest(index, path[:-1])
        while begin and self.trie.state((index, path[:begin])) is None:
            begin -= 1
        return known, begin

    def _count(self, index: int, known: int, begin: int) -> None:
        done, here = (self.segments[length - 1].until if length else 0 for length in (known, begin))
        probes = len(self.blocks[index])
        self.steps += (self.segments[-1].until - done) * probes
        self.shared += done * probes
        self.repeated += (done - here) * probes

    def _keep(self, key: Key, state: SamplerState, new: bool) -> None:
        block, path = key
        if len(self._sizes[block]) < len(path):  # the dense run, which comes first
            self._sizes[block].append(footprint(state))
        if new:
            self.trie.put(key, state)
        else:
            self.trie.restore(key, state)

    def _size(self, key: Key) -> int:
        """All states at one place of one block are of one size."""
        block, path = key
        return self._sizes[block][len(path) - 1]


def segments_of(request: Request) -> list[Segment]:
    """The run, cut where the stage changes."""
    visited = [request.stages.stage_of(tau) for tau in request.sampling.taus]
    segments: list[Segment] = []
    for stage, calls in groupby(visited):
        before = segments[-1].until if segments else 0
        segments.append(Segment(stage, before + len(list(calls))))
    return segments


def copies_hold(sampling: Sampling, block: Block) -> tuple[bool, int]:
    """Whether a state that is used twice gives the same result twice, bit for bit, and as an uninterrupted run does.

    A sampler that draws noise from somewhere else than its state fails: its candidates must not share states.

    Returns:
        Whether it holds, and the denoiser steps that it took to find out.

    Raises:
        AllocationError: the sample is not finite, so that it could not be told: NaN equals nothing.
    """
    host, calls = sampling.host, len(sampling.taus)
    conditions, start = block.conditions[:1], host.start([sampling.seed], sampling.steps)

    def finish(state: SamplerState) -> SamplerState:
        return host.advance(state, conditions, sampling.guidance, calls)

    middle = host.advance(start, conditions, sampling.guidance, calls // 2)
    whole, *others = [finish(state).latents for state in (start, start, middle, middle)]
    check_dense(whole, sampling.guidance)
    rest = calls - calls // 2
    return all(torch.equal(whole, other) for other in others), 2 * calls + calls // 2 + 2 * rest
