"""The report: what was measured, as text, JSON and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import atomic_file
from ..planning import Allocation, Comparison, SearchResult
from ..runtime import StageSummary
from ..schedule import StageSchedule
from .curve import CURVE_SAMPLES, CurvePoint
from .extras import report_extra
from .pictures import curve_picture, image_grid, layers_picture, schedule_picture, table_picture
from .plan_pictures import comparison_picture, search_picture
from .rows import Row, scientific, shown_columns, text_table
from .scores import Pictures
from .verdict import comparisons, lead

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` measured. `str()` is a plain table, `save` writes a page.

    Args:
        rows: one a variant: dense, the schedule, then its rivals.
        schedule: the schedule that was judged.
        summary: requested and realised sparsity, and memory, of the schedule's own levels.
        taus: noise levels of the schedule's denoiser calls.
        environment: machine, versions, samples, steps, guidance, seeds.
        notes: what a reader must know to read the numbers right, such as a metric that was not measured.
        grid: pictures of the first samples.
        worst: pictures of the samples on which the schedule differs most from dense, worst first.
        curve: paired error against MACs; empty if it was not asked for.
        allocation: how the schedule was chosen, if known.
        command: what made the report, if known.
        layers: group name -> share of its units that it keeps at each level of the bank.
        sparsities: of these levels, dense first.
        layer_allocation: how they were divided among the groups, if known.
        search: how the schedule was searched, if it was.
        comparison: strategies side by side, if they were compared.
    """

    rows: tuple[Row, ...]
    schedule: StageSchedule
    summary: StageSummary
    taus: tuple[float, ...]
    environment: Mapping[str, Any]
    notes: tuple[str, ...]
    grid: Pictures
    worst: Pictures
    curve: tuple[CurvePoint, ...] = ()
    allocation: Allocation | None = None
    command: str | None = None
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    sparsities: tuple[float, ...] = ()
    layer_allocation: str | None = None
    search: SearchResult | None = None
    comparison: Comparison | None = None

    def row(self, name: str) -> Row:
        """The row of a variant. KeyError if there is none of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def verdict(self) -> tuple[str, ...]:
        """The result in words: first the schedule's cost and quality, then who wins on which metric."""
        return (lead(self.rows), *comparisons(self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the pictures. Infinite values (PSNR of identical images) become None."""
        data: dict[str, Any] = _plain(
            {
                "verdict": self.verdict,
                "rows": [asdict(row) for row in self.rows],
                "schedule": self.schedule.to_dict(),
                "summary": asdict(self.summary),
                "macs_share": self.rows[1].macs_share,
                "taus": self.taus,
                "curve": [asdict(point) for point in self.curve],
                "allocation": self.allocation.to_dict() if self.allocation else None,
                "search": self.search.to_dict() if self.search else None,
                "comparison": self.comparison.to_dict() if self.comparison else None,
                "layers": dict(self.layers),
                "sparsities": self.sparsities,
                "layer_allocation": self.layer_allocation,
                "notes": self.notes,
                "worst": self.worst.columns,
                "environment": dict(self.environment),
                "command": self.command,
            }
        )
        return data

    def save(self, folder: str | Path) -> Path:
        """Write `report.html` (self-contained), `report.json` and the pictures as PNG, each whole or not at all.

        Args:
            folder: created if missing; other files in it stay.

        Returns:
            The path of the HTML page.

        Raises:
            StagePruneError: the extra `report` is missing.

        Example:
            >>> report.save("out/report")
            PosixPath('out/report/report.html')
        """
        pictures = self._pictures()
        data = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        files = {"report.json": data.encode(), "report.html": self._page(pictures).encode()}
        files |= {f"{name}.png": png for name, png in pictures.items()}
        for name, content in files.items():
            with atomic_file(Path(folder) / name) as path:
                path.write_bytes(content)
        return Path(folder) / "report.html"

    def html(self) -> str:
        """The page, pictures embedded."""
        return self._page(self._pictures())

    def _page(self, pictures: Mapping[str, bytes]) -> str:
        with report_extra():
            import jinja2  # noqa: PLC0415
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        environment.filters["scientific"] = scientific
        return environment.get_template(TEMPLATE).render(
            report=self,
            columns=shown_columns(self.rows),
            pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
            curve_samples=min(CURVE_SAMPLES, len(self.rows[0].latent_errors)),
            levels=lambda levels: ", ".join(f"{level:g}" for level in levels),
        )

    def _pictures(self) -> dict[str, bytes]:
        pictures = {"schedule": schedule_picture(self.schedule, self.taus)}
        if self.grid.columns or self.worst.columns:
            groups = [("First seeds", self.grid), ("Schedule furthest from dense", self.worst)]
            pictures["grid"] = image_grid(groups)
        if self.curve:
            pictures["curve"] = curve_picture(self.curve)
        if self.allocation is not None and self.allocation.table is not None:
            pictures["table"] = table_picture(self.allocation.table)
        if self.search is not None:
            pictures["search"] = search_picture(self.search.history, self.search.fitness)
        if self.comparison is not None:
            pictures["comparison"] = comparison_picture(self.comparison)
        if self.layers:
            pictures["layers"] = layers_picture(self.layers, self.sparsities)
        return pictures

    def __str__(self) -> str:
        shown = ("samples", "steps", "guidance", "seeds", "dtype", "device")
        facts = ", ".join(f"{key} {self.environment[key]}" for key in shown if key in self.environment)
        return "\n".join([*self.verdict, "", text_table(self.rows), "", facts, *self.notes])


def _plain(value: Any) -> Any:
    """Lists for tuples, None for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
