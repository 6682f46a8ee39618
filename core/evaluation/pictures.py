"""The report's pictures as PNG bytes, through matplotlib's Figure objects (no pyplot, so no global state)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..planning import ErrorTable
from ..schedule import StageSchedule
from .curve import CurvePoint
from .extras import report_extra
from .scores import Pictures
from .variants import FEWER_STEPS, MAGNITUDE, SCHEDULE, UNIFORM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 96
"""Side of a picture in the grid, in pixels."""

_GAP, _GROUP_GAP, _LABELS, _HEADER = 4, 28, 150, 78
_DPI = 100
_MOST_NAMES = 40  # of layers that fit under a chart
_COLOURS = {UNIFORM: "#8172b3", FEWER_STEPS: "#dd8452", SCHEDULE: "#c44e52", MAGNITUDE: "#7f7f7f"}
_BLUE = "#4c72b0"


def image_grid(groups: Sequence[tuple[str, Pictures]]) -> bytes:
    """Variants as rows, samples as columns; groups of columns side by side, each under its title.

    Args:
        groups: title and pictures of each group, of the same variants. Small pictures are enlarged without smoothing.
    """
    shown = [(title, pictures) for title, pictures in groups if pictures.columns]
    widths = [len(pictures.columns) * (CELL + _GAP) for _, pictures in shown]
    rows = len(shown[0][1].variants)
    width = _LABELS + sum(widths) + _GROUP_GAP * (len(shown) - 1)
    height = _HEADER + rows * (CELL + _GAP)
    figure = figure_of(width / _DPI, height / _DPI)
    for row, name in enumerate(shown[0][1].variants):
        y = 1 - (_HEADER + row * (CELL + _GAP) + CELL / 2) / height
        figure.text(8 / width, y, _two_lines(name), va="center", ha="left", fontsize=11)
    left = _LABELS
    for (title, pictures), span in zip(shown, widths, strict=True):
        figure.text(left / width, 1 - 4 / height, title, va="top", ha="left", fontsize=12, weight="bold")
        for column, name in enumerate(pictures.columns):
            x = (left + column * (CELL + _GAP) + CELL / 2) / width
            figure.text(x, 1 - (_HEADER - 4) / height, name, va="bottom", ha="center", fontsize=10)
        montage = _montage(pictures.images)
        box = (left / width, 0.0, montage.shape[1] / width, montage.shape[0] / height)
        axes = figure.add_axes(box)
        axes.imshow(montage.numpy(), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        left += span + _GROUP_GAP
    return png_of(figure, tight=False)


def schedule_picture(schedule: StageSchedule, taus: Sequence[float]) -> bytes:
    """Sparsity over tau, with a tick for each denoiser call of the sampler."""
    figure = figure_of(8.4, 2.5)
    axes = figure.add_subplot()
    for stage in schedule.stages:
        axes.bar(stage.high, stage.sparsity, stage.low - stage.high, align="edge", color=_BLUE, edgecolor="white")
        middle = (stage.high + stage.low) / 2
        text = f"{stage.sparsity:.0%}" if stage.sparsity else "dense"
        axes.annotate(text, (middle, stage.sparsity), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    for edge in schedule.edges[1:-1]:
        axes.axvline(edge, color="#999999", linewidth=0.8, linestyle=":")
    axes.plot(taus, [-0.05] * len(taus), "|", color="black", markersize=7, clip_on=False)
    top = max(0.25, *(level * 1.3 for level in schedule.levels))
    axes.set(xlim=(1.01, -0.01), ylim=(-0.09, top), ylabel="sparsity")
    axes.set_xlabel("noise level tau; sampling runs to the right, ticks are denoiser calls")
    without_frame(axes)
    return png_of(figure)


def curve_picture(points: Sequence[CurvePoint]) -> bytes:
    """Paired error against executed MACs, error on a logarithmic axis."""
    figure = figure_of(8.4, 3.9)
    axes = figure.add_subplot()
    for kind, marker in ((UNIFORM, "o-"), (FEWER_STEPS, "s-"), (SCHEDULE, "*"), (MAGNITUDE, "X")):
        chosen = [point for point in points if point.kind == kind and point.latent_mse > 0]
        label = "dense, fewer steps" if kind == FEWER_STEPS else kind
        size = 16 if marker == "*" else 7
        x, y = [point.macs_share for point in chosen], [point.latent_mse for point in chosen]
        axes.plot(x, y, marker, color=_COLOURS[kind], label=label, markersize=size, zorder=3 if len(marker) == 1 else 2)
    axes.set_yscale("log")
    axes.set(xlabel="executed MACs / dense", ylabel="latent MSE against dense")
    axes.grid(visible=True, which="both", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    without_frame(axes)
    return png_of(figure)


def table_picture(table: ErrorTable) -> bytes:
    """The error table as a heat map: stages down, levels across, colour on a logarithmic scale."""
    errors = torch.tensor(table.errors, dtype=torch.float64)[:, 1:]  # dense has no error
    logs = errors.clamp_min(errors[errors > 0].min() if bool((errors > 0).any()) else 1e-12).log10()
    figure = figure_of(8.4, 0.9 + 0.42 * len(table.errors))
    axes = figure.add_subplot()
    axes.imshow(logs.numpy(), cmap="viridis_r", aspect="auto")
    middle = float(logs.min() + logs.max()) / 2
    for stage, row in enumerate(errors.tolist()):
        for level, error in enumerate(row):
            colour = "white" if float(logs[stage, level]) > middle else "black"
            axes.text(level, stage, f"{error:.1e}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(errors.shape[1]), [f"{sparsity:g}" for sparsity in table.sparsities[1:]])
    spans = [f"{table.edges[i]:.2f} – {table.edges[i + 1]:.2f}" for i in range(len(table.errors))]
    axes.set_yticks(range(len(spans)), spans)
    axes.set(xlabel="sparsity of that stage alone", ylabel="stage (tau)")
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return png_of(figure)


def layers_picture(shares: Mapping[str, Sequence[float]], sparsities: Sequence[float]) -> bytes:
    """What each layer keeps at each level as a heat map: levels down, layers across.

    Args:
        shares: group name -> kept share of its units at each level, dense first.
        sparsities: of the levels.
    """
    kept = torch.tensor(list(shares.values()), dtype=torch.float64).T[1:]
    figure = figure_of(8.4, 1.2 + 0.3 * len(kept))
    axes = figure.add_subplot()
    image = axes.imshow(kept.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label="kept", pad=0.01)
    axes.set_yticks(range(len(kept)), [f"{sparsity:g}" for sparsity in sparsities[1:]])
    step = math.ceil(len(shares) / _MOST_NAMES)
    axes.set_xticks(range(0, len(shares), step), list(shares)[::step], rotation=90)
    axes.set(ylabel="sparsity")
    axes.tick_params(length=0, labelsize=7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return png_of(figure)


def _montage(images: Tensor) -> Tensor:
    """Images of shape (rows, columns, 3, height, width) as one of shape (height, width, 3), white between them."""
    rows, columns = images.shape[:2]
    cells = _to_cell(images.flatten(0, 1))
    cells = F.pad(cells, (0, _GAP, 0, _GAP), value=1.0)
    side = CELL + _GAP
    return cells.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)


def _to_cell(images: Tensor) -> Tensor:
    """Images of shape (count, 3, height, width) fitted into squares of side CELL, on white."""
    height, width = images.shape[-2:]
    scale = CELL / max(height, width)
    size = (max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    if scale >= 1:
        images = F.interpolate(images, size=size, mode="nearest-exact")
    else:
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    return F.pad(images.clamp(0, 1), (0, CELL - size[1], 0, CELL - size[0]), value=1.0)


def _two_lines(name: str) -> str:
    """A long row label broken where its remark begins."""
    for mark in (" (", ", "):
        if mark in name:
            head, tail = name.split(mark, 1)
            return f"{head}{',' if mark == ', ' else ''}\n{'(' if mark == ' (' else ''}{tail}"
    return name


def figure_of(width: float, height: float) -> Figure:
    """A figure of this size in inches that no window knows."""
    with report_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def without_frame(axes: Axes) -> None:
    """Axes on the left and below only."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def png_of(figure: Figure, tight: bool = True) -> bytes:
    """The file's bytes."""
    stream = io.BytesIO()
    # Twice the pixels for charts, whose letters are small; grids stay at one picture pixel to a whole number of theirs.
    if tight:
        figure.savefig(stream, format="png", dpi=2 * _DPI, bbox_inches="tight")
    else:
        figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()
