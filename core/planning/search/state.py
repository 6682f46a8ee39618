"""Where a search is: all that the rest of it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from torch import Tensor

from .result import Cost, Finalist, Generation
from .space import Genome
from .trie import Key


@dataclass
class SearchState:
    """Between two generations.

    Args:
        random: what is drawn from.
        costs: sparsity -> cost of a call; kept because measured times differ from day to day.
        survivors: best first.
        starts: schedules that a warm start began with, the most important first.
        products: of the error table that the initial pool was made from; None if there was none.
        pool: the initial one, from when it is made until it is judged.
        stale: generations since the best one became better.
        history: generations so far.
        reason: why the search has ended; empty while it has not.
        finalists: best first, once they were run.
        dense: fitness of the dense model.
        keys: of the states that are kept, least recently used first.
        cost: so far.
    """

    random: Random
    costs: dict[float, int]
    survivors: list[Genome] = field(default_factory=list)
    starts: list[Genome] = field(default_factory=list)
    products: Tensor | None = None
    pool: list[Genome] = field(default_factory=list)
    stale: int = 0
    history: list[Generation] = field(default_factory=list)
    reason: str = ""
    finalists: list[Finalist] = field(default_factory=list)
    dense: float = 0.0
    keys: list[Key] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all but `products`."""
        return {
            "random": self.random.getstate(),
            "costs": list(self.costs.items()),
            "survivors": self.survivors,
            "starts": self.starts,
            "pool": self.pool,
            "stale": self.stale,
            "history": [asdict(generation) for generation in self.history],
            "reason": self.reason,
            "finalists": [asdict(finalist) for finalist in self.finalists],
            "dense": self.dense,
            "keys": self.keys,
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], products: Tensor | None = None) -> SearchState:
        """Inverse of `to_dict`, of JSON. KeyError, TypeError or ValueError if the data are damaged."""
        random = Random()
        version, numbers, gauss = data["random"]
        random.setstate((version, tuple(numbers), gauss))
        return cls(
            random=random,
            costs={float(sparsity): int(cost) for sparsity, cost in data["costs"]},
            survivors=[tuple(genome) for genome in data["survivors"]],
            starts=[tuple(genome) for genome in data["starts"]],
            products=products,
            pool=[tuple(genome) for genome in data["pool"]],
            stale=data["stale"],
            history=[Generation.from_dict(each) for each in data["history"]],
            reason=data["reason"],
            finalists=[Finalist.from_dict(each) for each in data["finalists"]],
            dense=data["dense"],
            keys=[(block, tuple(path)) for block, path in data["keys"]],
            cost=Cost(**data["cost"]),
        )
