"""States of trajectories by the levels that led to them, within a memory bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from ...host import SamplerState

Path = tuple[int, ...]
"""Levels of the segments run so far."""

Key = tuple[int, Path]
"""Block of probes, and path."""


class StateTrie:
    """Sampler states keyed by block and path; those not used for longest go first when memory is short.

    A dictionary of paths is a trie whose nodes are found without walking to them. Whatever uses a node uses those above
    it, the one nearest to the root last: of one path the deepest states, which fewest candidates share, go first.

    An entry may lack its state: it was there before the search was killed, or is in another process. Such an entry
    counts as the others do, so that what is kept and what goes depend on the sequence of uses alone, and the steps that
    a search spends are the same however often it was interrupted.

    Args:
        limit: bytes of all states.
        size: bytes of the state that a key stands for.
    """

    def __init__(self, limit: int, size: Callable[[Key], int]) -> None:
        self.limit, self.size, self.used = limit, size, 0
        self._entries: OrderedDict[Key, SamplerState | None] = OrderedDict()

    def longest(self, block: int, path: Path) -> int:
        """Length of the longest prefix of `path` that has an entry, 0 if there is none. It counts as used."""
        self.use(block, path)
        return next((length for length in range(len(path), 0, -1) if (block, path[:length]) in self._entries), 0)

    def use(self, block: int, path: Path) -> None:
        """Count all entries along a path as used."""
        for length in range(len(path), 0, -1):
            if (block, path[:length]) in self._entries:
                self._entries.move_to_end((block, path[:length]))

    def state(self, key: Key) -> SamplerState | None:
        """The state of a key, if it is here."""
        return self._entries.get(key)

    def put(self, key: Key, state: SamplerState | None) -> None:
        """Add an entry, and drop the least recently used ones until there is room. It is not kept where only entries on
        its own path could make room.

        Args:
            key: not an entry yet; those above it were used last.
            state: None if it is not here.
        """
        size, (block, path) = self.size(key), key
        while self.used + size > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest == (block, path[: len(oldest[1])]):
                return
            del self._entries[oldest]
            self.used -= self.size(oldest)
        self._entries[key] = state
        self.used += size

    def restore(self, key: Key, state: SamplerState) -> None:
        """Give an entry, if it is one, its state back. It does not count as a use."""
        if key in self._entries:
            self._entries[key] = state

    def keys(self) -> list[Key]:
        """All keys, least recently used first."""
        return list(self._entries)

    def reset(self, keys: Iterable[Key]) -> None:
        """Let `keys` be the entries, least recently used first; the states of those that are here stay."""
        states = dict(self._entries)
        self._entries = OrderedDict((key, states.get(key)) for key in keys)
        self.used = sum(map(self.size, self._entries))
