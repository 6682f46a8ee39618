"""How good a pruned pipeline is, beside dense, uniform, fewer steps and magnitude."""

from __future__ import annotations

from pathlib import Path

from .benchmark import Benchmark, benchmark
from .class_judge import ClassJudge
from .curve import CurvePoint
from .evaluate import evaluate
from .judge import Judge
from .metrics import frechet, frechet_distance, mse, psnr, ssim
from .report import Report
from .rows import Row
from .scene_checker import SceneChecker
from .variants import Variant, make_variants

__all__ = [
    "Benchmark",
    "ClassJudge",
    "CurvePoint",
    "Judge",
    "Report",
    "Row",
    "SceneChecker",
    "Variant",
    "benchmark",
    "evaluate",
    "frechet",
    "frechet_distance",
    "load_judge",
    "make_variants",
    "mse",
    "psnr",
    "ssim",
]


def load_judge(folder: str | Path) -> Judge | None:
    """The judge in `folder/judge`, as a demo pipeline carries one; None if there is none.

    Args:
        folder: a pipeline's folder.

    Raises:
        StagePruneError: there is one, but a file of it is missing or damaged.

    Example:
        >>> report = evaluate(host, bundle, judge=load_judge("demo/dit-digits"))
    """
    path = Path(folder) / "judge"
    return Judge.load(path) if path.is_dir() else None
