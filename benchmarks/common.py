"""What the benchmark scripts share: the demo pipeline, its judge, and results as JSON with the machine beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stageprune.core.api import host_for
from stageprune.core.environment import describe_environment
from stageprune.core.evaluation.judge import Judge
from stageprune.core.files import atomic_file
from stageprune.core.host import Conditions, Host, sample
from stageprune.core.hosts.diffusers.load import load_pipeline

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "demo" / "dit-digits"
LEVELS = (0.0, 0.1, 0.205, 0.335, 0.42, 0.51, 0.6, 0.7)  # 0.205, 0.335 and 0.51 execute 0.8, 0.67 and 0.5
MULTIPLE = 16
GUIDANCE = 1.5


class Demo:
    """The trained demo pipeline with its judge and a fixed assignment of labels to seeds."""

    def __init__(self) -> None:
        self.pipe = load_pipeline(DEMO, "cpu")
        self.host: Host = host_for(self.pipe)
        self.judge = Judge.load(DEMO / "judge").eval()

    def labels(self, count: int) -> list[int]:
        """The ten digits in turn."""
        return [index % 10 for index in range(count)]

    def conditions(self, count: int) -> Conditions:
        """Encoded labels."""
        return self.host.encode(self.labels(count))

    def sample(self, seeds: Sequence[int], steps: int, batch_size: int = 50) -> Tensor:
        """Final latents, one a seed."""
        return sample(self.host, self.conditions(len(seeds)), seeds, steps, GUIDANCE, batch_size)

    def images(self, latents: Tensor, batch_size: int = 100) -> Tensor:
        """Decoded images."""
        return torch.cat([self.host.decode(part) for part in latents.split(batch_size)])


def write_results(name: str, data: dict[str, Any]) -> Path:
    """Write `results/<name>.json` with the environment."""
    path = RESULTS / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps({"environment": describe_environment(), **data}, indent=1) + "\n", "utf-8")
    return path


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over seed sets."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "std": float(tensor.std()) if len(values) > 1 else 0.0}
