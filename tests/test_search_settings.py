"""Settings of a search: those that were published, and what no search can run with."""

from __future__ import annotations

import pytest

from stageprune import Round, SearchSettings
from stageprune.core.errors import SearchError


def test_published_settings():
    """As the reference notes list them: section 2.1, 2.2 and 2.4 (most evaluations 20 + 16 (G - 1))."""
    dit, sdxl = SearchSettings.published("dit"), SearchSettings.published("sdxl")
    assert (dit.generations, dit.max_levels, dit.evaluations) == (50, 5, 804)
    assert (sdxl.generations, sdxl.max_levels, sdxl.evaluations) == (100, 3, 1604)
    for published in (dit, sdxl):
        assert (published.survivors, published.offspring, published.pool, published.moves) == (4, 16, 20, 1)
        assert (published.rounds, published.patience, published.init) == ((Round(4),), None, "hybrid")
        assert not (published.unique or published.memory or published.stop_early) and published.finalists == 1
    assert SearchSettings.published("sdxl", generations=3, seed=5).seed == 5
    with pytest.raises(SearchError, match="published settings for dit and sdxl, not for 'flux'"):
        SearchSettings.published("flux")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generations": 0}, "`generations` must be at least 1, and whole; got 0"),
        ({"offspring": 1.5}, "`offspring` must be at least 1"),
        ({"patience": 0}, "`patience` must be at least 1"),
        ({"memory": -1}, "`memory` must be a number of GiB, 0 or more"),
        ({"memory": float("nan")}, "`memory`"),
        ({"seed": "a"}, "`seed` must be a whole number"),
        ({"rounds": ()}, "`rounds` must end with one on all search probes"),
        ({"rounds": (Round(4, 0.5),)}, "`rounds` must end with one on all search probes"),
        ({"rounds": (Round(2, 0.5), Round(4))}, "no more than the one before; got \\[2, 4\\]"),
        ({"rounds": (Round(0),)}, "keep at least 1"),
        ({"rounds": (Round(4, -0.5), Round(4))}, "positive and rise to 1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(SearchError, match=message):
        SearchSettings(**change)
