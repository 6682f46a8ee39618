"""What tells one search from another: all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...pruning import Bank
from ...schedule import StageSchedule, Target
from ..fitness import Fitness
from ..sampling import Sampling
from ..table import digest_of
from .checkpoint import flat
from .initial import Init
from .settings import SearchSettings

if TYPE_CHECKING:
    from ...evaluation.judge import Judge


def identity_of(
    sampling: Sampling,
    bank: Bank,
    stages: StageSchedule,
    target: Target,
    fitness: Fitness,
    judge: Judge | None,
    settings: SearchSettings,
    init: Init,
) -> dict[str, Any]:
    """Plain data in flat names, for a checkpoint. Of a function only the name is known, of weights a few values.

    Args:
        sampling: pipeline, all prompts, seeds, steps and guidance.
        bank: the levels; its digest also stands for the denoiser's weights.
        stages: the partition.
        target: the budget.
        fitness: what is minimised.
        judge: what scores images.
        settings: of the evolution.
        init: how it begins.
    """
    return {
        **sampling.host.describe(),
        "prompts": list(sampling.prompts),
        "seed": sampling.seed,
        "steps": sampling.steps,
        "guidance": float(sampling.guidance),
        "batch_size": sampling.batch_size,
        "stages": list(stages.edges),
        "target": str(target),
        "bank": digest_of(bank),
        "fitness": fitness.name,
        "judge": None if judge is None else _digest_of_judge(judge),
        "init": init.levels if isinstance(init, StageSchedule) else init,
        **flat("settings", asdict(settings)),
        **flat("mosaic", asdict(sampling.mosaic)),
    }


def _digest_of_judge(judge: Judge) -> str:
    ends = {
        name: [list(tensor.shape), *tensor.detach().reshape(-1)[[0, -1]].double().tolist()]
        for name, tensor in judge.state_dict().items()
    }
    return f"{judge.kind} {hashlib.sha256(json.dumps(ends).encode()).hexdigest()[:16]}"
