"""The README that goes with a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..pruning import Bank
from ..schedule import StageSchedule

if TYPE_CHECKING:
    from .manifest import Manifest


def model_card(bank: Bank, schedule: StageSchedule | None, manifest: Manifest) -> str:
    """Markdown with what the bundle is, how it was made and how to use it."""
    made = bank.provenance.get("calibration") or {}
    prompts = len(made.get("prompts", []))
    how = (
        f"calibrated on {prompts} prompts, {made.get('steps')} steps, guidance {made.get('guidance')}"
        if prompts
        else "no data"
    )
    lines = [
        "---",
        "library_name: stageprune",
        "tags: [stageprune, pruned, diffusers]",
        "---",
        f"# Stage-pruned {manifest.base_model or bank.denoiser}",
        "",
        f"Pruning levels for `{bank.denoiser}` (component `{bank.component}`), method `{bank.method}` ({how}). It "
        "holds no dense",
        "weights: load the base model first.",
        "",
        "```python",
        "import stageprune",
        'pipe.enable_stage_pruning("path/to/this/folder")',
        "```",
        "",
        "| level | sparsity asked | share of prunable MACs removed |",
        "|---|---|---|",
    ]
    realised = manifest.realised or tuple(float("nan") for _ in bank.sparsities)
    lines += [f"| {i} | {s:.3f} | {r:.3f} |" for i, (s, r) in enumerate(zip(bank.sparsities, realised, strict=False))]
    if schedule is not None:
        lines += ["", "Default schedule:", "", "```", str(schedule), "```"]
    return "\n".join(lines) + "\n"
