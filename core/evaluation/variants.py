"""What stands beside a bundle's schedule: dense, one level everywhere, magnitude pruning, and fewer dense steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle import Bundle
from ..groups import DenoiserCost, measure_cost
from ..host import Host
from ..pruning import Bank, prune
from ..schedule import StageSchedule, executed_cost

DENSE, SCHEDULE, UNIFORM, MAGNITUDE, FEWER_STEPS = "dense", "schedule", "uniform", "magnitude", "fewer steps"


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to make the same pictures.

    Args:
        name: `dense`, `schedule`, `uniform`, `magnitude` or `fewer steps`.
        description: the name with what a reader needs to know, for tables.
        steps: sampling steps; those that the schedule lists, if it does.
        macs_share: MACs that it executes over those that the dense model executes at the full number of steps.
        bank: with the levels of `schedule` only, as it would be enabled: idle levels were seen to cost time
            (about 5 % on a CPU with 2 cores). None runs the dense model.
        schedule: of that bank.
    """

    name: str
    description: str
    steps: int
    macs_share: float
    bank: Bank | None = None
    schedule: StageSchedule | None = None


def make_variants(host: Host, bundle: Bundle, steps: int) -> list[Variant]:
    """Dense first, the bundle's schedule second, then its rivals at about the same cost.

    Args:
        host: the pipeline, dense.
        bundle: with a schedule.
        steps: sampling steps of all variants but `fewer steps`, which is left out if `steps` is 1.
    """
    assert bundle.schedule is not None
    cost = measure_cost(host.denoiser, size=host.input_size)
    bank, taus = bundle.bank, host.taus(steps)
    listed = bundle.schedule.taus
    share = executed_cost(bundle.schedule, listed or taus, bank.macs(cost), len(taus)).share
    level = nearest_level(bank, cost, share)
    magnitude = _magnitude_bank(host, bank, level)
    variants = [
        Variant(DENSE, f"dense, {steps} steps", steps, 1.0),
        Variant(
            SCHEDULE,
            f"schedule ({bank.method}{f', {len(listed)} steps of its own' if listed else ''})",
            len(listed) if listed else steps,
            share,
            bundle.trimmed().bank,
            bundle.schedule,
        ),
        uniform_variant(bundle, cost, level, steps),
        Variant(
            MAGNITUDE,
            f"magnitude, uniform {level:g}",
            steps,
            level_share(magnitude, cost, level),
            magnitude,
            StageSchedule.uniform(level),
        ),
    ]
    if steps > 1:
        fewer = max(1, min(round(steps * share), steps - 1))
        variants.append(fewer_steps(host, fewer, steps))
    return variants


def fewer_steps(host: Host, fewer: int, steps: int) -> Variant:
    """The dense model with `fewer` steps, its cost share in denoiser calls of a run of `steps`."""
    noun = "step" if fewer == 1 else "steps"
    return Variant(FEWER_STEPS, f"dense, {fewer} {noun}", fewer, len(host.taus(fewer)) / len(host.taus(steps)))


def uniform_variant(bundle: Bundle, cost: DenoiserCost, sparsity: float, steps: int) -> Variant:
    """One level of the bundle's bank in all stages of its schedule."""
    assert bundle.schedule is not None
    bank = bundle.bank
    everywhere = bundle.schedule.with_levels([sparsity] * len(bundle.schedule.stages)).with_taus(None)
    share = level_share(bank, cost, sparsity)
    trimmed = Bundle(bank, everywhere).trimmed().bank
    return Variant(UNIFORM, f"uniform {sparsity:g} ({bank.method})", steps, share, trimmed, everywhere)


def level_share(bank: Bank, cost: DenoiserCost, sparsity: float) -> float:
    """MACs of a forward at one level over the dense MACs."""
    return bank.macs(cost)[sparsity] / cost.dense


def nearest_level(bank: Bank, cost: DenoiserCost, share: float) -> float:
    """Sparsity of the pruned level whose MACs are nearest to `share` of the dense ones; the bank has one at least."""
    return min(bank.sparsities[1:], key=lambda sparsity: abs(level_share(bank, cost, sparsity) - share))


def _magnitude_bank(host: Host, bank: Bank, level: float) -> Bank:
    """Magnitude pruning with the kept counts of `bank` at one level.

    They are not chosen anew: the bank may have been made for another size, at which MACs are shared out otherwise.
    """
    chosen = bank.level_of(level)
    return prune(
        host,
        None,
        method="magnitude",
        levels=[level],
        kinds=sorted({group.kind for group in bank.groups}),
        multiple=bank.provenance.get("multiple", 64),
        kept={name: (counts[0], counts[chosen]) for name, counts in bank.kept.items()},
    )
