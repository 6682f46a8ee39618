"""Which schedules to try next: mutants of the survivors, or those that a model of all that ran expects most of.

Random mutants are mostly worse than their parents, and telling so takes a run of each. A Gaussian process fitted to the
candidates so far costs nothing to ask, so that many generations of mutants can be bred by it; the best of them by the
lower bound of what it expects are run. Each is picked as if those before it had already run (Ginsbourger et al.,
"Kriging is well-suited to parallelize optimization", 2010), so that they are not all alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random

import torch
from torch import Tensor

from ..interactions import error_of
from .ledger import Ledger
from .mutation import TRIES, mutate
from .settings import SearchSettings
from .space import Genome, Space
from .surrogate import Surrogate

LEAST = 4
"""Known candidates below which there is nothing to fit."""

MOST = 320
"""Candidates that are fitted, the best first: the cost of a fit grows with their cube."""

OPTIMISM = (0.5, 1.0, 2.0, 3.0)
"""Standard deviations below the mean at which picks value a candidate, in turn: what is likely good, what may be."""

BREEDING = 1.5
"""As those of picks, in breeding."""

ROUNDS, LITTER, HERD, STRANGERS = 10, 256, 64, 32
"""Breeding by the model: rounds, mutants of each, how many live on, and random schedules that it begins with."""

PICKED_FROM = 256
"""Bred schedules that picks are made of."""

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Breeder:
    """Makes offspring.

    Args:
        space: levels, costs and the budget.
        settings: of the search.
        ledger: what is known of candidates.
        counts: probes of each round of a selection.
        products: of an error table, as `ErrorTable.interactions`; None if there is none.
        random: what is drawn from.
    """

    space: Space
    settings: SearchSettings
    ledger: Ledger
    counts: Sequence[int]
    products: Tensor | None
    random: Random

    def offspring(self, survivors: Sequence[Genome]) -> list[Genome]:
        """New schedules; fewer than asked for if new ones are hard to find."""
        model = self._model() if self.settings.guided else None
        return self._mutants(survivors) if model is None else self._bred(survivors, model)

    def _mutants(self, survivors: Sequence[Genome]) -> list[Genome]:
        """Of random survivors."""
        made: list[Genome] = []
        for _ in range(TRIES * self.settings.offspring):
            if len(made) == self.settings.offspring:
                break
            child = self._mutant(survivors)
            if not self.settings.unique or not (child in self.ledger or child in made):
                made.append(child)
        return made

    def _mutant(self, parents: Sequence[Genome]) -> Genome:
        settings = self.settings
        return mutate(self.random.choice(parents), self.space, settings.moves, settings.max_levels, self.random)

    def _model(self) -> Surrogate | None:
        """Of all candidates; of those that fell out early by what they gave on fewer probes."""
        whole, first = self._known(self.counts[-1]), self._known(self.counts[0])
        early = {genome: value for genome, value in first.items() if genome not in whole}
        begun = [first[genome] for genome in whole if genome in first]
        if len(whole) < LEAST or len(begun) < len(whole):
            return None
        logarithmic = min(*whole.values(), *first.values()) > 0  # as errors are, over orders of magnitude
        values, part, start = (_scaled(each, logarithmic) for each in (whole.values(), early.values(), begun))
        later = values - start
        noise = torch.zeros(len(whole) + len(early), dtype=torch.float64)
        noise[len(whole) :] = later.var() / values.var().clamp(min=_TINY)
        every, genomes = torch.cat([values, part + later.mean()]), [*whole, *early]
        best = every.argsort(stable=True)[:MOST]
        chosen = [genomes[place] for place in best]
        return Surrogate(self._points(chosen), every[best], self._drift(chosen), noise[best])

    def _known(self, probes: int) -> dict[Genome, float]:
        """Candidates that ran on so many probes -> their fitness on these, where it is a number."""
        ran = [genome for genome in self.ledger.rows if self.ledger.probes(genome) >= probes]
        values = {genome: self.ledger.value(genome, probes) for genome in ran}
        return {genome: value for genome, value in values.items() if math.isfinite(value)}

    def _points(self, genomes: Sequence[Genome]) -> Tensor:
        return torch.tensor([self.space.levels(genome) for genome in genomes], dtype=torch.float64)

    def _drift(self, genomes: Sequence[Genome]) -> Tensor:
        """What the mean is regressed on: a constant, and the logarithm of what the error table predicts."""
        constant = torch.ones(len(genomes), dtype=torch.float64)
        if self.products is None:
            return constant[:, None]
        predicted = torch.tensor([error_of(genome, self.products) for genome in genomes], dtype=torch.float64)
        return torch.stack([constant, predicted.clamp(min=_TINY).log()], 1)

    def _bred(self, survivors: Sequence[Genome], model: Surrogate) -> list[Genome]:
        """Mutants of mutants, as many rounds as there are, those that the model values most; then the picks of them."""
        herd = list(dict.fromkeys([*survivors, *(self.space.draw(self.random) for _ in range(STRANGERS))]))
        seen: dict[Genome, float] = {}
        for _ in range(ROUNDS):
            herd = list(dict.fromkeys([*herd, *(self._mutant(herd) for _ in range(LITTER))]))
            fresh = [genome for genome in herd if genome not in seen]
            if fresh:
                mean, covariance = model.predict(self._points(fresh), self._drift(fresh))
                seen |= zip(fresh, _bound(mean, covariance, BREEDING).tolist(), strict=True)
            herd = sorted(herd, key=lambda genome: (seen[genome], genome))[:HERD]
        new = [genome for genome in sorted(seen, key=lambda each: (seen[each], each)) if genome not in self.ledger]
        return self._picked(new[:PICKED_FROM], model)

    def _picked(self, genomes: Sequence[Genome], model: Surrogate) -> list[Genome]:
        """Those of the lowest bound, one after the other, each as if those before it had run as expected."""
        if not genomes:
            return []
        mean, covariance = model.predict(self._points(genomes), self._drift(genomes))
        picked: list[int] = []
        for optimism, _ in zip(cycle(OPTIMISM), range(min(self.settings.offspring, len(genomes))), strict=False):
            bound = _bound(mean, covariance, optimism)
            bound[picked] = math.inf
            picked.append(place := int(bound.argmin()))
            known = covariance[:, place].clone()
            covariance = covariance - torch.outer(known, known) / known[place].clamp(min=_TINY)
        return [genomes[place] for place in picked]


def _scaled(values: Iterable[float], logarithmic: bool) -> Tensor:
    found = torch.tensor([*values], dtype=torch.float64)
    return found.log() if logarithmic else found


def _bound(mean: Tensor, covariance: Tensor, optimism: float) -> Tensor:
    return mean - optimism * covariance.diagonal().clamp(min=0).sqrt()
