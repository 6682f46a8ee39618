"""Static sparse models: what is zeroed, that it comes back, and that what is saved needs no stageprune."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline

import stageprune
from stageprune import StageSchedule, calibrate, prune, register_sparsifier, sparsifiers, sparsify
from stageprune.core.errors import BankError, CalibrationError, StagePruneError
from stageprune.core.groups import consumer_sites, family_of, find_groups, layer_paths, width_groups
from stageprune.core.groups.layer import layer_at, matrix_of
from stageprune.core.plain_folder import RECORD
from stageprune.core.pruning import NM, Share, parse_pattern
from stageprune.core.pruning.compensate import damp, reconstruction_loss, with_bias
from stageprune.core.static.methods import _METHODS
from support import images, inside, make_pipe, relative, same_state, state_of
from zoo import NAMES, drive, make_denoiser, make_pipeline, prompts_for

Q, DOWN = "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.2"


def denoiser_of(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def output_of(denoiser):
    """One forward on the family's own example."""
    with torch.no_grad():
        return denoiser(**family_of(denoiser).example_inputs(denoiser, batch=2), return_dict=False)[0]


@pytest.fixture(scope="module")
def whole():
    """Inputs of every layer of the tiny DiT."""
    return calibrate(make_pipe(), [1, 2, 3] * 8, steps=5, layers="all")


@pytest.fixture(scope="module")
def static(whole):
    return sparsify(make_pipe(), whole, pattern="2:4")


def lost_in(pipe, calibration, model, path):
    layer, sparse = layer_at(pipe.transformer, path), model.layers[path]
    hessian = damp(calibration.hessian(path), 0.01)
    bias = torch.zeros(len(sparse.weight)) if sparse.bias is None else sparse.bias
    columns = torch.arange(sparse.weight.shape[1])
    result = (sparse.weight.double(), bias.double())
    return reconstruction_loss(with_bias(matrix_of(layer), layer.bias), hessian, columns, result)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_sparse_while_applied_and_dense_after(name):
    pipe = make_pipeline(name)
    denoiser = denoiser_of(pipe)
    calibration = calibrate(pipe, prompts_for(pipe) * 4, steps=4, layers="all")
    model = sparsify(pipe, calibration, pattern="2:4")
    groups = [group for group in find_groups(denoiser) if group.kind in ("head", "neuron")]
    assert list(model.layers) == layer_paths(groups) and not model.left
    assert all(model.valid(path) and model.realised(path) == 0.5 for path in model.layers)
    state, structure, dense = state_of(denoiser), inside(denoiser), drive(pipe, 1.5)
    with model.apply(pipe) as running:
        sparse = drive(pipe, 1.5)
        for path, layer in model.layers.items():
            assert torch.equal(layer_at(denoiser, path).weight, layer.weight)
        assert not any(choice.sparse for choice in running.choices)
    assert relative(sparse, dense) > 1e-3, "half of the weights matter"
    assert same_state(state, state_of(denoiser)) and inside(denoiser) == structure
    assert torch.equal(drive(pipe, 1.5), dense)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_denoiser_is_the_applied_one(name, tmp_path):
    """Without data, so without the time to calibrate: what is written does not depend on it."""
    pipe = make_pipeline(name)
    denoiser = denoiser_of(pipe)
    model = sparsify(pipe, pattern=0.5, method="magnitude")
    with model.apply(denoiser):
        expected = output_of(denoiser)
    loaded = type(denoiser).from_pretrained(model.save(denoiser, tmp_path / "sparse"))
    assert torch.equal(output_of(loaded), expected)
    files = {path.name for path in (tmp_path / "sparse").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", RECORD}


def test_a_saved_pipeline_loads_and_tells_how_it_was_made(static, tmp_path):
    pipe = make_pipe()
    with static.apply(pipe):
        expected = images(pipe)
    folder = static.save(pipe, tmp_path / "pipeline")
    loaded = DiTPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded), expected)
    record = json.loads((folder / RECORD).read_text())
    assert record["pattern"] == "2:4" and record["method"] == "obs" and record["sparsity"] == 0.5
    assert record["layers"][DOWN] == {"shape": [40, 160], "zeros": 0.5, "valid": True}
    assert record["provenance"]["calibration"]["layers"] == "all"
    assert (folder / "transformer" / "config.json").stat().st_mode & 0o444 == 0o444
    static.save(pipe, folder)  # its own folder is replaced
    assert isinstance(DiffusionPipeline.from_pretrained(folder), DiTPipeline)


def test_saving_overwrites_nothing_else(static, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StagePruneError, match="exists and was not written by stageprune"):
        static.save(make_pipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_the_dense_model(static, tmp_path, monkeypatch):
    pipe = make_pipe()
    state = state_of(pipe.transformer)
    monkeypatch.setattr(pipe.transformer, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        static.save(pipe.transformer, tmp_path / "x")
    assert same_state(state, state_of(pipe.transformer)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", [0.5, 0.8, "2:4", "4:8", "1:4"])
def test_making_up_beats_scores_and_scores_beat_magnitude(whole, pattern):
    pipe = make_pipe()
    models = {name: sparsify(pipe, whole, pattern=pattern, method=name) for name in sparsifiers()}
    lost = {name: sum(lost_in(pipe, whole, model, path) for path in model.layers) for name, model in models.items()}
    assert lost["obs"] < 0.9 * lost["wanda"] and lost["wanda"] < lost["magnitude"]
    for model in models.values():
        assert all(model.valid(path) for path in model.layers)
        asked = parse_pattern(pattern)
        share = 1 - asked.kept / asked.of if isinstance(asked, NM) else asked.zeros
        assert model.sparsity == pytest.approx(share, abs=2e-3)


def test_magnitude_and_wanda_zero_what_they_say(whole):
    pipe = make_pipe()
    weight = layer_at(pipe.transformer, DOWN).weight
    magnitude = sparsify(pipe, pattern=0.5, method="magnitude").layers[DOWN].weight
    assert torch.equal(magnitude == 0, weight.abs() <= weight.abs().median())
    assert torch.equal(magnitude[magnitude != 0], weight[magnitude != 0])
    norms = whole.hessian(DOWN).diagonal()[:-1].sqrt()
    wanda = sparsify(pipe, whole, pattern=0.5, method="wanda").layers[DOWN].weight
    scores = weight.double().abs() * norms
    assert torch.equal(wanda == 0, scores < scores.sort(dim=1).values[:, 80:81]), "half of every row"
    kept = sparsify(pipe, pattern="2:4", method="magnitude").layers[DOWN].weight != 0
    best = weight.abs().view(40, 40, 4).topk(2, dim=2).indices
    assert torch.equal(kept.view(40, 40, 4), torch.zeros(40, 40, 4, dtype=torch.bool).scatter_(2, best, True))


def test_a_layer_without_bias_gets_none():
    """And its weights make up for its zeros all the same, without one."""
    pipe = make_pipe(attention_bias=False)
    calibration = calibrate(pipe, [1, 2, 3] * 8, steps=5, layers="all")
    model = sparsify(pipe, calibration, pattern=0.6)
    plain = sparsify(pipe, calibration, pattern=0.6, method="magnitude")
    assert model.layers[Q].bias is None and layer_at(pipe.transformer, Q).bias is None
    assert lost_in(pipe, calibration, model, Q) < 0.7 * lost_in(pipe, calibration, plain, Q)
    with model.apply(pipe):
        assert layer_at(pipe.transformer, Q).bias is None


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_convolutions(pattern):
    pipe = make_pipeline("sd15")
    calibration = calibrate(pipe, ["fox"] * 12, steps=8, kinds=("channel",), layers="all", guidance=1.0)
    model = sparsify(pipe, calibration, pattern=pattern)
    path = "mid_block.resnets.0.conv1"
    weight = model.layers[path].weight
    assert weight.shape == pipe.unet.get_submodule(path).weight.shape and model.valid(path)
    if pattern == "2:4":
        assert bool(((weight != 0).view(48, 12, 4, 3, 3).sum(2) == 2).all()), "along channels, at each place"
    assert "computed once a sample" in model.left["mid_block.resnets.0.time_emb_proj"]
    with model.apply(pipe):
        sparse = drive(pipe, 1.0)
    assert relative(sparse, drive(pipe, 1.0)) > 1e-3


def test_widths_that_m_does_not_divide_stay_dense_and_are_listed(whole):
    pipe = make_pipe()
    model = sparsify(pipe, whole, pattern="8:16")
    assert set(model.layers) == {f"transformer_blocks.{i}.ff.net.2" for i in range(3)}
    assert model.left[Q] == "its 40 input channels are no multiple of 16"
    assert f"{Q}: dense, its 40 input channels are no multiple of 16" in str(model)


def test_layers_that_are_not_meant(whole):
    pipe = make_pipe()
    model = sparsify(pipe, whole, pattern=0.5, keep_dense=["transformer_blocks.0.*", "*.to_q"])
    assert not any(path.startswith("transformer_blocks.0.") or path.endswith("to_q") for path in model.layers)
    assert "keep_dense" in model.left[Q] and len(model.layers) + len(model.left) == 18
    consumers = calibrate(pipe, [1, 2, 3] * 4, steps=4)
    model = sparsify(pipe, consumers, pattern=0.5)
    assert set(model.layers) == set(consumer_sites(width_groups(find_groups(pipe.transformer))))
    assert "were not calibrated" in model.left[Q]
    heads = sparsify(pipe, whole, pattern=0.5, kinds=["head"])
    assert len(heads.layers) == 12 and not heads.left


def test_sparsifying_changes_nothing(whole):
    pipe = make_pipe()
    state, hessians = state_of(pipe.transformer), {path: h.clone() for path, h in whole.hessians.items()}
    sparsify(pipe, whole, pattern=0.5)
    assert same_state(state, state_of(pipe.transformer))
    assert all(torch.equal(whole.hessians[path], h) for path, h in hessians.items())


def test_half_precision(whole):
    pipe = make_pipe()
    pipe.transformer.bfloat16()
    model = sparsify(pipe, whole, pattern="2:4")
    assert {layer.weight.dtype for layer in model.layers.values()} == {torch.bfloat16}
    assert all(model.valid(path) for path in model.layers)


def test_what_happens_to_the_applied_weights_does_not_reach_the_model(static):
    pipe, before = make_pipe(), static.layers[DOWN].weight.clone()
    with static.apply(pipe), torch.no_grad():
        layer_at(pipe.transformer, DOWN).weight.zero_()
    assert torch.equal(static.layers[DOWN].weight, before)


def test_a_copy_of_the_applied_denoiser_is_a_model_of_its_own(static, whole):
    pipe = make_pipe()
    running = static.apply(pipe)
    twin = copy.deepcopy(pipe.transformer)
    running.restore()
    running.restore()
    assert torch.equal(layer_at(twin, DOWN).weight, static.layers[DOWN].weight)
    with static.apply(pipe):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dense_model_comes_back_in_the_dtype_that_the_denoiser_has_by_then(static, dtype):
    pipe = make_pipe()
    expected = state_of(copy.deepcopy(pipe.transformer).to(dtype))
    with static.apply(pipe):
        pipe.to(dtype)
    found = state_of(pipe.transformer)
    assert {tensor.dtype for tensor in found.values()} == {dtype} and same_state(expected, found)
    assert images(pipe).isfinite().all()


def test_unmoved_the_dense_model_comes_back_without_a_copy(static):
    pipe = make_pipe()
    before = {name: (id(p), p.data_ptr()) for name, p in pipe.transformer.named_parameters()}
    with static.apply(pipe):
        pipe.transformer.to("cpu", torch.float32)
    assert before == {name: (id(p), p.data_ptr()) for name, p in pipe.transformer.named_parameters()}


def test_the_dense_weights_outlive_the_meta_device(static):
    """It has no values: offloading by hooks takes weights there."""
    pipe = make_pipe()
    dense = layer_at(pipe.transformer, DOWN).weight.detach().clone()
    with static.apply(pipe):
        pipe.transformer.to("meta")
    assert torch.equal(layer_at(pipe.transformer, DOWN).weight, dense)


def test_compiled_pipelines(static):
    pipe = make_pipe()
    with static.apply(pipe):
        expected = images(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with static.apply(pipe):
        assert relative(images(pipe), expected) < 1e-4


def test_one_thing_runs_at_a_time(static, whole):
    pipe = make_pipe()
    with static.apply(pipe), pytest.raises(StagePruneError, match="applied to this denoiser already"):
        static.apply(pipe)
    bank = prune(pipe, whole, levels=[0.5], multiple=16)
    stageprune.enable_stage_pruning(pipe, stageprune.Bundle(bank, StageSchedule.uniform(0.5)))
    with pytest.raises(StagePruneError, match="stage pruning is enabled"):
        static.apply(pipe)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"pattern": "2-4"}, "`pattern` must be N:M such as '2:4' .* or a share of zeros such as 0.5, got '2-4'"),
        ({"pattern": "2:4:8"}, "`pattern` must be N:M"),
        ({"pattern": None}, "`pattern` must be N:M"),
        ({"pattern": "5:4"}, "keeps N of M weights"),
        ({"pattern": 1.0}, "share of zeros must be in"),
        ({"method": "best"}, "`method` must be one of obs, wanda, magnitude; got 'best'"),
        ({"damping": 0.0}, r"`damping` must be in \(0, 1\)"),
        ({"keep_dense": ["nowhere.*"]}, "`keep_dense` 'nowhere.\\*' matches no layer"),
        ({"kinds": ["block"]}, r"`kinds` must be some of \['head', 'neuron'\]"),
    ],
)
def test_refusals(whole, call, message):
    with pytest.raises(BankError, match=message):
        sparsify(make_pipe(), whole, **call)


def test_it_needs_a_fitting_calibration(whole):
    with pytest.raises(BankError, match=r"method 'obs' needs a `calibration`; .*layers=\"all\""):
        sparsify(make_pipe())
    with pytest.raises(CalibrationError, match="the calibration is of another model"):
        sparsify(make_pipe(seed=2), whole)
    unet = make_pipeline("sd15")
    with pytest.raises(CalibrationError, match=r"has no Hessian for `down_blocks.0.resnets.0.conv2`"):
        sparsify(unet, calibrate(unet, ["fox"] * 12, steps=4), kinds=["channel"])


def test_it_is_for_one_denoiser(static):
    with pytest.raises(BankError, match="is of another DiTTransformer2DModel: the weights differ"):
        static.apply(make_pipe(seed=1))
    with pytest.raises(BankError, match="is for a DiTTransformer2DModel, got a SD3Transformer2DModel"):
        static.apply(make_denoiser("sd3"))
    with pytest.raises(BankError, match="is for a `transformer`; a StableDiffusionPipeline has none"):
        static.apply(make_pipeline("sd15"))
    with pytest.raises(StagePruneError, match="`kernels` must be 'auto' or 'dense', got 'fast'"):
        static.apply(make_pipe(), kernels="fast")


@pytest.mark.parametrize(
    ("method", "hint"), [("obs-nm", 'pattern="2:4", method="obs"'), ("wanda-unstructured", "pattern=0.5")]
)
def test_prune_names_the_function_for_single_weights(whole, method, hint):
    with pytest.raises(BankError, match=f"zeroes single weights.*stageprune.sparsify.*{hint}"):
        prune(make_pipe(), whole, method=method)


def test_a_method_can_be_plugged_in():
    @register_sparsifier("first")
    def first(problem):
        """The first columns go."""
        weight = problem.weight[:, :-1].clone()
        weight[:, : weight.shape[1] // 2] = 0
        return weight, problem.weight[:, -1]

    try:
        assert sparsifiers()["first"] == "The first columns go."
        model = sparsify(make_pipe(), pattern=0.5, method="first")
        assert not model.layers[DOWN].weight[:, :80].any() and model.valid(DOWN)
    finally:
        del _METHODS["first"]


def test_patterns():
    assert parse_pattern("0.5") == parse_pattern(0.5) == Share(0.5) and parse_pattern("2:4") == NM(2, 4)
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4]])
    assert NM(2, 4).holds(weight) and not NM(1, 4).holds(weight) and not NM(2, 3).holds(weight)
    assert Share(0.5).holds(weight) and not Share(0.9).holds(weight)
