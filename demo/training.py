"""What the training scripts share: batches, an optimiser, figures on file, files that appear whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

log = logging.getLogger("train")


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of indices, each epoch in a new order."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def optimiser(
    parameters: nn.Module | Iterable[nn.Parameter], steps: int, peak: float, decay: float = 0.0
) -> Callable[[Tensor], None]:
    """A function that takes a loss and makes one AdamW step: warm-up to the peak rate, cosine decay to zero."""
    trained = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=decay, fused=True)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        rest = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()

    return descend


class Average:
    """A moving average of a module's weights, which is what gets published."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = list(module.parameters())
        self.weights = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay

    def update(self, step: int) -> None:
        """Take in the weights after `step` steps; the memory is short first, since the first weights are noise."""
        keep = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in self.parameters], 1 - keep)


def record(folder: Path, **figures: Any) -> None:
    """Merge figures into the folder's `figures.json` and log them, so that the README never has to be trusted."""
    path = folder / "figures.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, **figures}, indent=2) + "\n", encoding="utf-8")
    for name, value in figures.items():
        log.info("%s: %s", name, value)


def publish(folder: Path, save: Callable[[Path], object]) -> None:
    """Write files next to `folder`, then move each into place: a reader never sees half a file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        save(Path(partial))
        for source in sorted(path for path in Path(partial).rglob("*") if path.is_file()):
            target = folder / source.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.chmod(0o644)  # files made in a temporary folder are private
            os.replace(source, target)


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel zero mean and unit variance by changing the two 1x1 convolutions around it.

    `scaling_factor` is one number for all channels and there is no shift that every pipeline would apply. Both
    convolutions are linear and see one position at a time, so the reconstructions stay exactly as they were.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)
