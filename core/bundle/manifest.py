"""The manifest `stageprune.json`: plain data in, validated values out. Nothing here touches a model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BundleError, ScheduleError
from ..fingerprint import Fingerprint
from ..groups import Attribute, Cols, Group, Rows, Term, UnitCost
from ..schedule import StageSchedule

FORMAT = "stageprune.bundle"
FORMAT_VERSION = 1
MANIFEST = "stageprune.json"
TENSORS = "bank.safetensors"
MAX_MANIFEST_BYTES = 32 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """Checksum and size of a file of the bundle."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """All of a bundle but its tensors. `consumers` holds the weight's shape of each dense consumer."""

    library_version: str
    base_model: str
    component: str
    denoiser: str
    fingerprint: Fingerprint
    method: str
    groups: tuple[Group, ...]
    sparsities: tuple[float, ...]
    kept: Mapping[str, tuple[int, ...]]
    edges: tuple[float, ...]
    order_sharing: str
    consumer_sharing: str
    consumers: Mapping[str, tuple[int, ...]]
    dtype: str
    schedule: StageSchedule | None
    realised: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text. BundleError if a number outside the provenance is not finite: it could not be read again."""
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "fingerprint": self.fingerprint.to_dict(),
            "schedule": self.schedule.to_dict() if self.schedule else None,
            "provenance": _told(self.provenance),
        }
        try:
            return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
        except ValueError as error:
            raise BundleError(f"{MANIFEST}: a share or an edge is not a finite number.") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `stageprune.json`. BundleError names the file, the key and the value that is wrong."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder.")
    if not path.is_file():
        raise BundleError(f"{path}: missing; {folder.name} is not a bundle (make one with `stageprune prune`).")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: {path.stat().st_size} bytes, at most {MAX_MANIFEST_BYTES} are read.")
    try:
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}).") from None
    return _parse(_Reader(data, str(path)))


class _Reader:
    """Typed access to parsed JSON whose errors name the file and the key."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where}: expected an object, got {type(data).__name__}.")
        self.data: dict[str, Any] = data
        self.where = where

    def get(self, key: str, kind: type[T] | tuple[type, ...]) -> Any:
        """The value at `key`, of this type (bool is no number here)."""
        if key not in self.data:
            raise BundleError(f"{self.where}: key `{key}` is missing.")
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = kind.__name__ if isinstance(kind, type) else "/".join(k.__name__ for k in kind)
            raise BundleError(f"{self.where}: `{key}` must be {wanted}, got {value!r:.80}.")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.get(key, list)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise BundleError(f"{self.where}: `{key}` must hold finite numbers, got {value!r:.80}.")
        return tuple(float(value) for value in values)

    def fail(self, key: str, why: str) -> BundleError:
        """An error about `key`, to be raised."""
        return BundleError(f"{self.where}: `{key}` {why}.")


def _parse(reader: _Reader) -> Manifest:
    if reader.get("format", str) != FORMAT:
        raise reader.fail("format", f"must be {FORMAT!r}, got {reader.data['format']!r:.80}")
    version = reader.get("format_version", int)
    if version != FORMAT_VERSION:
        remedy = "update stageprune" if version > FORMAT_VERSION else "make the bundle again"
        raise reader.fail("format_version", f"is {version}, this library reads {FORMAT_VERSION}: {remedy}")
    groups = tuple(
        _group(_Reader(item, f"{reader.where}: groups[{i}]")) for i, item in enumerate(reader.get("groups", list))
    )
    if not groups or len({group.name for group in groups}) != len(groups):
        raise reader.fail("groups", "must be non-empty and have unique names")
    sparsities = reader.numbers("sparsities")
    if sparsities[:1] != (0.0,) or list(sparsities) != sorted(set(sparsities)) or sparsities[-1] >= 1:
        raise reader.fail("sparsities", f"must rise from 0 and stay below 1, got {list(sparsities)}")
    edges = reader.numbers("edges")
    if len(edges) < 2 or edges[0] != 1 or edges[-1] != 0 or list(edges) != sorted(set(edges), reverse=True):
        raise reader.fail("edges", f"must fall from 1 to 0, got {list(edges)}")
    return Manifest(
        library_version=reader.get("library_version", str),
        base_model=reader.get("base_model", str),
        component=reader.get("component", str),
        denoiser=reader.get("denoiser", str),
        fingerprint=_try(reader, "fingerprint", lambda: Fingerprint.from_dict(reader.get("fingerprint", dict))),
        method=reader.get("method", str),
        groups=groups,
        sparsities=sparsities,
        kept=_kept(reader, groups, len(sparsities)),
        edges=edges,
        order_sharing=_choice(reader, "order_sharing", ("shared", "stage")),
        consumer_sharing=_choice(reader, "consumer_sharing", ("shared", "stage")),
        consumers=_consumers(reader, groups),
        dtype=_choice(reader, "dtype", ("float32", "float16", "bfloat16", "float64")),
        schedule=_schedule(reader),
        realised=reader.numbers("realised"),
        provenance=_provenance(reader),
        files=_files(reader),
    )


def _group(reader: _Reader) -> Group:
    def parts(key: str) -> list[_Reader]:
        return [_Reader(item, f"{reader.where}.{key}[{i}]") for i, item in enumerate(reader.get(key, list))]

    kind = _choice(reader, "kind", ("head", "neuron", "channel", "block"))
    size, width = reader.get("size", int), reader.get("width", int)
    if kind == "block":
        return _blocks(reader, size, width)
    if size < 1 or width < 1:
        raise reader.fail("size", f"and `width` must be at least 1, got {size} and {width}")
    return Group(
        name=reader.get("name", str),
        kind=kind,  # type: ignore[arg-type]
        size=size,
        width=width,
        producers=tuple(Rows(part.get("path", str), part.get("blocks", int)) for part in parts("producers")),
        consumers=tuple(Cols(part.get("path", str), part.get("offset", int)) for part in parts("consumers")),
        companions=tuple(str(path) for path in reader.get("companions", list)),
        attributes=tuple(
            Attribute(part.get("path", str), part.get("name", str), part.get("per_unit", int))
            for part in parts("attributes")
        ),
        cost=_cost(_Reader(reader.get("cost", dict), f"{reader.where}.cost")),
    )


def _blocks(reader: _Reader, size: int, width: int) -> Group:
    """A group of whole blocks: paths instead of layers."""
    blocks, passes = (tuple(map(str, reader.get(key, list))) for key in ("blocks", "passes"))
    if size < 1 or width != 0 or len(blocks) != size:
        raise reader.fail("blocks", f"must name {size} blocks, of width 0; got {len(blocks)} of width {width}")
    layers = [key for key in ("producers", "consumers", "companions", "attributes") if reader.get(key, list)]
    if layers:
        raise reader.fail(layers[0], "must be empty for whole blocks")
    return Group(reader.get("name", str), "block", size, width, blocks=blocks, passes=passes)


def _cost(reader: _Reader) -> UnitCost:
    terms = [_Reader(item, f"{reader.where}.terms[{i}]") for i, item in enumerate(reader.get("terms", list))]
    return UnitCost(tuple(Term(term.get("macs", int), tuple(map(str, term.get("streams", list)))) for term in terms))


def _kept(reader: _Reader, groups: tuple[Group, ...], levels: int) -> dict[str, tuple[int, ...]]:
    kept = _Reader(reader.get("kept", dict), f"{reader.where}: kept")
    result = {}
    for group in groups:
        counts = kept.get(group.name, list)
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
        if not whole or len(counts) != levels:
            raise kept.fail(group.name, f"must hold {levels} whole numbers, one a level, got {counts!r:.80}")
        if counts[0] != group.size or any(not 1 <= count <= group.size for count in counts):
            raise kept.fail(
                group.name, f"must begin with all {group.size} units and stay in 1 to {group.size}, got {counts}"
            )
        if counts != sorted(counts, reverse=True):
            raise kept.fail(group.name, f"must not rise from level to level, got {counts}")
        result[group.name] = tuple(counts)
    if set(kept.data) != set(result):
        raise reader.fail("kept", f"names groups that do not exist: {sorted(set(kept.data) - set(result))[:3]}")
    return result


def _consumers(reader: _Reader, groups: tuple[Group, ...]) -> dict[str, tuple[int, ...]]:
    table = _Reader(reader.get("consumers", dict), f"{reader.where}: consumers")
    paths = {consumer.path for group in groups for consumer in group.consumers}
    if set(table.data) != paths:
        raise reader.fail(
            "consumers", f"must name exactly the groups' consumers; differs in {sorted(paths ^ set(table.data))[:3]}"
        )
    result = {}
    for path in table.data:
        shape = table.get(path, list)
        if len(shape) not in (2, 4) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
            raise table.fail(path, f"must be [out, in], or [out, in, kh, kw] of a convolution, got {shape!r:.80}")
        result[path] = tuple(shape)
    for group in groups:
        for consumer in group.consumers:
            if not 0 <= consumer.offset <= result[consumer.path][1] - group.channels:
                raise table.fail(consumer.path, f"is too narrow for group `{group.name}` at column {consumer.offset}")
    return result


def _schedule(reader: _Reader) -> StageSchedule | None:
    data = reader.get("schedule", (dict, type(None)))
    return None if data is None else _try(reader, "schedule", lambda: StageSchedule.from_dict(data))


def _told(value: Any) -> Any:
    """Provenance with numbers that JSON lacks as text: some samplers have an infinite limit among their settings."""
    if isinstance(value, Mapping):
        return {key: _told(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _provenance(reader: _Reader) -> dict[str, Any]:
    data: dict[str, Any] = reader.get("provenance", dict)
    if not isinstance(data.get("calibration"), dict | None):
        raise reader.fail("provenance", "must hold an object or null at `calibration`")
    return data


def _files(reader: _Reader) -> dict[str, FileEntry]:
    table = _Reader(reader.get("files", dict), f"{reader.where}: files")
    if TENSORS not in table.data:
        raise table.fail(TENSORS, "is missing")
    result = {}
    for name in table.data:
        # A bundle is flat: a name with any separator, drive or dots could leave the folder.
        if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
            raise reader.fail("files", f"must be plain file names inside the bundle, got {name!r:.80}")
        entry = _Reader(table.data[name], f"{table.where}.{name}")
        result[name] = FileEntry(entry.get("sha256", str), entry.get("size", int))
    return result


def _choice(reader: _Reader, key: str, allowed: tuple[str, ...]) -> str:
    value: str = reader.get(key, str)
    if value not in allowed:
        raise reader.fail(key, f"must be one of {', '.join(allowed)}, got {value!r:.80}")
    return value


def _try(reader: _Reader, key: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (ScheduleError, TypeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise reader.fail(key, f"is invalid: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return dict(pairs)


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
