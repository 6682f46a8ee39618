"""What a level may take: least widths, shares of each kind, groups that are left alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune.core.cli_options import gibibytes, shares_of
from stageprune.core.errors import BankError, StagePruneError
from stageprune.core.groups import find_groups, measure_cost, width_groups
from stageprune.core.pruning import prune
from stageprune.core.pruning.layerwise import grid_counts
from stageprune.core.pruning.levels import Widths, kept_counts, leave_out
from support import make_denoiser

LEVELS = (0.0, 0.2, 0.5, 0.8)


@pytest.fixture(scope="module")
def groups():
    return [group for group in width_groups(find_groups(make_denoiser())) if group.kind in ("head", "neuron")]


@pytest.fixture(scope="module")
def cost(groups):
    return measure_cost(make_denoiser(), groups)


def gone(groups, cost, kept, kind, level):
    """Share of a kind's MACs that a level removes."""
    chosen = [group for group in groups if group.kind == kind]
    total = sum(cost.units[group.name] * group.size for group in chosen)
    return sum(cost.units[group.name] * (group.size - kept[group.name][level]) for group in chosen) / total


@settings(max_examples=60, deadline=None)
@given(minimum=st.floats(0, 1), multiple=st.sampled_from([1, 8, 16, 24]))
def test_the_least_width_holds_at_every_level(groups, cost, minimum, multiple):
    widths = Widths(multiple, minimum)
    kept = kept_counts(groups, cost, (0.0, 0.5, 0.99), widths)
    for group in groups:
        least = widths.least(group)
        assert min(group.size, math.ceil(minimum * group.size)) <= least <= group.size
        assert least % widths.unit(group) == 0 or least == group.size
        assert min(*kept[group.name], *grid_counts(group, widths)) >= least


@pytest.mark.parametrize("shares", [{"head": 0.0}, {"neuron": 0.0}, {"head": 2.0, "neuron": 1.0}, {"head": 0.5}])
def test_kinds_take_their_shares_of_a_level(groups, cost, shares):
    """Heads are coarse (4 a layer here), so theirs comes as near as a head, and neurons make up for it."""
    kept = kept_counts(groups, cost, LEVELS[:3], Widths(1, shares=shares))
    ratio = shares.get("head", 1.0) / shares["neuron"] if shares.get("neuron") else None
    for level, sparsity in enumerate(LEVELS[:3]):
        heads, neurons = (gone(groups, cost, kept, kind, level) for kind in ("head", "neuron"))
        total = sum(cost.units[group.name] * (group.size - kept[group.name][level]) for group in groups)
        asked = sparsity * sum(cost.units[group.name] * group.size for group in groups)
        if shares.get("head") == 0:
            assert heads == 0 and total == pytest.approx(asked, rel=0.02)
        elif shares.get("neuron") == 0:
            assert neurons == 0
        elif ratio:
            assert heads >= neurons and total == pytest.approx(asked, rel=0.02)
        else:
            assert heads <= neurons and total == pytest.approx(asked, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple": 0}, "`multiple` must be at least 1, got 0"),
        ({"minimum": 1.5}, r"`minimum` must be a share of each group's units in \[0, 1\], got 1.5"),
        ({"minimum": float("nan")}, "`minimum` must be"),
        ({"shares": {"head": -1.0}}, "`shares` must be finite numbers of at least 0, got {'head': -1.0}"),
        ({"shares": {"head": float("inf")}}, "`shares` must be finite"),
        ({"shares": {"head": 0.0, "neuron": 0.0}}, "`shares` leaves every kind alone"),
        ({"shares": {"heads": 0.5}}, r"`shares` names 'heads', but the kinds that are pruned are \['head', 'neuron'\]"),
        ({"shares": {"head": 0.5}, "layer_allocation": "measured"}, "`shares` says what each kind takes: leave it out"),
        ({"keep_dense": ["nothing.*"]}, r"`keep_dense` 'nothing.\*' matches none of the groups, which are blocks.0.at"),
        ({"keep_dense": ["*"]}, r"`keep_dense` \['\*'\] leaves nothing to prune"),
    ],
)
def test_bad_arguments(host, options, message):
    with pytest.raises(BankError, match=message):
        prune(host, method="magnitude", levels=[0.5], **options)


def test_groups_that_are_left_alone_are_not_in_the_bank(host, calibration):
    everything = prune(host, calibration, levels=LEVELS, multiple=8)
    some = prune(host, calibration, levels=LEVELS, multiple=8, keep_dense=["blocks.0.*"])
    names = {group.name for group in everything.groups}
    assert {group.name for group in some.groups} == {name for name in names if not name.startswith("blocks.0.")}
    assert some.provenance["keep_dense"] == ["blocks.0.*"]
    cost = measure_cost(host.denoiser, size=host.input_size)
    assert some.realised(cost) == pytest.approx(LEVELS, abs=0.1), "levels are shares of what is left to prune"


def test_names_and_wildcards(groups):
    names = [group.name for group in groups]
    assert [group.name for group in leave_out(groups, [names[0]])] == names[1:]
    assert [group.kind for group in leave_out(groups, ["*.attn*"])] == ["neuron"] * (len(groups) // 2)
    assert leave_out(groups, []) == groups


def test_what_the_command_reads():
    assert shares_of("head=0.5, neuron=1") == {"head": 0.5, "neuron": 1.0} and shares_of(None) is None
    assert [gibibytes(text) for text in ("4GiB", "512MiB", "1.5", None)] == [4.0, 0.5, 1.5, None]
    for wrong in ("head", "head=x", "=1=2"):
        with pytest.raises(StagePruneError, match="--shares must be"):
            shares_of(wrong)
    with pytest.raises(StagePruneError, match="--hessian-budget must be a size such as 4GiB or 500MiB, got 'much'"):
        gibibytes("much")
