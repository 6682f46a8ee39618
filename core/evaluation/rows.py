"""The report's table: one row a variant, one column a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One variant, measured.

    Args:
        name: `dense`, `schedule`, `uniform`, `magnitude` or `fewer steps`.
        description: the same for readers.
        steps: sampling steps.
        macs_share: executed MACs over those of the dense run at full steps.
        accuracy: share of images in which the judge sees what was asked for; None if it cannot tell.
        frechet: squared Fréchet distance to the real images in the judge's features; None without a judge.
        frechet_error: its standard error, by jackknife; None for fewer than 3 samples.
        frechet_without_each: it with each of the samples left out in turn; empty where there is no error.
        latent_mse: mean over samples of the squared error of the final latents against dense.
        latent_mse_error: standard error of that mean.
        image_mse: the same of the decoded images.
        psnr: mean over samples, in dB; infinite if any image equals its dense one.
        ssim: mean over samples.
        seconds: denoising time of an image, median over rounds.
        time_ratio: denoising time over that of the dense run in the same round, median over rounds.
        time_range: least and greatest of those ratios.
        latent_errors: latent squared error of each sample.
        broken: samples whose latents or images are not finite.
    """

    name: str
    description: str
    steps: int
    macs_share: float
    accuracy: float | None
    frechet: float | None
    frechet_error: float | None
    frechet_without_each: tuple[float, ...]
    latent_mse: float
    latent_mse_error: float
    image_mse: float
    psnr: float
    ssim: float
    seconds: float
    time_ratio: float
    time_range: tuple[float, float]
    latent_errors: tuple[float, ...]
    broken: int = 0


@dataclass(frozen=True)
class Column:
    """How a metric is shown, and which direction is better (None: not compared)."""

    key: str
    title: str
    show: Callable[[float], str]
    better: Literal["low", "high"] | None = None
    error: str | None = None  # the key of the standard error to show beside it

    def value(self, row: Row) -> float | None:
        """The metric of a row; None if it was not measured."""
        value: float | None = getattr(row, self.key)
        return value

    def bare(self, row: Row) -> str:
        """The metric as text, without its standard error."""
        value = self.value(row)
        if value is None:
            return "–"
        if math.isnan(value):
            return "not finite"
        return "∞" if math.isinf(value) else self.show(value)

    def cell(self, row: Row) -> str:
        """The metric as text, with its standard error where one is known."""
        error: float | None = getattr(row, self.error) if self.error else None
        return self.bare(row) + (f" ± {self.show(error)}" if error and math.isfinite(error) else "")

    def best(self, rows: Sequence[Row]) -> list[str]:
        """Names of the best of the rivals (all rows but dense); several if what is shown of them is equal, none if no
        value can be the best.
        """
        values = {
            row.name: value
            for row in rows
            if row.name != "dense" and (value := self.value(row)) is not None and self._may_be_best(value)
        }
        if self.better is None or not values:
            return []
        goal = min(values.values()) if self.better == "low" else max(values.values())
        return [name for name, value in values.items() if self.show(value) == self.show(goal)]

    def _may_be_best(self, value: float) -> bool:
        """Not NaN, which compares with nothing, nor the worst that there is, though all others be as bad. A PSNR may be
        infinite.
        """
        worst = math.inf if self.better == "low" else -math.inf
        return not math.isnan(value) and value != worst


def scientific(value: float) -> str:
    """Two digits after the point: `1.23e-03`; a plain 0 for an exact zero, and words for NaN."""
    if math.isnan(value):
        return "not finite"
    return "0" if value == 0 else f"{value:.2e}"


COLUMNS = (
    Column("macs_share", "MACs / dense", "{:.3f}".format),
    Column("accuracy", "accuracy", "{:.1%}".format, "high"),
    Column("frechet", "Fréchet distance", "{:.3f}".format, "low", "frechet_error"),
    Column("latent_mse", "latent MSE", scientific, "low", "latent_mse_error"),
    Column("image_mse", "image MSE", scientific, "low"),
    Column("psnr", "PSNR in dB", "{:.2f}".format, "high"),
    Column("ssim", "SSIM", "{:.4f}".format, "high"),
    Column("seconds", "s / image", "{:.3g}".format),
    Column("time_ratio", "time / dense", "{:.3f}".format, "low"),
)


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that some row has a value for."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]


def text_table(rows: Sequence[Row]) -> str:
    """The table in plain text; `*` marks the best rival."""
    columns = shown_columns(rows)
    lines = [["variant", *(column.title for column in columns)]]
    for row in rows:
        marks = ["*" if row.name in column.best(rows) else " " for column in columns]
        lines.append([row.description, *(c.cell(row) + mark for c, mark in zip(columns, marks, strict=True))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
