"""What a fitness is, and which there are. The least is the best.

Add one by decorating a function that makes it with `register_fitness`, in a file that the package imports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import FitnessError
from ...host import Conditions, Prompt

if TYPE_CHECKING:
    from ...evaluation.judge import Judge


@dataclass(frozen=True)
class Outcome:
    """What a schedule, or the dense model, made of some probes.

    Args:
        latents: final ones, shape (probes, ...).
        prompts: one a probe.
        conditions: the prompts, encoded.
        decode: from latents to images.
    """

    latents: Tensor
    prompts: Sequence[Prompt]
    conditions: Conditions
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def images(self) -> Tensor:
        """Shape (probes, 3, height, width), in [0, 1], float32 on the CPU; decoded when first asked for."""
        return self.decode(self.latents)


Measure = Callable[[Outcome, Outcome], Tensor]
"""What a candidate made, what the dense model made of the same probes -> a number a probe, or several, shape (probes,)
or (probes, numbers).
"""


def mean(values: Tensor) -> float:
    """Of all probes."""
    return float(values.mean())


@dataclass(frozen=True)
class Fitness:
    """What a search minimises, and plans of steps are chosen by.

    Args:
        name: as users give it; a search's checkpoint is known by it.
        measure: what is kept of each probe.
        reduce: from that of all probes, shape (probes, numbers), float64, to the fitness; the mean by default.
        floor: if the fitness is the mean of one number a probe, the least that this can be: a candidate whose first
            probes are bad enough can then be given up, whatever the others would give. None if there is no such bound.
        probes: least number of probes that `reduce` can do with.
        paired: whether `measure` looks at the dense model's samples. If it does not, plans are chosen without making
            them on a fine grid, which is most of the work, and `measure` is given the candidate's own in their place.

    Raises:
        FitnessError: a `floor` beside a `reduce` of one's own.

    Example:
        >>> def whiter(made, dense):
        ...     return (dense.images - made.images).flatten(1).mean(1)
        >>> stageprune.search(pipe, bank, fitness=Fitness("whiter", whiter))
    """

    name: str
    measure: Measure
    reduce: Callable[[Tensor], float] = mean
    floor: float | None = None
    probes: int = 1
    paired: bool = True

    def __post_init__(self) -> None:
        if self.floor is not None and self.reduce is not mean:
            raise FitnessError(f"fitness {self.name!r}: a `floor` bounds means only; leave it out, or `reduce`.")

    def statistics(self, made: Outcome, dense: Outcome) -> Tensor:
        """What is kept of some probes, shape (probes, numbers), float64 on the CPU.

        Raises:
            FitnessError: `measure` gave something else.
        """
        values, count = self.measure(made, dense), len(made.latents)
        most = 1 if self.floor is not None else 2
        if not isinstance(values, Tensor) or not 1 <= values.ndim <= most or len(values) != count:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise FitnessError(
                f"fitness {self.name!r} must give a tensor with a value (or, without `floor`, a row) for each of "
                f"{count} probes, got {got}."
            )
        return values.detach().double().cpu().reshape(count, -1)

    def standard_error(self, statistics: Tensor, beside: Tensor | None = None) -> float:
        """Of the fitness over probes, by leaving out each in turn; 0 where there are too few for that.

        Args:
            statistics: of the probes.
            beside: of the same probes by another schedule: the error of the difference to its fitness, from which goes
                whatever makes a probe easy or hard for both.
        """
        from ...evaluation.metrics import jackknife_error  # noqa: PLC0415  (it builds on planning)

        count = len(statistics)
        if count <= self.probes:
            return 0.0
        every = torch.arange(count)

        def without_each(values: Tensor) -> Tensor:
            return torch.tensor([self.reduce(values[every != out]) for out in every])

        values = without_each(statistics)
        return jackknife_error(values if beside is None else values - without_each(beside))


@dataclass(frozen=True)
class FitnessRequest:
    """What a registered fitness is made from.

    Args:
        judge: a network that scores images, if the user gave one.
        argument: what follows the colon of the name.
    """

    judge: Judge | None
    argument: str


Maker = Callable[[FitnessRequest], Fitness]

FITNESS: dict[str, Maker] = {}


def register_fitness(name: str) -> Callable[[Maker], Maker]:
    """Decorator: make a fitness known by name to `search`, `allocate` and `compare`.

    Args:
        name: as users give it; whatever follows a colon is the maker's `argument`.
    """

    def register(maker: Maker) -> Maker:
        FITNESS[name] = maker
        return maker

    return register


def fitness_of(fitness: str | Fitness | Measure, judge: Judge | None = None) -> Fitness:
    """The fitness of a name, of a user's function, or as it is given.

    Raises:
        FitnessError: there is none of that name, it lacks a judge, or a library that it needs is not installed.
    """
    if isinstance(fitness, Fitness):
        return fitness
    if callable(fitness):
        where = getattr(fitness, "__module__", None), getattr(fitness, "__qualname__", type(fitness).__qualname__)
        return Fitness(".".join(str(part) for part in where), fitness)
    name, _, argument = str(fitness).partition(":")
    if name not in FITNESS:
        raise FitnessError(f"`fitness` must be one of {', '.join(sorted(FITNESS))}, or a function; got {fitness!r}.")
    return FITNESS[name](FitnessRequest(judge, argument))
