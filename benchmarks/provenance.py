"""Which state of the code a row of results is of, so that rows need be measured again only where it has changed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

ENGINE = ("bundle", "calibration", "groups", "hosts", "pruning", "runtime", "schedule", "static")
PACKAGES = {"engine": ENGINE, "planner": (*ENGINE, "planning"), "search": (*ENGINE, "planning")}
"""Kind of code -> the packages of `core` that banks and how they run depend on; that plans do; that searches do."""

BUT = {"planner": "planning/search"}
"""Kind of code -> what does not belong to it, in these packages."""


@cache
def code(kind: str = "engine") -> str:
    """Identifies the code of a kind, whatever its comments and docstrings say: rows of one state belong together."""
    digest = hashlib.sha256()
    core = ROOT / "core"
    without = core / BUT[kind] if kind in BUT else None
    for path in sorted(path for part in PACKAGES[kind] for path in (core / part).rglob("*.py")):
        if without in path.parents:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [part for part in node.body if not _is_text(part)]
        digest.update(f"{path.relative_to(ROOT)}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def needed(rows: Mapping[str, Any], key: str, again: bool, kind: str = "engine") -> bool:
    """Whether a row is still to be measured; with `again`, also if another state of the code measured it."""
    return key not in rows or (again and rows[key].get(kind) != code(kind))


def stamped(row: Mapping[str, Any], before: Mapping[str, Any] | None, kind: str = "engine") -> dict[str, Any]:
    """A row with its state of the code and, if another one measured it before, whether all but the time is the same."""
    stamp: dict[str, Any] = {kind: code(kind)}
    if before is not None:
        as_written = json.loads(json.dumps(row))
        stamp["same_again"] = all(before.get(key) == value for key, value in as_written.items() if key != "seconds")
    return {**stamp, **row}


def told(results: Mapping[str, Mapping[str, Any]], kind: str = "engine") -> str:
    """For readers: of how many states of the code the rows are, and what measuring rows again has shown."""
    rows = [row for data in results.values() for row in data["rows"].values()]
    count = Counter(row.get(kind) for row in rows)
    most = max((state for state in count if state), key=lambda state: count[state], default=None)
    text = f"{count[most]} of {len(rows)} rows are of one state of the {kind}'s code, the others of earlier ones."
    if most is None:
        text = f"The rows are of earlier states of the {kind}'s code."
    elif len(count) == 1:
        text = f"All rows are of one state of the {kind}'s code."
    again = [row["same_again"] for row in rows if "same_again" in row]
    if again:
        text += (
            f" {len(again)} of them an earlier one had measured too (`--again`): {sum(again)} came out the same to "
            "the last digit."
        )
    return text
