"""What an evolutionary search is set to: our defaults, and Diff-ES's published settings as a preset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import SearchError

_PUBLISHED: dict[str, dict[str, int]] = {
    "dit": {"generations": 50, "max_levels": 5},
    "sdxl": {"generations": 100, "max_levels": 3},
}
"""Model -> what its README example sets; all else is alike."""


@dataclass(frozen=True)
class Round:
    """One round of a selection: the candidates are judged on some probes, and the best go on.

    Args:
        keep: how many go on.
        share: of the search probes that they are judged on, in (0, 1].
    """

    keep: int
    share: float = 1.0


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the evolution. The defaults are ours; `published` gives those of Diff-ES.

    Args:
        generations: pools that are judged, the initial one included; at least 1.
        offspring: new schedules of each generation. The initial pool has `survivors` more.
        rounds: of each selection, with falling `keep` and rising `share`, the last on all search probes (EvoPress's
            selection: many candidates on few probes, few on many). The parents join in the last one.
        guided: whether offspring are those that a model of all candidates so far expects most of, bred by it over many
            generations of mutants; False draws mutants of the survivors, as Diff-ES does.
        moves: most level switches of a mutation; how many is the smaller of two draws from 1 to `moves`.
        max_levels: most levels that a switch moves a stage by.
        patience: generations without a better schedule after which the search ends; None never ends it early.
        init: the initial pool, if `search` is given none: `random`, `uniform`, `patterns`, `hybrid`, or any strategy of
            `allocate` to start warm from.
        finalists: how many of the best are run on held-out probes, where the winner is chosen; 1 takes the best on the
            search probes.
        unique: try no schedule twice.
        memory: GiB of sampler states to keep on the pipeline's device, so that a candidate starts where it departs from
            what was run; 0 keeps none.
        stop_early: give a candidate up as soon as the probes that it was run on exclude that it goes on. Results are
            the same either way.
        seed: of all that is drawn.

    Raises:
        SearchError: a number is out of range.
    """

    generations: int = 40
    offspring: int = 16
    rounds: tuple[Round, ...] = (Round(8, 0.25), Round(4))
    guided: bool = True
    moves: int = 3
    max_levels: int = 3
    patience: int | None = 6
    init: str = "measured"
    finalists: int = 4
    unique: bool = True
    memory: float = 1.0
    stop_early: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", tuple(self.rounds))
        for problem in self._problems():
            raise SearchError(f"search settings: {problem}.")

    @classmethod
    def published(cls, model: str = "dit", **changes: Any) -> SearchSettings:
        """Those of Diff-ES (arXiv 2603.05105), as its reference code's README runs it on a model.

        20 individuals of which 4 survive, one round on all probes, one switch a mutation, a hybrid initial pool, no
        patience, the winner by its fitness on the search probes; it tries schedules again, shares no states and stops
        nothing early. What belongs to the run is for the caller: 10 stages; on DiT 64 probes, 20 steps, half the levels
        (`sparsity:0.5`) and the no-reference score `iqa:topiq_nr`; on SDXL 4 probes, 20 steps, `sparsity:0.3` and
        `image_ssim`. Its command line's own default is `latent_mse`. Half of the given prompts are held out.

        Args:
            model: `dit` (50 generations, switches of up to 5 levels) or `sdxl` (100, up to 3).
            changes: settings to change.

        Example:
            >>> SearchSettings.published("dit").evaluations
            804
        """
        if model not in _PUBLISHED:
            raise SearchError(f"there are published settings for {' and '.join(_PUBLISHED)}, not for {model!r}.")
        fixed = {
            "offspring": 16,
            "rounds": (Round(4),),
            "guided": False,
            "moves": 1,
            "patience": None,
            "init": "hybrid",
            "finalists": 1,
            "unique": False,
            "memory": 0.0,
            "stop_early": False,
        }
        return cls(**{**fixed, **_PUBLISHED[model], **changes})

    @property
    def survivors(self) -> int:
        """Schedules that each generation leaves."""
        return self.rounds[-1].keep

    @property
    def pool(self) -> int:
        """Schedules of the initial pool."""
        return self.survivors + self.offspring

    @property
    def evaluations(self) -> int:
        """Candidates of a search that runs to its last generation."""
        return self.pool + self.offspring * (self.generations - 1)

    def _problems(self) -> Iterator[str]:
        """What is wrong with them."""
        for name in ("generations", "offspring", "moves", "max_levels", "finalists", "patience"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                yield f"`{name}` must be at least 1, and whole; got {value!r}"
        if type(self.seed) is not int:
            yield f"`seed` must be a whole number, got {self.seed!r}"
        if not 0 <= self.memory < math.inf:
            yield f"`memory` must be a number of GiB, 0 or more; got {self.memory!r}"
        yield from self._problems_of_rounds()

    def _problems_of_rounds(self) -> Iterator[str]:
        keeps, shares = [each.keep for each in self.rounds], [each.share for each in self.rounds]
        if not self.rounds or shares[-1] != 1:
            yield "`rounds` must end with one on all search probes (share 1)"
            return
        if any(type(keep) is not int or keep < 1 for keep in keeps) or keeps != sorted(keeps, reverse=True):
            yield f"each of `rounds` must keep at least 1, and no more than the one before; got {keeps}"
        if any(share <= 0 for share in shares) or shares != sorted(shares):
            yield f"the shares of `rounds` must be positive and rise to 1, got {shares}"
