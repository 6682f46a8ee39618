"""Pictures of how a schedule was found: strategies side by side, and the course of a search."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..planning import FEWER_STEPS, Comparison, Generation
from .pictures import figure_of, png_of, without_frame

_STYLES = {
    FEWER_STEPS: ("#7f7f7f", "s--"),
    "steps": ("#dd8452", "s-"),
    "uniform": ("#8172b3", "o-"),
    "measured": ("#4c72b0", "o-"),
    "joint": ("#c44e52", "o-"),
}
"""Strategy -> colour and marker; others follow matplotlib's cycle."""


def comparison_picture(comparison: Comparison) -> bytes:
    """Error against cost, a line a strategy, with standard errors; the dense run as a star."""
    figure = figure_of(8.4, 4.6)
    axes = figure.add_subplot()
    for name in dict.fromkeys(point.strategy for point in comparison.points):
        points = sorted((each for each in comparison.points if each.strategy == name), key=lambda each: each.spent)
        colour, style = _STYLES.get(name, (None, "x:"))
        axes.errorbar(
            [point.spent for point in points],
            [point.error for point in points],
            [point.standard_error for point in points],
            color=colour,
            fmt=style,
            markersize=5,
            linewidth=2 if name == "joint" else 1.2,
            capsize=2,
            label=name,
        )
    if comparison.dense > 0:
        axes.plot(1.0, comparison.dense, "k*", markersize=13, label=f"dense, {comparison.steps} steps")
    if min(point.error for point in comparison.points) > 0:  # signal-to-noise ratios are not
        axes.set_yscale("log")
    axes.set(
        xlabel=f"{comparison.unit} / dense run of {comparison.steps} steps",
        ylabel=f"{comparison.fitness} against {comparison.reference_steps} dense steps",
    )
    axes.grid(visible=True, which="both", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    without_frame(axes)
    return png_of(figure)


def search_picture(history: Sequence[Generation], fitness: str) -> bytes:
    """Best and median survivor over the denoiser steps that were spent."""
    figure = figure_of(8.4, 3.0)
    axes = figure.add_subplot()
    steps = [generation.steps for generation in history]
    axes.step(steps, [generation.best for generation in history], where="post", color="#c44e52", label="best", lw=2)
    medians = [statistics.median(generation.fitness) for generation in history]
    axes.step(steps, medians, where="post", color="#4c72b0", label="median survivor", lw=1.2)
    if min(generation.best for generation in history) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="denoiser steps of all candidates", ylabel=fitness)
    axes.legend(frameon=False, fontsize=9)
    without_frame(axes)
    return png_of(figure)
