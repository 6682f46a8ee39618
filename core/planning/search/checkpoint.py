"""The file that a search goes on from: one safetensors file, replaced whole after every generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import SearchError
from ...files import atomic_file
from .space import Genome
from .state import SearchState

FORMAT = "stageprune.search.1"

_SHOWN = 60
"""Longest value, in characters, that a message shows."""


@dataclass(frozen=True)
class Checkpoint:
    """A file and the search that it belongs to.

    Args:
        path: of the file.
        identity: all that the search depends on, plain data, in flat names.
    """

    path: Path
    identity: Mapping[str, Any]

    def save(self, state: SearchState, rows: Mapping[Genome, Tensor]) -> None:
        """Write the file, whole or not at all.

        Args:
            state: where the search is.
            rows: what is known of each candidate, shape (probes, numbers).
        """
        genomes = list(rows)
        tensors = {
            "genomes": torch.tensor(genomes, dtype=torch.int64),
            "probes": torch.tensor([len(rows[genome]) for genome in genomes], dtype=torch.int64),
            "statistics": torch.cat([rows[genome] for genome in genomes]) if genomes else torch.zeros(0, 1).double(),
        }
        if state.products is not None:
            tensors["products"] = state.products.contiguous()
        meta = {
            "format": FORMAT,
            "identity": json.dumps(self.identity),
            "state": json.dumps(state.to_dict()),
        }
        with atomic_file(self.path) as temporary:
            save_file(tensors, temporary, metadata=meta)

    def load(self) -> tuple[SearchState, dict[Genome, Tensor]] | None:
        """What `save` wrote; None if there is no file.

        Raises:
            SearchError: it is damaged, or belongs to another search; the message says what differs.
        """
        for left in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a session that was killed as it wrote
            left.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        meta, tensors = self._read()
        try:
            self._check(json.loads(meta["identity"]))
            state = SearchState.from_dict(json.loads(meta["state"]), tensors.get("products"))
            genomes, counts = tensors["genomes"].tolist(), tensors["probes"].tolist()
            parts = torch.split(tensors["statistics"], counts)
            return state, {tuple(genome): part for genome, part in zip(genomes, parts, strict=True)}
        except SearchError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SearchError(f"`checkpoint` {self.path} is damaged ({error}). Delete it to begin anew.") from None

    def _read(self) -> tuple[Mapping[str, str], dict[str, Tensor]]:
        try:
            with safe_open(self.path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise SearchError(f"`checkpoint` {self.path} is not a valid safetensors file ({error}).") from None
        if meta.get("format") != FORMAT:
            raise SearchError(
                f"`checkpoint` {self.path}: format is {meta.get('format')!r}, this version reads {FORMAT!r}."
            )
        return meta, tensors

    def _check(self, found: Mapping[str, Any]) -> None:
        asked = json.loads(json.dumps(self.identity))
        differing = [name for name in sorted({*asked, *found}) if asked.get(name) != found.get(name)]
        if differing:
            told = ", ".join(_difference(name, found.get(name), asked.get(name)) for name in differing)
            raise SearchError(
                f"`checkpoint` {self.path} belongs to another search: not the same {told}. Delete it, or name another "
                "file."
            )


def flat(name: str, value: Any) -> dict[str, Any]:
    """Nested dictionaries as one, with dots in the names, so that a message can say which entry differs."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {inner: entry for key, part in value.items() for inner, entry in flat(f"{name}.{key}", part).items()}


def _difference(name: str, there: Any, here: Any) -> str:
    shown = f"{name} ({json.dumps(there)} there, {json.dumps(here)} here)"
    return shown if len(shown) < _SHOWN + len(name) else name
