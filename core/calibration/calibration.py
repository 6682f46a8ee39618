"""The result of a calibration: Hessians with their provenance, in one safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CalibrationError
from ..files import atomic_file
from ..fingerprint import Fingerprint

FORMAT = "stageprune.calibration.1"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Second moments of the layers' inputs along dense trajectories: of every consumer, and of producers if asked for.

    Args:
        hessians: layer path -> (stages, columns + 1, columns + 1), float32, the last row the constant-1 input. A
            convolution has a column for each input channel and place in its kernel.
        rows: layer path -> inputs (tokens or output places) seen in each stage, shape (stages,).
        edges: stage boundaries in tau, from 1 to 0.
        fingerprint: of the denoiser.
        provenance: prompts, seeds, steps, sampler, versions: plain data.
        shared: layer path -> the path in `hessians` whose layer reads the very same tensor (k and v -> q).
        scores: `statistic.group` -> a number for each unit, summed over the run, shape (stages, units), float64.
    """

    hessians: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    edges: tuple[float, ...]
    fingerprint: Fingerprint
    provenance: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """Number of stages kept apart."""
        return len(self.edges) - 1

    def knows(self, path: str) -> bool:
        """Whether the inputs of the layer at `path` were recorded."""
        return self.shared.get(path, path) in self.hessians

    def hessian(self, path: str, stage: int | None = None) -> Tensor:
        """Hessian of a layer's inputs in one stage, or of all stages together."""
        path = self.shared.get(path, path)
        if path not in self.hessians:
            raise CalibrationError(
                f"the calibration has no Hessian for `{path}`; calibrate this model again, with the `kinds` that are "
                'pruned, and with `layers="all"` for layers that produce units.'
            )
        return self.hessians[path].sum(0) if stage is None else self.hessians[path][stage]

    def scores_of(self, group: str, stage: int | None = None) -> dict[str, Tensor]:
        """Statistic -> scores of a group's units, shape (units,), in one stage or of all stages together."""
        mine = {name.partition(".")[0]: table for name, table in self.scores.items() if name.partition(".")[2] == group}
        return {name: table.sum(0) if stage is None else table[stage] for name, table in mine.items()}

    def check_denoiser(self, fingerprint: Fingerprint) -> None:
        """CalibrationError if it was made on another denoiser."""
        why = self.fingerprint.mismatch(fingerprint)
        if why:
            raise CalibrationError(f"the calibration is of another model: {why}. Run stageprune.calibrate on this one.")

    def check_rank(self, per_stage: bool) -> None:
        """CalibrationError if some Hessian has fewer rows than columns: it cannot support its rank."""
        for path, hessian in self.hessians.items():
            need, seen = hessian.shape[-1], self.rows[path]
            have = int(seen.min() if per_stage else seen.sum())
            if have < need:
                where = "in one of its stages " if per_stage else ""
                times = math.ceil(need / max(have, 1))
                remedy = (
                    f"Use at least {times} times as many prompts or steps."
                    if have
                    else "No step falls in that stage: use more steps, or fewer `stages`."
                )
                raise CalibrationError(
                    f"too few calibration data: `{path}` has {need} columns but saw only {have} inputs {where}"
                    f"(tokens or pixels x steps x prompts). {remedy}"
                )

        for name, table in self.scores.items():
            if not bool(table.any(1).all()):
                raise CalibrationError(
                    f"too few calibration data: no call was scored for `{name}` in one of its stages. Use more "
                    "steps, or fewer `stages`."
                )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (whole or not at all)."""
        target = Path(path)
        tensors = {f"hessian.{name}": tensor.contiguous() for name, tensor in self.hessians.items()}
        tensors |= {f"rows.{name}": tensor for name, tensor in self.rows.items()}
        tensors |= {f"score.{name}": tensor for name, tensor in self.scores.items()}
        meta = {
            "format": FORMAT,
            "edges": json.dumps(self.edges),
            "fingerprint": json.dumps(self.fingerprint.to_dict()),
            "provenance": json.dumps(self.provenance),
            "shared": json.dumps(dict(self.shared)),
        }
        with atomic_file(target) as temporary:
            save_file(tensors, temporary, metadata=meta)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. CalibrationError names the file and what is wrong with it."""
        source = Path(path)
        if not source.is_file():
            raise CalibrationError(f"{source}: no such calibration file.")
        try:
            with safe_open(source, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise CalibrationError(f"{source}: not a valid safetensors file ({error}).") from None
        if meta.get("format") != FORMAT:
            raise CalibrationError(f"{source}: format is {meta.get('format')!r}, this version reads {FORMAT!r}.")
        try:
            result = cls(
                hessians={name[8:]: tensor for name, tensor in tensors.items() if name.startswith("hessian.")},
                rows={name[5:]: tensor for name, tensor in tensors.items() if name.startswith("rows.")},
                scores={name[6:]: tensor for name, tensor in tensors.items() if name.startswith("score.")},
                edges=tuple(float(edge) for edge in json.loads(meta["edges"])),
                fingerprint=Fingerprint.from_dict(json.loads(meta["fingerprint"])),
                provenance=dict(json.loads(meta["provenance"]).items()),
                shared={str(path): str(leader) for path, leader in json.loads(meta.get("shared", "{}")).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{source}: its metadata are damaged ({error}).") from None
        result._check(source)
        return result

    def _check(self, source: Path) -> None:
        for path, hessian in self.hessians.items():
            square = hessian.ndim == 3 and hessian.shape[0] == self.stages and hessian.shape[1] == hessian.shape[2]
            if not square or path not in self.rows or len(self.rows[path]) != self.stages:
                raise CalibrationError(f"{source}: `{path}` has shape {tuple(hessian.shape)} for {self.stages} stages.")
            if not bool(torch.isfinite(hessian).all()):
                raise CalibrationError(f"{source}: the Hessian of `{path}` holds NaN or infinity.")
        for name, table in self.scores.items():
            if table.ndim != 2 or table.shape[0] != self.stages or not bool(torch.isfinite(table).all()):
                raise CalibrationError(f"{source}: the scores `{name}` must be finite, {self.stages} stages x units.")
        for path, leader in self.shared.items():
            if leader not in self.hessians:
                raise CalibrationError(f"{source}: `{path}` shares the Hessian of `{leader}`, which is not there.")

    def __str__(self) -> str:
        inputs = int(next(iter(self.rows.values())).sum()) if self.rows else 0
        layers = f"{len(self.hessians) + len(self.shared)} layers" if self.shared else f"{len(self.hessians)} consumers"
        return (
            f"Calibration of {layers}, {inputs:,} inputs each, {self.stages} stage(s); "
            f"{len(self.provenance.get('prompts', []))} prompts, {self.provenance.get('steps')} steps"
        )
