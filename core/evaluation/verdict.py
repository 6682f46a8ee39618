"""The verdict in words, computed from the numbers: what the schedule costs and yields, and who wins on what."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .metrics import jackknife_error, standard_error
from .rows import COLUMNS, Column, Row

_COMPARED = ("accuracy", "frechet", "latent_mse", "ssim", "time_ratio")


def lead(rows: Sequence[Row]) -> str:
    """One sentence: the schedule's cost and quality beside the dense model's."""
    dense, ours = rows[0], rows[1]
    facts = []
    for key in ("accuracy", "frechet"):
        column = column_of(key)
        if column.value(ours) is not None:
            facts.append(f"{column.title} {column.bare(ours)} (dense {column.bare(dense)})")
    error, likeness = column_of("latent_mse").bare(ours), column_of("ssim").bare(ours)
    facts.append(f"latent MSE {error} and SSIM {likeness} against dense")
    return (
        f"At {ours.macs_share:.3f} of the dense MACs and {ours.time_ratio:.2f} of the dense time, the schedule has "
        f"{', '.join(facts)}."
    )


def comparisons(rows: Sequence[Row]) -> list[str]:
    """A sentence a metric: which of the rivals (all rows but dense) wins, and how clearly."""
    return [_compare(column_of(key), rows) for key in _COMPARED if column_of(key).value(rows[1]) is not None]


def column_of(key: str) -> Column:
    """The column of a metric."""
    return next(column for column in COLUMNS if column.key == key)


def _compare(column: Column, rows: Sequence[Row]) -> str:
    """`Latent MSE: dense, 13 steps is best (...); the schedule has ...`."""
    title = column.title[0].upper() + column.title[1:]
    ours, best = rows[1], column.best(rows)
    winners = [row for row in rows if row.name in best]
    if not winners:
        return f"{title}: no variant has a finite value."
    value = column.bare(winners[0])
    if len(winners) > 1:
        *others, last = (row.description for row in winners)
        names = f"{', '.join(others)} and {last}"
        rest = "" if ours in winners else f"; the schedule has {column.bare(ours)}"
        return f"{title}: {names} share the best value, {value}{rest}."
    rivals = [row for row in rows[1:] if row is not winners[0]]
    if winners[0] is ours:
        if not rivals:
            return f"{title}: {value}."
        second = next((row for row in rivals if row.name in column.best(rivals)), None)
        if second is None:
            return f"{title}: the schedule is best with {value}; no other variant has a finite value."
        next_best = f"{second.description} with {column.bare(second)}{_clearly(column, ours, second)}"
        return f"{title}: the schedule is best with {value}; next is {next_best}."
    how = _clearly(column, winners[0], ours)
    return f"{title}: {winners[0].description} is best with {value}; the schedule has {column.bare(ours)}{how}."


def _clearly(column: Column, one: Row, other: Row) -> str:
    """Whether a difference is more than its noise (two standard errors); nothing where one of them is not known."""
    if column.key == "accuracy":
        images = round(abs((one.accuracy or 0.0) - (other.accuracy or 0.0)) * len(one.latent_errors))
        return f" (a difference of {images} of {len(one.latent_errors)} images)"
    if column.key == "latent_mse":  # the same samples: the noise of the difference, not of each
        noise = standard_error(_differences(one.latent_errors, other.latent_errors))
    elif column.key == "frechet" and one.frechet_without_each:
        noise = jackknife_error(_differences(one.frechet_without_each, other.frechet_without_each))
    elif column.key == "time_ratio":
        apart = one.time_range[1] < other.time_range[0] or other.time_range[1] < one.time_range[0]
        return "" if apart else ", but the ranges of their rounds overlap"
    else:
        return ""
    first, second = column.value(one), column.value(other)
    assert first is not None and second is not None
    difference = abs(first - second)
    if not (math.isfinite(difference) and math.isfinite(noise)):
        return ""
    if difference <= 2 * noise:
        return f", but the difference is within the noise of {len(one.latent_errors)} samples"
    return f" (a difference of {difference / noise:.1f} standard errors)" if noise else ""


def _differences(one: Sequence[float], other: Sequence[float]) -> Tensor:
    return torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
