"""The public functions that make a model which stays as it is: `sparsify` and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import static as _static
from .api import host_at
from .bundle import Bundle, load_bundle
from .calibration import Calibration
from .errors import ExportError, StagePruneError
from .hosts.diffusers import Form, export_level, find_denoiser
from .pruning import Bank, Pattern
from .runtime import pruner_of
from .static import StaticModel


def sparsify(
    pipe: Any,
    calibration: Calibration | None = None,
    *,
    pattern: str | float | Pattern = "2:4",
    method: str = "obs",
    kinds: Sequence[str] | None = None,
    keep_dense: Sequence[str] = (),
    damping: float = 0.01,
) -> StaticModel:
    """Zero single weights instead of removing units: one static model, the same at every step. The pipeline is not
    changed.

    Zeros make a model neither smaller nor faster by themselves. 2:4 can be faster on an NVIDIA GPU from Ampere on:
    `StaticModel.apply` times each layer there and says for each how it runs and why.

    Args:
        pipe: the pipeline that was calibrated.
        calibration: its Hessians; `obs` and `wanda` need them. Only layers whose inputs it has recorded are meant:
            calibrate with `layers="all"` for q, k, v and up projections too.
        pattern: `"2:4"` or any N:M (N of every M weights of a row are kept), or the share of zeros in each layer (0.5).
        method: `obs` (the weights that stay make up for the others: SparseGPT, OBS-Diff), `wanda` or `magnitude`.
        kinds: unit kinds whose layers are meant; by default those that were calibrated.
        keep_dense: layers to leave alone, by path or with wildcards (`transformer_blocks.0.*`).
        damping: added to each Hessian's diagonal, relative to its mean.

    Returns:
        A `StaticModel`: `print` it for the zeros of each layer, `apply(pipe)` it, or `save(pipe, folder)` a plain
        pipeline that `from_pretrained` loads without stageprune.

    Raises:
        BankError: an argument is out of range.
        CalibrationError: the calibration is missing, of another model, or too small.

    Example:
        >>> calibration = stageprune.calibrate(pipe, list(range(10)) * 6, steps=20, layers="all")
        >>> static = stageprune.sparsify(pipe, calibration, pattern="2:4")
        >>> static.save(pipe, "out/sparse")
    """
    return _static.sparsify(
        host_at(pipe, None, calibration),
        calibration,
        pattern=pattern,
        method=method,
        kinds=kinds,
        keep_dense=keep_dense,
        damping=damping,
    )


def export(
    target: Any,
    made: Bank | Bundle | str | Path,
    folder: str | Path,
    *,
    sparsity: float | None = None,
    stage: int = 0,
    form: Form = "small",
) -> Path:
    """Write one level of a bank as a plain model, which `from_pretrained` loads without stageprune.

    A plain model needs a configuration. Those of diffusers' own denoisers can say how many blocks there are, so a level
    of `depth` becomes a smaller model. They cannot say that there are fewer heads, neurons or channels: such a level is
    refused with `form="small"`, and the bundle is the way to run it.

    Args:
        target: the pipeline, which is written whole, or its denoiser, of which a denoiser folder is written.
        made: a bank, or a bundle, its folder or Hub id.
        folder: where to; an earlier export there is replaced, anything else is not.
        sparsity: of the level; by default the one that the bundle's schedule runs, if it runs one alone.
        stage: which of the bank's stages, if its orders or consumers belong to stages: from 0, the noisiest.
        form: `small` leaves out what the level leaves out; `zeros` fills it with zeros: for every level, with the
            level's images, but as large and as slow as the dense model.

    Returns:
        The folder: the model in safetensors, its configuration, and `stageprune-static.json` on how it was made.

    Raises:
        ExportError: no plain model can be this level. Nothing has been written.
        BankError, BundleError: the bank is of another denoiser.

    Example:
        >>> bank = stageprune.prune(pipe, calibration, method="depth", levels=[0.25])
        >>> stageprune.export(pipe, bank, "out/shallow", sparsity=0.25)
    """
    denoiser = target if isinstance(target, nn.Module) else find_denoiser(target)[1]
    if pruner_of(denoiser) is not None:
        raise StagePruneError("stage pruning is enabled on this denoiser. Call disable_stage_pruning() first.")
    loaded = load_bundle(made) if isinstance(made, str | Path) else made
    bank = loaded if isinstance(loaded, Bank) else loaded.bank
    chosen = _only_level(loaded) if sparsity is None else sparsity
    return export_level(target, bank, folder, chosen, stage, form)


def _only_level(made: Bank | Bundle) -> float:
    """The one level that a bundle runs; ExportError if there is none or there are several."""
    schedule = made.schedule if isinstance(made, Bundle) else None
    levels = set(schedule.levels) if schedule is not None else set()
    if len(levels) == 1:
        return float(levels.pop())
    bank = made.bank if isinstance(made, Bundle) else made
    have = ", ".join(f"{value:g}" for value in bank.sparsities)
    raise ExportError(f"say which level to export by `sparsity`: a plain model is one level, and the bank has {have}.")
