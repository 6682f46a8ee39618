"""Groups: what a family declares must be what slicing really removes, and cost what a counter really counts."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stageprune import check_slice_equals_mask, families, find_groups, register_family
from stageprune.core.errors import GroupError
from stageprune.core.groups import Attribute, Cols, Group, InputSize, Rows, family_of, measure_cost, width_groups
from stageprune.core.groups.check import masked, sliced
from stageprune.core.groups.families.dit import DiT
from stageprune.core.groups.group import check_groups, consumer_sites
from stageprune.core.groups.layer import layer_at
from stageprune.core.groups.registry import _FAMILIES
from stageprune.core.pruning.levels import Widths, kept_counts
from support import make_denoiser, same_state, state_of

CONFIGS = {
    "5x8": {},
    "3x12": {"num_attention_heads": 3, "attention_head_dim": 12},
    "no qkv bias": {"attention_bias": False},
    "geglu": {"activation_fn": "geglu"},
    "gelu": {"activation_fn": "gelu"},
    "long": {"sample_size": 16, "num_layers": 2},
}


@pytest.fixture(params=list(CONFIGS))
def denoiser(request):
    return make_denoiser(**CONFIGS[request.param])


def test_slice_equals_mask(denoiser):
    state = state_of(denoiser)
    for seed in range(3):
        checks = check_slice_equals_mask(denoiser, seed=seed, tolerance=2e-6)
        assert len(checks) == 2 * len(denoiser.transformer_blocks) + 1
        assert all(check.kept == max(1, (check.size + 1) // 2) for check in checks)
    assert same_state(state, state_of(denoiser))


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(2)], ids=type)
def test_slice_equals_mask_for_every_attention_processor(processor):
    """Processors differ in the attribute that they take the number of heads from."""
    denoiser = make_denoiser()
    for block in denoiser.transformer_blocks:
        block.attn1.set_processor(processor)
    check_slice_equals_mask(denoiser, tolerance=2e-6)


def test_every_attribute_of_attention_follows():
    denoiser = make_denoiser()
    attention = denoiser.transformer_blocks[0].attn1
    names = ("heads", "sliceable_head_dim", "inner_dim", "inner_kv_dim")
    dense = [getattr(attention, name) for name in names]
    with sliced(denoiser, find_groups(denoiser), {"blocks.0.attn": torch.tensor([4, 1])}):
        assert [getattr(attention, name) for name in names] == [2, 2, 16, 16]
    assert [getattr(attention, name) for name in names] == dense == [5, 5, 40, 40]


def test_removing_units_changes_the_output(denoiser):
    """Or else the check above would pass on anything."""
    groups, inputs = find_groups(denoiser), family_of(denoiser).example_inputs(denoiser)
    with torch.no_grad():
        dense = denoiser(**inputs).sample
        for group in groups:
            with masked(denoiser, groups, {group.name: torch.arange(1, group.size)}):
                assert float((denoiser(**inputs).sample - dense).abs().max()) > 1e-4, group.name
            with masked(denoiser, groups, {group.name: torch.arange(group.size)}):
                assert torch.equal(denoiser(**inputs).sample, dense)


def test_packed_producers_are_found():
    group = find_groups(make_denoiser(activation_fn="geglu"))[1]
    assert group.producers == (Rows("transformer_blocks.0.ff.net.0.proj", 2),)
    assert group.rows(torch.tensor([3, 0]), 2).tolist() == [3, 0, 163, 160]
    assert "(2 packed)" in str(group)


def _break(change):
    class Broken(DiT):
        def groups(self, denoiser):
            return [change(group) if group.name == "blocks.1.attn" else group for group in super().groups(denoiser)]

    return Broken().groups


@pytest.mark.parametrize(
    "change",
    [
        lambda g: dataclasses.replace(g, attributes=()),
        lambda g: dataclasses.replace(g, attributes=tuple(a for a in g.attributes if a.name != "heads")),
        lambda g: dataclasses.replace(g, producers=g.producers[:2]),
        lambda g: dataclasses.replace(g, producers=(g.producers[0], g.producers[1], Rows("proj_out_1"))),
        lambda g: dataclasses.replace(g, attributes=(Attribute("transformer_blocks.1.attn1", "heads", 2),)),
    ],
)
def test_a_broken_family_is_caught(change):
    denoiser = make_denoiser()
    state, groups = state_of(denoiser), _break(change)(denoiser)
    heads = denoiser.transformer_blocks[1].attn1.heads
    with pytest.raises((GroupError, RuntimeError)):
        check_slice_equals_mask(denoiser, groups)
    assert same_state(state, state_of(denoiser)) and denoiser.transformer_blocks[1].attn1.heads == heads


def test_a_family_that_is_silently_wrong_is_named():
    """Units that are no units: interleaved columns still slice, but not to what masking them gives."""

    class Interleaved(Group):
        def rows(self, units, blocks):
            return (units[:, None] + torch.arange(self.width) * self.size).reshape(-1)

    denoiser = make_denoiser()
    groups = find_groups(denoiser)
    group = Interleaved(**{field.name: getattr(groups[0], field.name) for field in dataclasses.fields(Group)})
    with pytest.raises(GroupError, match=r"group `blocks.0.attn`: slicing and masking differ by .* \(allowed 1e-04\)"):
        check_slice_equals_mask(denoiser, [group, *groups[1:]])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group("g", "neuron", 160, 1, (Rows("nowhere"),), (Cols("proj_out_1"),)), "`nowhere` does not exist"),
        (
            Group("g", "neuron", 160, 1, (Rows("pos_embed"),)),
            "`pos_embed` is a PatchEmbed, not a torch.nn.Linear or torch.nn.Conv2d",
        ),
        (Group("g", "neuron", 7, 1, (Rows("proj_out_1"),)), "producer `proj_out_1` has 80 rows, expected 1 x 7 x 1"),
        (Group("g", "neuron", 80, 1, (Rows("proj_out_1", 2),)), "has 80 rows, expected 2 x 80 x 1"),
        (Group("g", "neuron", 41, 1, (), (Cols("proj_out_1"),)), r"has 40 columns, expected at least 0 \+ 41 x 1"),
        (Group("g", "neuron", 40, 1, (), (Cols("proj_out_1", 1),)), r"has 40 columns, expected at least 1 \+ 40 x 1"),
    ],
)
def test_groups_that_do_not_fit(group, message):
    with pytest.raises(GroupError, match=message):
        check_groups(make_denoiser(), [group])


def test_group_names_must_be_unique():
    groups = find_groups(make_denoiser())
    with pytest.raises(GroupError, match="group names must be unique, got"):
        check_groups(make_denoiser(), [*groups, groups[0]])


def test_unknown_denoiser():
    with pytest.raises(
        GroupError, match=r"no family is registered for Linear; supported denoisers: DiTTransformer2DModel"
    ):
        find_groups(nn.Linear(2, 2))


def test_a_family_can_be_registered(monkeypatch):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x, return_dict=True):
            return (self.down(self.up(x).relu()),)

    before = dict(_FAMILIES)
    try:

        @register_family
        class MineFamily:
            name, denoisers = "mine", ("Mine",)

            def groups(self, denoiser):
                return [Group("ff", "neuron", 6, 1, (Rows("up"),), (Cols("down"),))]

            def tokens(self, denoiser, size=None):
                return {"image": 1}

            def example_inputs(self, denoiser, batch=1, seed=0, size=None):
                return {"x": torch.randn(batch, 4)}

        assert families()["Mine"] == "mine"

        class Derived(Mine):
            pass

        assert [check.group for check in check_slice_equals_mask(Derived())] == ["ff"]
    finally:
        _FAMILIES.clear()
        _FAMILIES.update(before)


def test_consumer_of_two_groups():
    first = Group("a", "head", 2, 3, consumers=(Cols("out", 4),))
    second = Group("b", "neuron", 4, 1, consumers=(Cols("out", 0),))
    assert consumer_sites([first, second]) == {"out": [(second, 0), (first, 4)]}


def count_macs(denoiser, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        denoiser(**inputs)
    return counter.get_total_flops() // 2


def analytic_macs(denoiser):
    """By hand: patchify, time and label embedding, modulation, attention, feed-forward, output."""
    config = denoiser.config
    width, tokens = denoiser.inner_dim, (config.sample_size // config.patch_size) ** 2
    patch, packed = config.patch_size**2, 2 if config.activation_fn == "geglu" else 1
    block = 256 * width + width * width  # time embedding of the block's adaLN-zero
    block += 6 * width * width  # modulation
    block += 4 * tokens * width * width + 2 * tokens * tokens * width
    block += tokens * (packed + 1) * 4 * width * width
    edges = tokens * config.in_channels * patch * width + tokens * width * patch * config.out_channels
    final = 256 * width + width * width + 2 * width * width  # the last block's embedding again, and the output's shift
    return len(denoiser.transformer_blocks) * block + edges + final


def test_dense_cost(denoiser):
    cost = measure_cost(denoiser)
    inputs = family_of(denoiser).example_inputs(denoiser)
    assert cost.dense == count_macs(denoiser, inputs) == analytic_macs(denoiser)
    assert cost.macs({}) == cost.dense


def test_a_dit_runs_at_its_own_size_only(denoiser):
    own = denoiser.config.sample_size
    assert measure_cost(denoiser, size=InputSize(own, own, text=3)) == measure_cost(denoiser)
    with pytest.raises(GroupError, match=f"`size` must be {own} x {own}, the one .* got {own} x {2 * own}"):
        measure_cost(denoiser, size=InputSize(own, 2 * own))


def test_a_size_reads_well():
    assert str(InputSize(8, 16)) == "latents of 8 x 16"
    assert str(InputSize(8, 16, 77)) == "latents of 8 x 16 and 77 text tokens"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_cost_at_kept_counts(denoiser, share):
    """Equal to the counter's reading of the physically sliced model, to the last multiplication."""
    groups = find_groups(denoiser)
    cost = measure_cost(denoiser, groups)
    counts = kept_counts(width_groups(groups), cost, (0.0, share) if share else (0.0,), Widths(1))
    kept = {name: values[-1] for name, values in counts.items()}
    kept["blocks.0.attn"] = 1  # blocks need not agree
    inputs = family_of(denoiser).example_inputs(denoiser)
    keep = {name: torch.randperm(cost.sizes[name])[:count] for name, count in kept.items()}
    with sliced(denoiser, groups, keep):
        assert cost.macs(kept) == count_macs(denoiser, inputs)
    skipped = {**keep, "blocks": torch.tensor([0])}
    with sliced(denoiser, groups, skipped):
        assert cost.macs(kept, range(1, len(denoiser.transformer_blocks))) == count_macs(denoiser, inputs)
    if 0 < share < 0.9:  # beyond that three heads cannot follow
        prunable = (cost.dense - cost.macs({n: v[-1] for n, v in counts.items()})) / cost.prunable
        assert prunable == pytest.approx(share, abs=0.02)


def test_full_size_model_on_the_meta_device():
    """DiT-XL/2-256: 0.237 TFLOP a forward in the paper's count (multiply-accumulates doubled), with no weight made."""
    start = time.perf_counter()
    with torch.device("meta"):
        denoiser = DiTTransformer2DModel(num_embeds_ada_norm=1000)
    groups = find_groups(denoiser)
    cost = measure_cost(denoiser, groups)
    counts = kept_counts(width_groups(groups), cost, (0.0, 0.5), Widths(64))
    assert time.perf_counter() - start < 10
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    assert 2 * cost.dense == pytest.approx(0.237e12, rel=0.01)
    assert counts["blocks.0.attn"] == (16, 8) and counts["blocks.27.ff"] == (4608, 2304)
    assert layer_at(denoiser, "transformer_blocks.27.ff.net.2").in_features == 4608


def test_cost_ignores_hooks_and_dtype(denoiser):
    """Costing must not run a user's hooks on tensors without data."""
    cost = measure_cost(denoiser)
    denoiser.to(torch.bfloat16)
    seen = []
    hook = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    assert measure_cost(denoiser) == cost
    hook.remove()
    assert not seen
