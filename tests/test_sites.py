"""Which layers read the same tensor, and a calibration that sums it once."""

from __future__ import annotations

import pytest
import torch

from stageprune import calibrate
from stageprune.core.calibration import Calibration
from stageprune.core.errors import CalibrationError
from stageprune.core.groups import consumer_sites, find_groups, input_sites, layer_paths, width_groups
from stageprune.core.groups.layer import layer_at
from support import hessian_of, inside, make_pipe, relative
from zoo import NAMES, make_denoiser, make_pipeline, prompts_for

EXPECTED = {  # layer -> the one before it that reads the same
    "dit": ("transformer_blocks.1.attn1.to_v", "transformer_blocks.1.attn1.to_q"),
    "sd15": (
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    "sdxl": (
        "mid_block.attentions.0.transformer_blocks.1.attn2.to_k",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    "sd3": ("transformer_blocks.0.attn.add_v_proj", "transformer_blocks.0.attn.add_q_proj"),
    "sd35": ("transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_q"),
    "flux": ("single_transformer_blocks.1.attn.to_k", "single_transformer_blocks.1.proj_mlp"),
}


def record_inputs(denoiser, paths, into):
    return [
        layer_at(denoiser, path).register_forward_pre_hook(lambda _, args, path=path: into.setdefault(path, args[0]))
        for path in paths
    ]


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_site_read_the_very_same_tensor(name):
    """In a real run, too: not equal numbers, the same object; and different sites read different ones."""
    pipe = make_pipeline(name)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    paths, seen = layer_paths(width_groups(find_groups(denoiser))), {}
    sites = input_sites(denoiser, paths)
    assert set(sites) == set(paths)
    hooks = record_inputs(denoiser, paths, seen)
    calibrate(pipe, prompts_for(pipe) * 4, steps=4, guidance=1.0)
    for hook in hooks:
        hook.remove()
    for path, site in sites.items():
        assert seen[path] is seen[site.leader]
        assert sites[site.leader].leader == site.leader
    leaders = {site.leader for site in sites.values()}
    assert len({id(seen[path]) for path in leaders}) == len(leaders) < len(paths)
    path, leader = EXPECTED[name]
    assert sites[path].leader == leader
    assert all(sites[path].leader == path for path in consumer_sites(width_groups(find_groups(denoiser))))


def test_rows_are_those_of_one_sample():
    sites = input_sites(make_denoiser("dit"), ["transformer_blocks.0.attn1.to_q"])
    assert sites["transformer_blocks.0.attn1.to_q"].rows == 16
    sites = input_sites(make_denoiser("sd15"), ["mid_block.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj"])
    assert [site.rows for site in sites.values()] == [16, 1]


def test_finding_sites_leaves_no_trace():
    denoiser = make_denoiser("sd3")
    structure, calls = inside(denoiser), []
    denoiser.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    input_sites(denoiser, layer_paths(width_groups(find_groups(denoiser))))
    assert not calls, "a hook of the user's sees no meta tensors"
    denoiser.transformer_blocks[0]._forward_hooks.clear()
    assert inside(denoiser) == structure


@pytest.fixture(scope="module")
def whole():
    return calibrate(make_pipe(), [1, 2, 3], steps=4, guidance=1.0, layers="all")


def test_every_layer_has_the_moments_of_its_own_inputs(whole):
    pipe = make_pipe()
    paths, rows = layer_paths(width_groups(find_groups(pipe.transformer))), {}

    def record(path):
        return lambda _, args: rows.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

    for path in paths:
        layer_at(pipe.transformer, path).register_forward_pre_hook(record(path))
    calibrate(pipe, [1, 2, 3], steps=4, guidance=1.0)
    for path in paths:
        assert whole.knows(path)
        assert relative(whole.hessian(path).double(), hessian_of(torch.cat(rows[path]))) < 1e-5
    assert len(whole.hessians) == 12 and len(whole.shared) == 6, "q, k and v of three blocks are summed once"


def test_consumers_are_those_of_a_calibration_without_producers(whole):
    plain = calibrate(make_pipe(), [1, 2, 3], steps=4, guidance=1.0)
    assert not plain.shared and not plain.knows("transformer_blocks.0.attn1.to_k")
    assert all(torch.equal(plain.hessian(path), whole.hessian(path)) for path in plain.hessians)
    with pytest.raises(CalibrationError, match=r'no Hessian for `transformer_blocks.0.attn1.to_k`.*`layers="all"`'):
        plain.hessian("transformer_blocks.0.attn1.to_k")


def test_round_trip_and_resume(whole, tmp_path):
    again = Calibration.load(whole.save(tmp_path / "c.safetensors"))
    assert again.shared == whole.shared and "18 layers" in str(again)
    call = {"steps": 4, "guidance": 1.0, "layers": "all", "batch_size": 1, "checkpoint": tmp_path / "part"}
    first = calibrate(make_pipe(), [1, 2, 3], **call)
    assert calibrate(make_pipe(), [1, 2, 3], **call).shared == first.shared == whole.shared
    with pytest.raises(CalibrationError, match="not the same layers"):
        calibrate(make_pipe(), [1, 2, 3], **{**call, "layers": "consumers"})


def test_a_file_whose_shared_hessian_is_missing(whole, tmp_path):
    broken = Calibration(whole.hessians, whole.rows, whole.edges, whole.fingerprint, {}, {"a": "b"})
    with pytest.raises(CalibrationError, match="`a` shares the Hessian of `b`, which is not there"):
        Calibration.load(broken.save(tmp_path / "c.safetensors"))


def test_what_is_read_once_a_sample_is_not_recorded():
    """The timestep's embedding has no more different rows than there are steps."""
    result = calibrate(make_pipeline("sd15"), ["fox"] * 12, steps=8, kinds=("channel",), layers="all", guidance=1.0)
    assert result.knows("mid_block.resnets.0.conv1") and not result.knows("mid_block.resnets.0.time_emb_proj")


def test_layers_out_of_range():
    with pytest.raises(CalibrationError, match="`layers` must be 'consumers' or 'all', got 'producers'"):
        calibrate(make_pipe(), [1], layers="producers")
