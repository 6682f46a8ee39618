"""The error table: what it costs, in final error, to run one stage at one level."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import progress
from ..errors import AllocationError
from ..host import Host
from ..pruning import Bank
from ..schedule import StageSchedule
from .interactions import error_of
from .probes import Probes
from .sampling import Sampling


@dataclass(frozen=True)
class TableOrigin:
    """What an error table was measured with, beside its stages and levels. It holds for nothing else.

    Args:
        steps: sampling steps.
        guidance: guidance scale.
        size: of the images in pixels, height and width; None where the host cannot tell.
        sampler: class of the scheduler; None where the host cannot tell.
        settings: of the scheduler, plain ones: spacing, shift, order of the solver; None where the host cannot tell.
        taus: noise level of each call.
        dtype: of the denoiser; None where the host cannot tell.
        method: what made the bank.
        bank: digest of the bank: its denoiser, orders, kept counts and consumers.
    """

    steps: int
    guidance: float
    size: tuple[int, ...] | None
    sampler: str | None
    settings: Mapping[str, Any] | None
    taus: tuple[float, ...]
    dtype: str | None
    method: str
    bank: str

    @classmethod
    def of(cls, host: Host, bank: Bank, steps: int, guidance: float) -> TableOrigin:
        """What a table would be measured with now."""
        told = host.describe()
        size, settings = told.get("size"), told.get("scheduler_config")
        return cls(
            steps=steps,
            guidance=float(guidance),
            size=None if size is None else tuple(size),
            sampler=told.get("scheduler"),
            settings=None if settings is None else dict(settings),
            taus=tuple(host.taus(steps)),
            dtype=told.get("dtype"),
            method=bank.method,
            bank=digest_of(bank),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TableOrigin:
        """Inverse of `asdict`, of JSON. AllocationError if it is of a version that noted less."""
        missing = [each.name for each in fields(cls) if each.name not in data]
        if missing:
            raise AllocationError(
                f"the table does not say with which {', '.join(missing)} it was measured, as those of earlier versions "
                "do not, so that nobody can tell what it holds for. Measure a new one."
            )
        size = data["size"]
        return cls(**{**data, "size": None if size is None else tuple(size), "taus": tuple(data["taus"])})


@dataclass(frozen=True)
class ErrorTable:
    """Mean squared error of the final latents when one stage alone runs at a level, measured on probes, and how the
    errors of two stages add up.

    Args:
        edges: stage boundaries in tau, from 1 to 0.
        sparsities: the levels.
        errors: per stage and level; 0 for dense.
        standard_errors: of those means.
        products: for each two of the stages at levels above dense, stage by stage, the mean product of what they change
            in the final latents: whether their errors add up or cancel. The diagonal is `errors`.
        probes: number of probes.
        origin: what it was measured with.

    Example:
        >>> ErrorTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
        True
    """

    edges: tuple[float, ...]
    sparsities: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]
    standard_errors: tuple[tuple[float, ...], ...]
    products: tuple[tuple[float, ...], ...]
    probes: int
    origin: TableOrigin

    @property
    def steps(self) -> int:
        """Sampling steps."""
        return self.origin.steps

    def predict(self, levels: Sequence[float]) -> float:
        """Error of a schedule if what the stages change in the final latents adds up."""
        return error_of([self.sparsities.index(level) for level in levels], self.interactions())

    def interactions(self, share: float = 1.0) -> Tensor:
        """`products` of all levels, shape (stages, levels, stages, levels), float64.

        Args:
            share: of the products of different stages. Few probes tell less of these than of what a stage does alone,
                so that less than all of them makes better choices.
        """
        stages, pruned = len(self.errors), len(self.sparsities) - 1
        products = torch.tensor(self.products, dtype=torch.float64).reshape(stages, pruned, stages, pruned)
        between = ~torch.eye(stages, dtype=torch.bool)
        weight = torch.ones(stages, stages, dtype=torch.float64).masked_fill(between, share)
        return pad(products * weight[:, None, :, None], (1, 0, 0, 0, 1, 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and reports."""
        return {**self.__dict__, "origin": asdict(self.origin)}

    @classmethod
    def from_dict(cls, data: Any) -> ErrorTable:
        """Inverse of `to_dict`. AllocationError names what is missing."""
        try:
            return cls(
                edges=tuple(data["edges"]),
                sparsities=tuple(data["sparsities"]),
                errors=tuple(tuple(row) for row in data["errors"]),
                standard_errors=tuple(tuple(row) for row in data["standard_errors"]),
                products=tuple(tuple(row) for row in data["products"]),
                probes=data["probes"],
                origin=TableOrigin.from_dict(data["origin"]),
            )
        except (KeyError, TypeError) as error:
            raise AllocationError(f"the data are no error table, or one of another version: {error}.") from None

    def __str__(self) -> str:
        lines = [
            f"Error table ({self.probes} probes, {self.steps} steps): final latent MSE with one stage pruned alone"
        ]
        lines.append("  tau            " + "".join(f"{sparsity:>11.3f}" for sparsity in self.sparsities))
        for stage, row in enumerate(self.errors):
            high, low = self.edges[stage], self.edges[stage + 1]
            lines.append(f"  {high:.3f} - {low:.3f}  " + "".join(f"{error:>11.2e}" for error in row))
        return "\n".join(lines)


def measure_error_table(probes: Probes, sparsities: Sequence[float], steps: int) -> ErrorTable:
    """Run every stage at every level alone along the cached dense trajectories.

    What each run changes in the final latents of a batch of probes is kept, in float32 on the CPU, until all have run.

    Args:
        probes: the reference trajectories; their stages are the table's rows.
        sparsities: the levels, the first 0.
        steps: the steps that the probes ran (recorded only).
    """
    stages: StageSchedule = probes.dense
    count, pruned = len(stages.stages), len(sparsities) - 1
    every = [[level if i == stage else 0.0 for i in range(count)] for stage in range(count) for level in sparsities[1:]]
    found = []
    with progress.bar(len(every) * len(probes.batches), "measuring stages", "run") as bar:
        for batch in range(len(probes.batches)):
            changes = []
            for levels in every:
                changes.append(probes.differences(levels, batch).cpu())
                bar.update(1)
            found += [_products(of_probe) for of_probe in torch.stack(changes, 1)] if changes else []
    products = torch.stack(found) if found else torch.zeros(1, 0, 0)
    errors = products.diagonal(dim1=1, dim2=2).reshape(-1, count, pruned)
    means = tuple((0.0, *row) for row in errors.mean(0).tolist())
    deviations = tuple((0.0, *(_standard_error(errors[:, i, j]) for j in range(pruned))) for i in range(count))
    probes_run = sum(len(batch.final) for batch in probes.batches)
    origin = TableOrigin.of(probes.host, probes.pruner.bank, steps, probes.guidance)
    every_product = tuple(tuple(row) for row in products.mean(0).tolist())
    return ErrorTable(tuple(stages.edges), tuple(sparsities), means, deviations, every_product, probes_run, origin)


def _products(changes: Tensor) -> Tensor:
    """Mean product of each two rows, shape (rows, rows), float64."""
    exact = changes.double()
    return exact @ exact.T / exact.shape[1]


def check_table(table: ErrorTable, stages: StageSchedule, bank: Bank, sampling: Sampling) -> None:
    """AllocationError if `table` was measured with anything else than a new one would be now."""
    origin = TableOrigin.of(sampling.host, bank, sampling.steps, sampling.guidance)
    wanted = {"edges": tuple(stages.edges), "levels": bank.sparsities, **origin.__dict__}
    differs = first_difference({"edges": table.edges, "levels": table.sparsities, **table.origin.__dict__}, wanted)
    if differs is not None:
        name, found, needed = differs
        raise AllocationError(
            f"`table` was measured with {name} {found}, this allocation needs {needed}. Leave `table` out to measure a "
            "new one."
        )


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name with another value, and both values; of mappings, the entries that differ."""
    for name, value in wanted.items():
        mine = found.get(name)
        if mine == value:
            continue
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            differ = sorted(key for key in {*mine, *value} if mine.get(key) != value.get(key))
            return name, {key: mine.get(key) for key in differ}, {key: value.get(key) for key in differ}
        return name, mine, value
    return None


def digest_of(bank: Bank) -> str:
    """What tells a bank from others: one hash of its denoiser, orders, kept counts and sampled values of its consumers.

    Saving and loading do not change it.
    """
    plain = {
        "method": bank.method,
        "fingerprint": bank.fingerprint.to_dict(),
        "kept": {name: list(counts) for name, counts in sorted(bank.kept.items())},
        "edges": list(bank.edges),
        "orders": {name: order.tolist() for name, order in sorted(bank.orders.items())},
        "consumers": [
            [*key, *_few_values(consumer.weight), *_few_values(consumer.bias)]
            for key, consumer in sorted(bank.consumers.items())
        ],
    }
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _few_values(tensor: torch.Tensor) -> list[float]:
    """The first, the middle and the last number: exact on any device, unlike a sum."""
    flat = tensor.reshape(-1)
    values: list[float] = flat[[0, len(flat) // 2, -1]].double().tolist()
    return values


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
