"""A level of a bank as a plain diffusers model, which loads and runs without this library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn

from ...errors import ExportError, GroupError
from ...groups import InputSize, family_of
from ...plain_folder import save_plain
from ...pruning import Bank
from ...pruning.states import removed_blocks, small_state, zero_filled_state
from ...runtime import StagePruner
from ...schedule import StageSchedule
from ...version import __version__
from .host import find_denoiser
from .shrink import renumbered, shrunk_config
from .timesteps import reader_for

Form = Literal["small", "zeros"]

FORMAT = "stageprune.export"
FORMAT_VERSION = 1

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference to the level's own output, relative to its largest value; others are half precision: 0.05."""


def export_level(target: Any, bank: Bank, folder: str | Path, sparsity: float, stage: int, form: Form) -> Path:
    """Write one level as a plain model.

    Before the folder gets its name, the model is loaded from it by `from_pretrained` and must give what the level
    itself gives, on a random input.

    Args:
        target: the pipeline, written whole with the smaller denoiser, or the denoiser alone.
        bank: made for it.
        folder: where to; an earlier export is replaced, anything else is not.
        sparsity: of the level.
        stage: of the bank, if its orders or consumers belong to stages.
        form: `small` leaves out what the level leaves out; `zeros` keeps the dense shapes.

    Raises:
        ExportError: no configuration of the denoiser's class can say this; the message says what and what to do.
    """
    if form not in ("small", "zeros"):
        raise ExportError(f"`form` must be 'small' or 'zeros', got {form!r}.")
    denoiser = target if isinstance(target, nn.Module) else find_denoiser(target)[1]
    bank.check_class(denoiser)
    bank.check_denoiser(denoiser)
    at_stage, level = bank.at_stage(stage), bank.level_of(sparsity)
    twin = _zero_filled(denoiser, at_stage, level) if form == "zeros" else _small(denoiser, at_stage, level)
    expected = _level_output(denoiser, at_stage, sparsity)

    def write(temporary: Path, **options: Any) -> None:
        _with(target, twin, bank.component).save_pretrained(temporary, **options)
        plain = temporary if isinstance(target, nn.Module) else temporary / bank.component
        _check_same(type(denoiser).from_pretrained(plain), denoiser, expected)  # type: ignore[attr-defined]

    return save_plain(folder, write, _record(bank, level, stage, form))


def _small(denoiser: nn.Module, bank: Bank, level: int) -> nn.Module:
    """The smaller model, if its class can be configured so."""
    gone = removed_blocks(bank, level)
    state = renumbered(small_state(denoiser, bank, level), denoiser, gone)
    twin = _built(denoiser, shrunk_config(denoiser, gone))
    wanted = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    for name in sorted(set(wanted) | set(state)):
        have = tuple(state[name].shape) if name in state else None
        if have != wanted.get(name):
            raise ExportError(
                f"no configuration of {type(denoiser).__name__} in diffusers {diffusers.__version__} gives this level: "
                f"`{name}` has shape {have} in it and {wanted.get(name)} in a plain model, whose heads make up the "
                "model's width and whose feed-forwards are 4 times as wide. Enable the bundle, which runs any level; "
                "or export with form='zeros', which stock diffusers loads, as large and slow as the dense model."
            )
    twin.load_state_dict(state, assign=True)
    return twin


def _zero_filled(denoiser: nn.Module, bank: Bank, level: int) -> nn.Module:
    twin = _built(denoiser, dict(denoiser.config))  # type: ignore[arg-type]
    twin.load_state_dict(zero_filled_state(denoiser, bank, level), assign=True)
    return twin


def _built(denoiser: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A model of the denoiser's class without weights."""
    with torch.device("meta"):
        twin: nn.Module = type(denoiser).from_config(config)  # type: ignore[attr-defined]
    return twin.eval()


def _with(target: Any, denoiser: nn.Module, component: str) -> Any:
    """The pipeline with another denoiser, or that denoiser alone."""
    if isinstance(target, nn.Module):
        return denoiser
    twin = copy.copy(target)
    twin.register_modules(**{component: denoiser})
    return twin


@torch.no_grad()
def _output(denoiser: nn.Module) -> Tensor:
    """One call on a random input, a small one if the family takes it."""
    family = family_of(denoiser)
    try:
        inputs = family.example_inputs(denoiser, size=InputSize(32, 32, 32))
    except GroupError:  # of one size only, or of smaller ones
        inputs = family.example_inputs(denoiser)
    output: Tensor = denoiser(**inputs, return_dict=False)[0]
    return output


def _level_output(denoiser: nn.Module, bank: Bank, sparsity: float) -> Tensor:
    pruner = StagePruner(denoiser, bank, StageSchedule.uniform(sparsity), reader_for(denoiser))
    try:
        return _output(denoiser)
    finally:
        pruner.detach()


def _check_same(plain: nn.Module, denoiser: nn.Module, expected: Tensor) -> None:
    like = next(denoiser.parameters())
    got = _output(plain.to(like.device, like.dtype).eval())
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= TOLERANCES.get(like.dtype, 0.05):
        raise ExportError(
            f"the exported {type(denoiser).__name__} differs from the level by {error:.2e} of its output, so nothing "
            "was written. This is a fault of the export for this model: enable the bundle instead."
        )


def _record(bank: Bank, level: int, stage: int, form: Form) -> dict[str, Any]:
    """How it was made, as plain data."""
    realised = bank.provenance.get("realised", ())
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base_model": str((bank.provenance.get("calibration") or bank.provenance).get("model", "")),
        "denoiser": bank.denoiser,
        "component": bank.component,
        "method": bank.method,
        "form": form,
        "sparsity": bank.sparsities[level],
        "realised": realised[level] if realised else None,
        "stage": stage if bank.stages > 1 else None,
        "kept": {name: counts[level] for name, counts in bank.kept.items()},
        "provenance": dict(bank.provenance),
    }
