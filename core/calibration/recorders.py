"""All that one calibration records: second moments of layers' inputs, and scores of whole blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import Tensor

from ..eager import eager
from ..errors import CalibrationError
from ..groups import Group, consumer_sites, find_groups, input_sites, layer_paths, width_groups
from ..groups.layer import layer_at, matrix_of
from ..host import Host
from .blocks import BlockRecorder
from .calibration import Calibration
from .hessian import HessianRecorder
from .packages import packages
from .taylor import TaylorRecorder

Layers = Literal["consumers", "all"]

INPUTS_PER_COLUMN = 24
"""Inputs that are summed for each column of a Hessian by default; what other shares do to the error is for
`python benchmarks/ablations.py --only tokens`.
"""


class Recorders:
    """What is asked for, recorded together.

    Args:
        host: the pipeline.
        stages: number of stages that are kept apart.
        kinds: unit kinds that will be pruned; `block` scores whole blocks.
        layers: whose inputs.
        skip_blocks: see `BlockRecorder`.
        taylor: threshold of a `TaylorRecorder`; none by default.
        tokens: share of each call's inputs that Hessians are summed over, drawn at random. None is as many as give
            each stage `INPUTS_PER_COLUMN` inputs a column.
        calls: unguided calls of one sample that will be made.

    Raises:
        CalibrationError: an argument is out of range.
    """

    def __init__(
        self,
        host: Host,
        stages: int,
        kinds: Sequence[str],
        layers: Layers,
        skip_blocks: bool,
        taylor: float | None = None,
        tokens: float | None = 1.0,
        calls: int = 1,
    ) -> None:
        if tokens is not None and not 0 < tokens <= 1:
            raise CalibrationError(f"`tokens` must be a share of each call's inputs in (0, 1], got {tokens}.")
        groups = _of_kinds(find_groups(host.denoiser), kinds)
        held = _held(host, width_groups(groups), layers)
        widths = {path: matrix_of(layer_at(host.denoiser, path)).shape[1] for path in dict.fromkeys(held.values())}
        self.stages = stages
        self.shared = {path: leader for path, leader in held.items() if path != leader}
        shares = _enough(host, widths, stages, calls) if tokens is None else dict.fromkeys(widths, tokens)
        self.hessians = HessianRecorder(host.denoiser, widths, stages, shares)
        whole = [group for group in groups if group.kind == "block"]
        if skip_blocks and not whole:
            raise CalibrationError('`skip_blocks` scores whole blocks: calibrate with `kinds` that hold "block".')
        self.blocks = [BlockRecorder(host.denoiser, group, stages, skip_blocks, self.hessians) for group in whole]
        if taylor is not None and not 0 <= taylor < 1:
            raise CalibrationError(f"`taylor` must be a share of the largest loss in [0, 1), got {taylor}.")
        widths_too = width_groups(groups) if taylor is not None else []
        self.taylor = [TaylorRecorder(host, widths_too, stages, taylor)] if taylor is not None and widths_too else []
        self._all: list[HessianRecorder | BlockRecorder | TaylorRecorder] = [self.hessians, *self.blocks, *self.taylor]

    def packages(self, budget: float | None) -> list[list[str]]:
        """Layers whose Hessians are summed together (see `packages`)."""
        return packages(self.hessians.widths, self.stages, budget)

    def begin(self, seed: int) -> None:
        """Trajectories follow, of a run with this seed."""
        self.hessians.begin(seed)

    def at(self, stage: int, alpha: float, tau: float) -> None:
        """The next calls belong to this stage and count this much."""
        for recorder in self._all:
            recorder.stage, recorder.alpha = stage, alpha
        for recorder in self.taylor:
            recorder.tau = tau

    def finish(self, samples: Tensor, seeds: Sequence[int]) -> None:
        """The trajectory has ended with these latents."""
        with eager():  # compiled graphs would not call these hooks
            for recorder in self.taylor:
                recorder.finish(samples, seeds)

    @contextmanager
    def recording(self, layers: Collection[str], scores: bool) -> Iterator[None]:
        """Record every call within the block.

        Args:
            layers: whose inputs.
            scores: of units and whole blocks too.
        """
        with ExitStack() as stack:
            stack.enter_context(eager())  # compiled graphs would not call these hooks
            stack.enter_context(self.hessians.recording(layers))
            for recorder in self._all[1:] if scores else ():
                stack.enter_context(recorder.recording())
            yield

    @property
    def sums(self) -> list[Tensor]:
        """Every table that is summed over prompts."""
        return [*self.hessians.hessians.values(), *self.hessians.rows.values(), *self.scores.values()]

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """Of units and whole blocks, as in `Calibration`."""
        scores: dict[str, Tensor] = {}
        for block in self.blocks:
            scores |= block.scores
        for taylor in self.taylor:
            scores |= taylor.scores
        return scores

    def resume(self, saved: Calibration) -> None:
        """Go on from these sums."""
        mine = {**self.hessians.hessians, **self.scores}
        for name, table in (*saved.hessians.items(), *saved.scores.items()):
            mine[name].copy_(table)
        for path, rows in saved.rows.items():
            self.hessians.rows[path].copy_(rows)


def _of_kinds(groups: Sequence[Group], kinds: Sequence[str]) -> list[Group]:
    present = {group.kind for group in groups}
    if not kinds or set(kinds) - present:
        raise CalibrationError(f"`kinds` must be some of {sorted(present)}, got {sorted(kinds)}.")
    return [group for group in groups if group.kind in kinds]


def _enough(host: Host, widths: Mapping[str, int], stages: int, calls: int) -> dict[str, float]:
    """Path -> share of a call's inputs that gives each stage `INPUTS_PER_COLUMN` of them a column."""
    sites = input_sites(host.denoiser, list(widths), host.input_size)
    needed = {path: INPUTS_PER_COLUMN * (columns + 1) * stages for path, columns in widths.items()}
    return {path: min(needed[path] / (sites[path].rows * calls), 1.0) for path in widths if path in sites}


def _held(host: Host, groups: Sequence[Group], layers: Layers) -> dict[str, str]:
    """Path of each layer whose input is asked for -> the layer under whose path its Hessian is summed."""
    if layers not in ("consumers", "all"):
        raise CalibrationError(f"`layers` must be 'consumers' or 'all', got {layers!r}.")
    consumers = {path: path for path in consumer_sites(groups)}
    if layers == "consumers":
        return consumers
    sites = input_sites(host.denoiser, layer_paths(groups), host.input_size)
    # What is read once a sample (the timestep's embedding) has too few different rows to learn from.
    return {path: site.leader for path, site in sites.items() if site.rows > 1} | consumers
