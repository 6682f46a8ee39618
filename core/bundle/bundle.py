"""A bundle: bank and default schedule as a folder that can be saved, shared and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BundleError, ScheduleError
from ..files import atomic_folder, replaceable
from ..groups import Group, consumer_sites
from ..pruning import Bank, Consumer, ConsumerKey
from ..schedule import StageSchedule
from ..version import __version__
from .card import model_card
from .manifest import MANIFEST, TENSORS, FileEntry, Manifest, read_manifest

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bank and the schedule it runs by default.

    Args:
        bank: what pruning yielded.
        schedule: the default schedule; None for a bank alone, which must be enabled with a schedule of its own.

    Example:
        >>> Bundle(bank, StageSchedule.from_levels([0, 0.3, 0.5])).save("out/bundle")
        >>> pipe.enable_stage_pruning("out/bundle")
    """

    bank: Bank
    schedule: StageSchedule | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None:
            self.bank.bind(self.schedule)

    @property
    def planned_steps(self) -> int | None:
        """Sampling steps that the schedule was planned for, or else those of the calibration; None if nothing tells."""
        planned = None if self.schedule is None else self.schedule.planned_steps
        return planned or (self.bank.provenance.get("calibration") or {}).get("steps")

    def save(self, path: str | Path, *, only_used: bool = False) -> Path:
        """Write the folder, whole or not at all; an existing bundle there is replaced.

        Args:
            path: the folder.
            only_used: leave out levels that the schedule does not use (a smaller bundle that runs this schedule only).
        """
        target = check_bundle_folder(path)
        bundle = self.trimmed() if only_used else self
        with atomic_folder(target) as folder:
            save_file(bundle._tensors(), folder / TENSORS, metadata={"format": "pt"})
            manifest = replace(bundle._manifest(), files={TENSORS: _entry(folder / TENSORS)})
            (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
            (folder / "README.md").write_text(model_card(bundle.bank, bundle.schedule, manifest), "utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read and check a bundle folder. BundleError names the file, key and value that is wrong.

        Nothing is executed or unpickled, and no path leaves the folder. The denoiser is checked when it is enabled.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        tensors = _read_tensors(folder / TENSORS)
        bank = _bank(manifest, tensors, folder / TENSORS)
        try:
            return cls(bank, manifest.schedule)
        except ScheduleError as error:
            raise BundleError(f"{folder / MANIFEST}: `schedule` does not fit the bank: {error}") from None

    def trimmed(self) -> Bundle:
        """The bundle without the levels that its schedule does not use."""
        if self.schedule is None:
            raise BundleError("a bundle without a schedule cannot be trimmed to it; save it whole.")
        bank = self.bank
        levels = sorted({0, *(bank.level_of(sparsity) for sparsity in self.schedule.levels)})
        consumers = {
            ConsumerKey(key.path, levels.index(key.level), key.stage): consumer
            for key, consumer in bank.consumers.items()
            if key.level in levels
        }
        kept = {name: tuple(counts[level] for level in levels) for name, counts in bank.kept.items()}
        sparsities = tuple(bank.sparsities[level] for level in levels)
        realised = bank.provenance.get("realised", ())
        provenance = (
            {**bank.provenance, "realised": [realised[level] for level in levels]} if realised else bank.provenance
        )
        return Bundle(
            replace(bank, consumers=consumers, kept=kept, sparsities=sparsities, provenance=provenance), self.schedule
        )

    def _manifest(self) -> Manifest:
        bank = self.bank
        first = next(iter(bank.consumers.values()), None)
        return Manifest(
            library_version=__version__,
            base_model=str((bank.provenance.get("calibration") or bank.provenance).get("model", "")),
            component=bank.component,
            denoiser=bank.denoiser,
            fingerprint=bank.fingerprint,
            method=bank.method,
            groups=bank.groups,
            sparsities=bank.sparsities,
            kept=bank.kept,
            edges=bank.edges,
            order_sharing=bank.order_sharing,
            consumer_sharing=bank.consumer_sharing,
            consumers=bank.consumer_shapes,
            dtype=str(first.weight.dtype).removeprefix("torch.") if first else "float32",
            schedule=self.schedule,
            realised=tuple(bank.provenance.get("realised", ())),
            provenance=bank.provenance,
        )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            f"order.{name}": order.to(torch.int32).contiguous().cpu() for name, order in self.bank.orders.items()
        }
        for key, consumer in self.bank.consumers.items():
            tensors[_name(key, "weight")] = consumer.weight.contiguous().cpu()
            tensors[_name(key, "bias")] = consumer.bias.contiguous().cpu()
        return tensors


def check_bundle_folder(path: str | Path) -> Path:
    """The folder, if a bundle may be written there: BundleError if something else is. Costs nothing, so ask first."""
    target = Path(path)
    if not replaceable(target, MANIFEST):
        raise BundleError(f"{target} exists and is not a bundle; it is not overwritten. Name another folder.")
    return target


def _name(key: ConsumerKey, part: str) -> str:
    return f"consumer.{key.path}.level{key.level}.stage{key.stage}.{part}"


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path}: missing, though the manifest lists it.")
    if not path.resolve().is_relative_to(folder.resolve()) and not _is_hub_cache(path):
        raise BundleError(f"{path}: links to a file outside the bundle.")
    if path.stat().st_size != entry.size:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes, the manifest says {entry.size}; the file is incomplete."
        )
    got = _entry(path).sha256
    if got != entry.sha256:
        raise BundleError(
            f"{path}: sha256 is {got[:12]}..., the manifest says {entry.sha256[:12]!r}...; the file is damaged."
        )


def _is_hub_cache(path: Path) -> bool:
    """The Hub's cache keeps a snapshot as links into its own `blobs` folder, two levels up."""
    blobs = path.parent.parent.parent / "blobs"
    return path.parent.parent.name == "snapshots" and path.resolve().parent == blobs.resolve()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise BundleError(f"{path}: not a valid safetensors file ({error}).") from None


def _bank(manifest: Manifest, tensors: dict[str, Tensor], path: Path) -> Bank:
    """Check every tensor against the manifest and assemble the bank."""
    stages = len(manifest.edges) - 1
    order_stages = stages if manifest.order_sharing == "stage" else 1
    consumer_stages = stages if "stage" in (manifest.order_sharing, manifest.consumer_sharing) else 1
    keys = _keys_in(tensors, manifest, consumer_stages, path)
    orders = {g.name: _order(tensors[f"order.{g.name}"], g, order_stages, manifest, path) for g in manifest.groups}
    consumers = {}
    for key in keys:
        out, _, *kernel = manifest.consumers[key.path]
        shape = (out, _kept_width(manifest, key), *kernel)
        weight = _checked(tensors[_name(key, "weight")], shape, manifest.dtype, _name(key, "weight"), path)
        bias = _checked(tensors[_name(key, "bias")], (out,), manifest.dtype, _name(key, "bias"), path)
        consumers[key] = Consumer(weight, bias)
    return Bank(
        denoiser=manifest.denoiser,
        component=manifest.component,
        groups=manifest.groups,
        sparsities=manifest.sparsities,
        kept=manifest.kept,
        orders=orders,
        consumers=consumers,
        edges=manifest.edges,
        method=manifest.method,
        fingerprint=manifest.fingerprint,
        provenance=manifest.provenance,
        consumer_shapes=manifest.consumers,
    )


def _keys_in(tensors: Collection[str], manifest: Manifest, stages: int, path: Path) -> list[ConsumerKey]:
    """The keys of the consumers. BundleError unless the file holds all tensors that the manifest promises and no other.

    A small manifest can promise any number of them, so the first one that is missing ends it.
    """
    keys, unknown = [], set(tensors)

    def take(name: str) -> None:
        if name not in unknown:
            raise BundleError(f"{path}: tensor `{name}` is missing.")
        unknown.remove(name)

    for group in manifest.groups:
        take(f"order.{group.name}")
    for place in product(manifest.consumers, range(1, len(manifest.sparsities)), range(stages)):
        keys.append(ConsumerKey(*place))
        for part in ("weight", "bias"):
            take(_name(keys[-1], part))
    if unknown:
        raise BundleError(f"{path}: tensor `{min(unknown)}` is unknown to the manifest.")
    return keys


def _order(tensor: Tensor, group: Group, stages: int, manifest: Manifest, path: Path) -> Tensor:
    shape = (stages, group.size) if manifest.order_sharing == "stage" else (group.size,)
    name = f"order.{group.name}"
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise BundleError(f"{path}: `{name}` must be int32 of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}.")
    order = tensor.long()
    for row in order.reshape(-1, group.size):
        if not torch.equal(row.sort().values, torch.arange(group.size)):
            wrong = row[(row < 0) | (row >= group.size)]
            value = int(wrong[0]) if len(wrong) else int(row.sort().values.diff().eq(0).nonzero()[0, 0])
            why = f"index {value} is out of range" if len(wrong) else "an index appears twice"
            raise BundleError(f"{path}: `{name}` is not a permutation of 0 to {group.size - 1}: {why}.")
    return order


def _kept_width(manifest: Manifest, key: ConsumerKey) -> int:
    entries = consumer_sites(manifest.groups)[key.path]
    removed = sum((group.size - manifest.kept[group.name][key.level]) * group.width for group, _ in entries)
    return manifest.consumers[key.path][1] - removed


def _checked(tensor: Tensor, shape: tuple[int, ...], dtype: str, name: str, path: Path) -> Tensor:
    if tensor.dtype != _DTYPES[dtype] or tuple(tensor.shape) != shape:
        raise BundleError(
            f"{path}: `{name}` must be {dtype} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise BundleError(f"{path}: `{name}` holds NaN or infinity.")
    return tensor
