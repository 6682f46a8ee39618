"""Schedules that a choice of steps must not be worse than: made ready to run, and held to the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..errors import AllocationError
from ..pruning import Bank
from ..schedule import StageSchedule
from .costs import TOLERANCE, Budget
from .joint import falling_taus
from .sampling import Sampling

Calls = tuple[tuple[float, float], ...]
"""Noise level and sparsity of each call."""

_DIGITS = 6
"""Of noise levels: those that differ by less are one, as grids and samplers round."""


def rivals_within(
    rivals: Sequence[StageSchedule], budget: Budget, sampling: Sampling, bank: Bank
) -> tuple[StageSchedule, ...]:
    """The rivals with their steps listed.

    Args:
        rivals: with or without steps of their own.
        budget: that they must keep, within the tolerance that other strategies have.
        sampling: the dense run that the budget is a share of.
        bank: with their levels.

    Raises:
        AllocationError: one of them is too dear, or the sampler makes more than one call a step.
        ScheduleError: one of them has a level that the bank has not.
    """
    dense, allowed, found = len(sampling.taus), budget.target.share + TOLERANCE, []
    for number, rival in enumerate(rivals, 1):
        listed = _listed(rival, sampling, bank)
        spent = budget.share(listed, listed.taus or (), dense)
        if spent > allowed + 1e-9:
            raise AllocationError(
                f"`rivals`: number {number} of {len(rivals)} {budget.unit.verb} {spent:.4f} of the dense "
                f"{budget.unit.name} in {len(listed.taus or ())} steps, `target` {budget.target} allows {allowed:.4f}. "
                "Leave it out, or ask for a larger share."
            )
        found.append(listed)
    return tuple(found)


def calls_of(schedule: StageSchedule) -> Calls:
    """What a schedule with steps runs, however it is cut into stages."""
    levels = schedule.levels
    return tuple((round(tau, _DIGITS), levels[schedule.stage_of(tau)]) for tau in schedule.taus or ())


def _listed(rival: StageSchedule, sampling: Sampling, bank: Bank) -> StageSchedule:
    """With its steps, by default the sampler's own; cut where the bank's stages end; its levels named as the bank's."""
    inner = sorted({*rival.edges[1:-1], *bank.edges[1:-1]}, reverse=True)
    levels = []
    for high, low in pairwise([1.0, *inner, 0.0]):
        stage = rival.stages[rival.stage_of((high + low) / 2)]
        levels.append(bank.sparsities[bank.level_of(stage.sparsity)])
    taus = rival.taus or falling_taus(sampling.host, rival.planned_steps or sampling.steps)
    return StageSchedule.from_levels(levels, inner).with_taus(taus)
