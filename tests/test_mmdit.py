"""SD3 and FLUX: heads that span two streams, consumers that two groups share, blocks that pass two tensors on."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from stageprune import StageSchedule, check_slice_equals_mask, find_groups
from stageprune.core.calibration import Calibration
from stageprune.core.calibration.hessian import HessianRecorder
from stageprune.core.errors import GroupError
from stageprune.core.fingerprint import Fingerprint
from stageprune.core.groups import Cols, InputSize, Rows, consumer_sites, family_of, measure_cost, width_groups
from stageprune.core.groups.check import masked, sliced
from stageprune.core.groups.layer import layer_at
from stageprune.core.hosts.diffusers import reader_for
from stageprune.core.hosts.diffusers.bare import DenoiserHost
from stageprune.core.pruning import prune
from stageprune.core.runtime import StagePruner
from support import SHARING_IDS, SHARINGS, TAUS, inside, reference, relative, same_state, state_of

SIZE = InputSize(8, 8)
LEVELS = (0.0, 0.3, 0.6)
SCHEDULE = StageSchedule.from_levels([0, 0.3, 0.6, 0.3, 0.6])
TOLERANCE = 1e-5

WIDE = {"num_attention_heads": 3, "attention_head_dim": 12}
CONFIGS = {
    "sd3": ("sd3", {}),
    "sd3 3x12": ("sd3", {**WIDE, "caption_projection_dim": 36}),
    "sd3.5-medium": ("sd35", {"dual_attention_layers": (0,)}),
    "sd3.5 all dual": ("sd35", {"dual_attention_layers": (0, 1, 2)}),
    "sd3.5-large": ("sd35", {"dual_attention_layers": ()}),
    "flux": ("flux", {}),
    "flux guidance": ("flux", {"guidance_embeds": True}),
    "flux 3x12": ("flux", {**WIDE, "axes_dims_rope": (4, 4, 4), "num_layers": 1, "num_single_layers": 3}),
}


@pytest.fixture(params=list(CONFIGS))
def denoiser(request):
    name, config = CONFIGS[request.param]
    return zoo.make_denoiser(name, **config)


def example(denoiser, tau=None, batch=2, seed=0):
    """Inputs of one call, at noise level `tau` if given."""
    inputs = family_of(denoiser).example_inputs(denoiser, batch=batch, seed=seed, size=SIZE)
    if tau is not None:
        inputs["timestep"] = torch.full((batch,), tau * reader_for(denoiser).scale)
    return inputs


def forward(denoiser, tau=None, **kwargs):
    with torch.no_grad():
        return denoiser(**example(denoiser, tau, **kwargs)).sample


def count_macs(denoiser, size=SIZE):
    inputs = family_of(denoiser).example_inputs(denoiser, size=size)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        denoiser(**inputs)
    return counter.get_total_flops() // 2


def group_of(denoiser, name):
    return next(group for group in find_groups(denoiser) if group.name == name)


def test_slice_equals_mask(denoiser):
    state, structure = state_of(denoiser), inside(denoiser)
    for seed in range(3):
        checks = check_slice_equals_mask(denoiser, seed=seed, tolerance=2e-6, size=SIZE)
        assert len(checks) == len(find_groups(denoiser))
    assert same_state(state, state_of(denoiser)) and structure == inside(denoiser)


def test_removing_units_changes_the_output(denoiser):
    """Or else the check above would pass on anything."""
    groups, dense = find_groups(denoiser), forward(denoiser)
    for group in groups:
        with masked(denoiser, groups, {group.name: torch.arange(1, group.size)}):
            assert relative(forward(denoiser), dense) > 1e-4, group.name
        with masked(denoiser, groups, {group.name: torch.arange(group.size)}):
            assert torch.equal(forward(denoiser), dense)


def test_cost_is_what_a_counter_counts(denoiser):
    """At unequal kept counts, with and without a skipped block, to the last multiplication."""
    groups = find_groups(denoiser)
    cost = measure_cost(denoiser, groups, SIZE)
    assert cost.dense == count_macs(denoiser)
    kept = {group.name: 1 + (7 * i) % group.size for i, group in enumerate(width_groups(groups))}
    keep = {name: torch.randperm(cost.sizes[name])[:count] for name, count in kept.items()}
    with sliced(denoiser, groups, keep):
        assert cost.macs(kept) == count_macs(denoiser)
    count = len(groups[-1].blocks)
    with sliced(denoiser, groups, {**keep, "blocks": torch.arange(count - 1)}):
        assert cost.macs(kept, [count - 1]) == count_macs(denoiser)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_cost_follows_the_size(name):
    denoiser = zoo.make_denoiser(name)
    square, oblong, short = InputSize(8, 8), InputSize(4, 12), InputSize(8, 8, text=5)
    for size in (square, oblong, short):
        assert measure_cost(denoiser, size=size).dense == count_macs(denoiser, size)
        check_slice_equals_mask(denoiser, tolerance=2e-6, size=size)
    assert measure_cost(denoiser, size=oblong).dense < measure_cost(denoiser, size=square).dense
    assert measure_cost(denoiser, size=short).dense < measure_cost(denoiser, size=square).dense


def test_tokens_are_those_of_the_pipelines():
    sd3, flux = zoo.make_denoiser("sd3"), zoo.make_denoiser("flux")
    assert family_of(sd3).tokens(sd3) == {"image": 16, "text": 333, "joint": 349}
    assert family_of(sd3).tokens(sd3, InputSize(16, 8)) == {"image": 32, "text": 333, "joint": 365}
    assert family_of(flux).tokens(flux) == {"image": 4096, "text": 512, "joint": 4608}
    assert family_of(sd3).tokens(sd3, InputSize(8, 8, 20)) == {"image": 16, "text": 20, "joint": 36}
    assert family_of(flux).tokens(flux, InputSize(96, 64)) == {"image": 1536, "text": 512, "joint": 2048}
    assert family_of(flux).tokens(flux, InputSize(8, 8, 16)) == {"image": 16, "text": 16, "joint": 32}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd3", (9, 8), r"`size` must be multiples of 2 \(latent height and width\), got 9 x 8"),
        ("flux", (8, 0), r"`size` must be multiples of 2 \(latent height and width\), got 8 x 0"),
        ("sd3", (8, 32), r"`size` must be at most 16 a side .* got 8 x 32"),
        ("dit", (16, 16), r"`size` must be 8 x 8, the one that this DiT is made for; got 16 x 16"),
    ],
)
def test_sizes_that_a_model_cannot_run(name, size, message):
    with pytest.raises(GroupError, match=message):
        measure_cost(zoo.make_denoiser(name), size=InputSize(*size))


def test_one_head_is_both_streams():
    denoiser = zoo.make_denoiser("sd35")
    group, path = group_of(denoiser, "blocks.0.attn"), "transformer_blocks.0.attn"
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    assert group.producers == tuple(Rows(f"{path}.{name}") for name in names)
    assert group.consumers == (Cols(f"{path}.to_out.0"), Cols(f"{path}.to_add_out"))
    assert group_of(denoiser, "blocks.2.attn").consumers == (Cols("transformer_blocks.2.attn.to_out.0"),)
    names = [group.name for group in find_groups(denoiser)]
    assert "blocks.1.attn2" in names and "blocks.2.attn2" not in names and "blocks.2.ff_context" not in names


def test_heads_and_neurons_share_an_output():
    denoiser = zoo.make_denoiser("flux")
    site = consumer_sites(find_groups(denoiser))["single_transformer_blocks.1.proj_out"]
    assert [(group.name, offset) for group, offset in site] == [("single_blocks.1.attn", 0), ("single_blocks.1.ff", 32)]


def test_every_attribute_of_attention_follows():
    denoiser = zoo.make_denoiser("sd3")
    attention = denoiser.transformer_blocks[0].attn
    with sliced(denoiser, find_groups(denoiser), {"blocks.0.attn": torch.tensor([3])}):
        names = ("heads", "sliceable_head_dim", "inner_dim", "inner_kv_dim")
        assert [getattr(attention, name) for name in names] == [1, 1, 8, 8]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_fused_projections(name):
    """Packed producers; the separate ones that they replace are left alone. Unfusing brings those back."""
    denoiser = zoo.make_denoiser(name)
    plain, dense = find_groups(denoiser), forward(denoiser)
    with torch.no_grad():
        denoiser.fuse_qkv_projections()
    assert relative(forward(denoiser), dense) < 1e-5
    path = "transformer_blocks.0.attn"
    fused = group_of(denoiser, "blocks.0.attn")
    assert fused.producers == (Rows(f"{path}.to_qkv", 3), Rows(f"{path}.to_added_qkv", 3))
    check_slice_equals_mask(denoiser, tolerance=2e-6, size=SIZE)
    cost = measure_cost(denoiser, size=SIZE)
    with sliced(denoiser, find_groups(denoiser), {fused.name: torch.tensor([2, 0])}):
        assert cost.macs({fused.name: 2}) == count_macs(denoiser)
    denoiser.unfuse_qkv_projections()
    assert find_groups(denoiser) == plain
    check_slice_equals_mask(denoiser, tolerance=2e-6, size=SIZE)


def test_the_processor_tells_whether_sd3_is_fused():
    """`unfuse_qkv_projections` leaves the flag and the fused Linears behind; a processor may also be set by hand."""
    denoiser = zoo.make_denoiser("sd3")
    for block in denoiser.transformer_blocks:
        with torch.no_grad():
            block.attn.fuse_projections()
    assert group_of(denoiser, "blocks.0.attn").producers[0].blocks == 1
    denoiser.set_attn_processor(FusedJointAttnProcessor2_0())
    assert group_of(denoiser, "blocks.0.attn").producers[0].blocks == 3
    check_slice_equals_mask(denoiser, tolerance=2e-6, size=SIZE)


def test_ip_adapters_are_refused():
    denoiser = zoo.make_denoiser("flux")
    denoiser.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 24))
    with pytest.raises(
        GroupError, match=r"`transformer_blocks.0.attn` has a FluxIPAdapterAttnProcessor .* unload_ip_adapter\(\)"
    ):
        find_groups(denoiser)


def test_a_skipped_block_passes_both_streams_on():
    denoiser = zoo.make_denoiser("flux")
    groups = find_groups(denoiser)
    assert groups[-1].blocks[0] == "transformer_blocks.0" and groups[-1].blocks[-1] == "single_transformer_blocks.1"
    image, text = torch.randn(1, 4, 32), torch.randn(1, 5, 32)
    with sliced(denoiser, groups, {"blocks": torch.tensor([1, 2, 3])}):
        block = denoiser.transformer_blocks[0]
        passed = block(hidden_states=image, encoder_hidden_states=text, temb=torch.randn(1, 32))
    assert passed[0] is text and passed[1] is image


def calibrated(denoiser, stages):
    """Hessians of random calls at one noise level a stage."""
    groups = width_groups(find_groups(denoiser))
    sites = consumer_sites(groups)
    widths = {path: layer_at(denoiser, path).in_features for path in sites}
    recorder = HessianRecorder(denoiser, widths, stages)
    with recorder.recording():
        for stage in range(stages):
            recorder.stage = stage
            forward(denoiser, TAUS[stage], batch=16, seed=1 + stage)
    edges = StageSchedule.from_levels([0.0] * stages).edges
    return Calibration(recorder.hessians, recorder.rows, tuple(edges), Fingerprint.of(denoiser, list(sites)))


@pytest.mark.parametrize(("order", "consumers"), SHARINGS, ids=SHARING_IDS)
def test_every_level_equals_physical_slicing(denoiser, order, consumers):
    bank = prune(
        DenoiserHost(denoiser),
        calibrated(denoiser, stages=5),
        method="obs",
        levels=LEVELS,
        order=order,
        consumers=consumers,
        layer_allocation="uniform",
        multiple=8,
    )
    state, structure = state_of(denoiser), inside(denoiser)
    dense, expected = [], []
    for stage, (tau, (level, of)) in enumerate(zip(TAUS, bank.bind(SCHEDULE), strict=True)):
        assert of in (0, stage)
        dense.append(forward(denoiser, tau))
        with reference(denoiser, bank, level, of):
            expected.append(forward(denoiser, tau))
    pruner = StagePruner(denoiser, bank, SCHEDULE, reader_for(denoiser))
    got = [forward(denoiser, tau) for tau in TAUS]
    again = [forward(denoiser, tau) for tau in TAUS]
    pruner.detach()
    for stage, level in enumerate(SCHEDULE.levels):
        assert relative(got[stage], expected[stage]) < TOLERANCE
        assert torch.equal(got[stage], again[stage])
        assert (relative(got[stage], dense[stage]) > 100 * TOLERANCE) == (level > 0)
    assert same_state(state, state_of(denoiser)) and structure == inside(denoiser)
    assert all(torch.equal(forward(denoiser, tau), was) for tau, was in zip(TAUS, dense, strict=True))


def test_compensation_beats_magnitude_in_both_streams():
    """A unit's loss is the sum over its consumers, so pruning must not spend one stream to spare the other."""
    denoiser = zoo.make_denoiser("sd3")
    calibration, dense = calibrated(denoiser, stages=1), forward(denoiser, TAUS[0])
    errors = {}
    for method in ("obs", "magnitude", "random"):
        bank = prune(
            DenoiserHost(denoiser), calibration, method=method, levels=LEVELS, layer_allocation="uniform", multiple=8
        )
        with reference(denoiser, bank, 1, 0):
            errors[method] = relative(forward(denoiser, TAUS[0]), dense)
    assert errors["obs"] < 0.8 * min(errors["magnitude"], errors["random"])
