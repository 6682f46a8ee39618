"""From final latents to the report's rows: decode batch by batch, score, and keep only the pictures that are shown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import progress
from ..host import Prompt
from .judge import Judge, finite
from .metrics import frechet, frechet_without_each, jackknife_error, mse, psnr, ssim, standard_error
from .rows import Row
from .runs import Job, Run


@dataclass(frozen=True)
class Pictures:
    """Pictures of the same samples by every variant.

    Args:
        variants: row labels.
        columns: column labels, one a sample.
        images: shape (variants, columns, 3, height, width), in [0, 1].
    """

    variants: tuple[str, ...]
    columns: tuple[str, ...]
    images: Tensor


@dataclass
class _Scores:
    """Per-sample values of one variant, batch by batch."""

    image_mse: list[Tensor] = field(default_factory=list)
    psnr: list[Tensor] = field(default_factory=list)
    ssim: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)


def score(
    job: Job, runs: Sequence[Run], judge: Judge | None, wanted: Sequence[Prompt] | None, keep: Sequence[int]
) -> tuple[list[Row], dict[int, Tensor]]:
    """Rows of the report, and the images of the samples `keep`.

    Args:
        job: what was sampled.
        runs: of the variants, dense first.
        judge: None leaves the set metrics out.
        wanted: what each image should show, in the judge's terms; None leaves the accuracy out.
        keep: indices of samples whose images are wanted, each of shape (variants, 3, height, width).
    """
    scores = [_Scores() for _ in runs]
    with progress.bar(len(runs) * len(job.seeds), "decoding and scoring", "image") as bar:
        for index, part in enumerate(job.batches):
            dense: Tensor | None = None
            for run, table in zip(runs, scores, strict=True):
                images = job.host.decode(run.parts[index])
                dense = images if dense is None else dense
                _score_batch(table, images, dense, judge, None if wanted is None else wanted[part])
                table.kept.update({i: images[i - part.start] for i in keep if part.start <= i < part.stop})
                bar.update(len(images))
    rows = [_row(run, runs[0], table, judge) for run, table in zip(runs, scores, strict=True)]
    return rows, {i: torch.stack([table.kept[i] for table in scores]) for i in keep}


def _score_batch(
    table: _Scores, images: Tensor, dense: Tensor, judge: Judge | None, wanted: Sequence[Prompt] | None
) -> None:
    table.finite.append(finite(images))
    table.image_mse.append(mse(images, dense))
    table.psnr.append(psnr(images, dense))
    table.ssim.append(ssim(images, dense))
    if judge is not None:
        table.features.append(judge.features(images.to(judge.device)))
        if wanted is not None:
            table.hits.append(judge.hits(images, wanted))


def _row(run: Run, dense: Run, table: _Scores, judge: Judge | None) -> Row:
    errors = mse(run.latents, dense.latents)
    ratios = run.time_ratios(dense)
    distance, without_each = None, torch.zeros(0)
    if judge is not None:
        features = torch.cat(table.features)
        distance = frechet(judge, features)
        if len(features) > 2:
            without_each = frechet_without_each(judge, features)
    return Row(
        name=run.variant.name,
        description=run.variant.description,
        steps=run.variant.steps,
        macs_share=run.variant.macs_share,
        accuracy=float(torch.cat(table.hits).double().mean()) if table.hits else None,
        frechet=distance,
        frechet_error=jackknife_error(without_each) if len(without_each) else None,
        frechet_without_each=tuple(without_each.tolist()),
        latent_mse=float(errors.mean()),
        latent_mse_error=standard_error(errors),
        image_mse=float(torch.cat(table.image_mse).mean()),
        psnr=float(torch.cat(table.psnr).mean()),
        ssim=float(torch.cat(table.ssim).mean()),
        seconds=run.median_seconds,
        time_ratio=statistics.median(ratios),
        time_range=(min(ratios), max(ratios)),
        latent_errors=tuple(errors.tolist()),
        broken=int((~(torch.cat(table.finite) & finite(run.latents))).sum()),
    )
