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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

log = logging.getLogger("train")


class Batches:
    """Batches of indices, each epoch in a new order.

    Args:
        count: of examples.
        size: of a batch.
        generator: draws the orders.
    """

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.count, self.size, self.generator = count, size, generator
        self.order = torch.empty(0, dtype=torch.long)  # what is left of those drawn

    def draw(self) -> Tensor:
        """The next batch."""
        if len(self.order) < self.size:
            self.order = torch.cat([self.order, torch.randperm(self.count, generator=self.generator)])
        picked, self.order = self.order[: self.size], self.order[self.size :]
        return picked


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of indices."""
    drawn = Batches(count, size, generator)
    return (drawn.draw() for _ in range(steps))


class Descent:
    """Calling it with a loss makes one AdamW step: warm-up to the peak rate, cosine decay to zero.

    Args:
        parameters: of a module, or some.
        steps: of the whole training.
        peak: learning rate.
        decay: of weights.
    """

    def __init__(
        self, parameters: nn.Module | Iterable[nn.Parameter], steps: int, peak: float, decay: float = 0.0
    ) -> None:
        self.trained = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
        self.optimizer = torch.optim.AdamW(self.trained, lr=peak, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        self.peak, self.steps, self.warmup, self.done = peak, steps, max(1, steps // 20), 0

    def __call__(self, loss: Tensor) -> None:
        """One step."""
        self.optimizer.param_groups[0]["lr"] = self.peak * self._rate()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.done += 1

    def _rate(self) -> float:
        if self.done < self.warmup:
            return (self.done + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (self.done - self.warmup) / max(1, self.steps - self.warmup)))

    def state(self) -> dict[str, Tensor]:
        """Weights and moments."""
        moments = self.optimizer.state_dict()["state"]
        weights = {f"{number}.weight": parameter.detach() for number, parameter in enumerate(self.trained)}
        return weights | {f"{number}.{name}": each for number, row in moments.items() for name, each in row.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """Go on from `state` after `done` steps."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            number, name = key.split(".")
            if name == "weight":
                self.trained[int(number)].copy_(tensor)
            else:
                moments.setdefault(int(number), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.done = done


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


class Progress:
    """All that a training goes on from, in one file that is replaced as a whole: killed, it ends with the same weights.

    Args:
        path: of the file; gone when the training has ended.
        run: what decides the outcome; a file of another run is not touched but refused.
        descend: the optimiser, with its weights.
        average: of the weights.
        drawn: batches, with the generator of all that is random.
    """

    def __init__(self, path: Path, run: str, descend: Descent, average: Average, drawn: Batches) -> None:
        self.path, self.run, self.descend, self.average, self.drawn = path, run, descend, average, drawn

    def save(self) -> None:
        """After the steps that were made."""
        averages = {f"average.{number}": weight for number, weight in enumerate(self.average.weights)}
        state = {f"descend.{name}": tensor for name, tensor in self.descend.state().items()}
        drawn = {"order": self.drawn.order, "generator": self.drawn.generator.get_state()}
        facts = {"run": self.run, "done": str(self.descend.done)}
        part = self.path.with_suffix(".tmp")
        save_file({name: each.contiguous() for name, each in (averages | state | drawn).items()}, part, facts)
        os.replace(part, self.path)

    @torch.no_grad()
    def load(self) -> int:
        """Steps that were made before, 0 without a file. ValueError if the file is another run's."""
        if not self.path.is_file():
            return 0
        with safe_open(self.path, "pt") as file:
            facts = file.metadata()
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        if facts["run"] != self.run:
            raise ValueError(f"{self.path} is of a training with other settings: remove it to begin anew.")
        prefix = "descend."
        state = {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}
        self.descend.restore(state, int(facts["done"]))
        for number, weight in enumerate(self.average.weights):
            weight.copy_(found[f"average.{number}"])
        self.drawn.order = found["order"]
        self.drawn.generator.set_state(found["generator"])
        log.info("going on after %d steps", self.descend.done)
        return self.descend.done


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
