"""Calibration: the Hessians, their file, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import stageprune
from stageprune.core.calibration import Calibration, calibrate, step_weights
from stageprune.core.calibration import hessian as recorders
from stageprune.core.calibration.tf32 import tf32_products
from stageprune.core.eager import eager
from stageprune.core.errors import CalibrationError, ScheduleError, StagePruneError
from stageprune.core.groups import consumer_sites, find_groups, width_groups
from stageprune.core.groups.layer import layer_at
from stageprune.core.hosts.diffusers import DiffusersHost
from support import COMPILED, LABELS, compile_and_run, inside, latents, make_pipe, relative

PROMPTS = [1, 2, 3, 4, 5, 6, 7]
CALL = {"steps": 10, "guidance": 1.5, "stages": 2, "batch_size": 2}


def bit_equal(first: Calibration, second: Calibration) -> bool:
    return (
        first.hessians.keys() == second.hessians.keys()
        and all(torch.equal(first.hessians[path], second.hessians[path]) for path in first.hessians)
        and all(torch.equal(first.rows[path], second.rows[path]) for path in first.rows)
        and first.edges == second.edges
        and first.provenance == second.provenance
    )


def slow_hessians(pipe, prompts, *, steps, guidance, stages, weights, batch_size):
    """The same sums in float64, by hooks of our own while the pipeline itself generates."""
    host = DiffusersHost(pipe)
    taus = host.taus(steps)
    groups = width_groups(find_groups(pipe.transformer))
    sums, calls = {}, []

    def record(path, inputs):
        stage = min(int((1 - taus[len(calls) - 1]) * stages), stages - 1) if taus[len(calls) - 1] < 1 else 0
        data = inputs.reshape(-1, inputs.shape[-1]).double()
        data = torch.cat([data, torch.ones(len(data), 1, dtype=torch.float64)], 1)
        total = sums.setdefault(path, torch.zeros(stages, data.shape[1], data.shape[1], dtype=torch.float64))
        total[stage] += weights[len(calls) - 1] * data.T @ data

    hooks = [pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))]
    for path in consumer_sites(groups):
        linear = layer_at(pipe.transformer, path)
        hooks.append(linear.register_forward_pre_hook(lambda _, args, path=path: record(path, args[0])))
    for begin in range(0, len(prompts), batch_size):
        part = prompts[begin : begin + batch_size]
        generators = [torch.Generator().manual_seed(begin + i) for i in range(len(part))]
        calls.clear()
        pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt")
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("guidance", [1.5, 1.0])
@pytest.mark.parametrize("alpha", ["uniform", "log-decrease", lambda tau: tau**2])
def test_hessian_is_what_the_pipeline_shows(pipe, guidance, alpha):
    steps = 10
    calibration = calibrate(
        DiffusersHost(pipe), PROMPTS, steps=steps, guidance=guidance, stages=2, alpha=alpha, batch_size=3
    )
    weights = step_weights(alpha, DiffusersHost(pipe).taus(steps))
    expected = slow_hessians(pipe, PROMPTS, steps=steps, guidance=guidance, stages=2, weights=weights, batch_size=3)
    assert calibration.hessians.keys() == expected.keys() and len(expected) == 6
    for path, hessian in expected.items():
        assert relative(calibration.hessians[path].double(), hessian) < 1e-5
        inputs = 16 * len(PROMPTS) * (2 if guidance > 1 else 1)
        assert calibration.rows[path].tolist() == [5 * inputs, 5 * inputs]
        assert torch.equal(calibration.hessians[path], calibration.hessians[path].mT)


def test_pooled_is_the_sum_of_the_stages(calibration, pooled):
    assert pooled.stages == 1 and calibration.stages == 5
    for path, hessian in pooled.hessians.items():
        assert relative(calibration.hessian(path), hessian[0]) < 1e-5
        assert int(calibration.rows[path].sum()) == int(pooled.rows[path][0])
        assert torch.equal(calibration.hessian(path, 3), calibration.hessians[path][3])
    with pytest.raises(CalibrationError, match="has no Hessian for `nowhere`"):
        pooled.hessian("nowhere")


def test_calibrating_leaves_no_trace_and_is_deterministic(pipe):
    structure = inside(pipe.transformer)
    first, second = (calibrate(DiffusersHost(pipe), PROMPTS, **CALL) for _ in range(2))
    assert bit_equal(first, second)
    assert inside(pipe.transformer) == structure
    assert "7 prompts, 10 steps" in str(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_products_and_nothing_else_round_to_tf32(dtype, monkeypatch):
    """The switch is on while inputs are multiplied, and as the user left it before and after."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    switch = partial(getattr, matmul, name)
    before, seen, plain = switch(), [], recorders._add_gram
    monkeypatch.setattr(recorders, "_add_gram", lambda *args: (seen.append(switch()), plain(*args)))
    recorder = recorders.HessianRecorder(torch.nn.Sequential(torch.nn.Linear(64, 3)), {"0": 64}, stages=1)
    inputs = torch.randn(2, 8, 64).to(dtype)
    recorder.add_batch("0", inputs)
    assert seen == ["tf32" if isinstance(before, str) else True]
    assert switch() == before != seen[0]
    rows = inputs.flatten(0, 1).double()
    assert relative(recorder.hessians["0"][0, :-1, :-1].double(), rows.T @ rows) < 1e-6
    mantissa, _ = torch.frexp(inputs.float())
    exact = torch.equal((mantissa * 2**11).round(), mantissa * 2**11)
    assert exact == (dtype != torch.float32), "half precision loses nothing by it"


def test_threads_leave_the_switch_as_it_was():
    """As their blocks overlap: the first ends while the second goes on."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before, first, second = getattr(matmul, name), tf32_products(), tf32_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    within = getattr(matmul, name)
    second.__exit__(None, None, None)
    assert within != before == getattr(matmul, name)


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_denoiser_is_calibrated_as_an_eager_one(how):
    """Its graphs are older than the hooks that record, so they are set aside, and serve again afterwards."""
    options = {**CALL, "kinds": ("head", "neuron", "block"), "skip_blocks": True, "taylor": 0.0}
    expected = calibrate(DiffusersHost(make_pipe()), PROMPTS, **options)
    torch._dynamo.reset()
    pipe = make_pipe()
    graphs = compile_and_run(pipe, how, CALL["batch_size"])
    images, count = latents(pipe), len(graphs)
    found = calibrate(DiffusersHost(pipe), PROMPTS, **options)
    assert len(graphs) == count, "no graph may run, and none be captured"
    assert bit_equal(found, expected)
    assert found.scores.keys() == expected.scores.keys()
    assert all(torch.equal(found.scores[name], table) for name, table in expected.scores.items())
    assert torch.equal(latents(pipe), images) and len(graphs) > count
    torch._dynamo.reset()


def test_eager_blocks_of_several_threads_leave_the_switch_as_it_was():
    """As they overlap: the first ends while the second goes on."""
    ran = []

    def backend(graph, _):
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    compiled = torch.compile(lambda values: values + 1, backend=backend)

    def is_eager():
        ran.clear()
        compiled(torch.ones(2))
        return not ran

    first, second = eager(), eager()
    assert not is_eager()
    first.__enter__()
    second.__enter__()
    assert is_eager()
    first.__exit__(None, None, None)
    assert is_eager()
    second.__exit__(None, None, None)
    assert not is_eager()


def test_explicit_boundaries(pipe):
    calibration = calibrate(DiffusersHost(pipe), PROMPTS, steps=10, stages=[0.75])
    assert calibration.edges == (1.0, 0.75, 0.0)
    assert calibration.rows["transformer_blocks.0.ff.net.2"].tolist() == [3 * 224, 7 * 224]  # taus 1.0, 0.9, 0.8


def test_save_and_load(calibration, tmp_path):
    again = Calibration.load(calibration.save(tmp_path / "deep" / "calibration.safetensors"))
    assert bit_equal(again, calibration)
    assert again.fingerprint.mismatch(calibration.fingerprint) is None
    assert not list((tmp_path / "deep").glob(".*")), "no temporary file stays behind"


def test_provenance_says_how_to_repeat_it(calibration):
    made = calibration.provenance
    assert made["prompts"] == [1, 2, 3] * 8 and made["steps"] == 5 and made["guidance"] == 1.5
    assert made["scheduler"] == "DDIMScheduler" and made["scheduler_config"]["timestep_spacing"] == "trailing"
    assert made["versions"]["torch"] and json.dumps(made)


def rewrite(path: Path, change) -> Path:
    """Change tensors and metadata of a safetensors file in place."""
    with safe_open(path, framework="pt") as file:
        meta, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, meta)
    save_file(tensors, path, metadata=meta)
    return path


@pytest.mark.parametrize("size", [0, 5, 100, -10])
def test_truncated_file(calibration, tmp_path, size):
    path = calibration.save(tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CalibrationError, match=r"c\.safetensors: not a valid safetensors file"):
        Calibration.load(path)


HESSIAN = "hessian.transformer_blocks.1.ff.net.2"
ROWS = "rows.transformer_blocks.1.ff.net.2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format="other"), "format is 'other', this version reads 'stageprune.calibration.1'"),
        (lambda t, m: m.clear(), "format is None"),
        (lambda t, m: m.update(edges="1"), "its metadata are damaged"),
        (lambda t, m: m.update(edges="[1, 0]"), r"`transformer_blocks.\d.* has shape .* for 1 stages"),
        (lambda t, m: m.update(fingerprint="{}"), "its metadata are damaged"),
        (lambda t, m: m.update(provenance="nonsense"), "its metadata are damaged"),
        (lambda t, m: m.update(provenance="[]"), "its metadata are damaged"),
        (lambda t, m: m.pop("provenance"), "its metadata are damaged"),
        (lambda t, m: t[HESSIAN].view(-1)[7].fill_(float("nan")), "`transformer_blocks.1.ff.net.2` holds NaN"),
        (lambda t, m: t[HESSIAN].view(-1)[7].fill_(float("inf")), "holds NaN or infinity"),
        (lambda t, m: t.update({HESSIAN: t[HESSIAN][:, :-1].clone()}), "`transformer_blocks.1.ff.net.2` has shape"),
        (lambda t, m: t.pop(ROWS), "`transformer_blocks.1.ff.net.2` has shape"),
    ],
)
def test_damaged_file(calibration, tmp_path, change, message):
    path = rewrite(calibration.save(tmp_path / "c.safetensors"), change)
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(CalibrationError, match="no such calibration file"):
        Calibration.load(tmp_path / "nothing")
    with pytest.raises(CalibrationError, match="no such calibration file"):
        Calibration.load(tmp_path)


def test_calibration_that_lacks_a_consumer(host, calibration, tmp_path):
    path = calibration.save(tmp_path / "c.safetensors")
    thin = Calibration.load(rewrite(path, lambda t, m: (t.pop(HESSIAN), t.pop(ROWS))))
    with pytest.raises(CalibrationError, match=r"no Hessian for `transformer_blocks.1.ff.net.2`"):
        stageprune.core.pruning.prune(host, thin, levels=[0.5])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": []}, CalibrationError, "`prompts` is empty"),
        ({"prompts": "cat"}, StagePruneError, r"must be a list of texts or .* got one str; give \['cat'\]"),
        ({"steps": 0}, CalibrationError, "`steps` and `batch_size` must be at least 1"),
        ({"batch_size": 0}, CalibrationError, "`steps` and `batch_size` must be at least 1"),
        ({"stages": 0}, CalibrationError, "`stages` must be at least 1"),
        ({"stages": [0.2, 0.8]}, ScheduleError, "low < high"),
        ({"alpha": "cosine"}, CalibrationError, "`alpha` must be .* one of uniform, .*; got 'cosine'"),
        ({"prompts": [1, 5000]}, StagePruneError, "class label 5000 is out of range"),
        ({"prompts": [1, -1]}, StagePruneError, "class label -1 is out of range"),
        ({"prompts": ["a cat"]}, StagePruneError, "prompt 'a cat' is no class of this pipeline"),
    ],
)
def test_calibrate_refuses(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        stageprune.calibrate(pipe, **{"prompts": LABELS, "steps": 2, **arguments})


def test_too_few_data(pipe):
    with pytest.raises(CalibrationError, match=r"too few .*net.2` has 161 columns but saw only 64 inputs \(") as caught:
        stageprune.calibrate(pipe, [1, 2], steps=1)
    assert "Use at least 3 times as many prompts or steps" in str(caught.value)
    with pytest.raises(CalibrationError, match="saw only 0 inputs in one of its stages") as caught:
        stageprune.calibrate(pipe, [1, 2] * 20, steps=2, stages=5)
    assert "as many prompts" not in str(caught.value), "no number of prompts helps a stage that no step visits"


def test_the_advice_on_too_few_data_suffices(pipe):
    """1.4 times too few must not be answered with `1 times as many`."""
    with pytest.raises(CalibrationError) as caught:
        stageprune.calibrate(pipe, [1, 2, 3, 4], steps=1)  # 128 inputs for 161 columns
    factor = int(str(caught.value).split("at least ")[1].split(" times")[0])
    assert factor * 128 >= 161


@pytest.mark.parametrize("calls", [3, 10, 25, 38])
def test_interrupted_and_resumed_is_bit_identical(pipe, tmp_path, calls):
    whole = calibrate(DiffusersHost(pipe), PROMPTS, **CALL)
    checkpoint, left = tmp_path / "c.part", [calls]
    structure = inside(pipe.transformer)

    def interrupt(*_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)
    hook.remove()
    assert inside(pipe.transformer) == structure
    assert checkpoint.exists() == (calls > 10)
    if calls > 10:
        assert Calibration.load(checkpoint).provenance["done"] == (calls - 1) // 10, "batches"
    made = []
    hook = pipe.transformer.register_forward_hook(lambda *_: made.append(1))
    resumed = calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)
    hook.remove()
    assert bit_equal(resumed, whole)
    assert len(made) == 40 - 10 * ((calls - 1) // 10), "what the checkpoint covers is not run again"
    last = Calibration.load(checkpoint)
    assert (last.provenance.pop("done"), last.provenance.pop("share")) == (4, [0, 7]) and bit_equal(last, whole)
    assert bit_equal(calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL), whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 5}, "steps"),
        ({"guidance": 2.0}, "guidance"),
        ({"stages": 1}, "edges"),
        ({"batch_size": 3}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"alpha": "log-decrease"}, "alpha"),
    ],
)
def test_checkpoint_of_another_call_is_refused(pipe, tmp_path, change, named):
    checkpoint = tmp_path / "c.part"
    calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)
    before = checkpoint.read_bytes()
    with pytest.raises(CalibrationError, match=rf"c\.part belongs to another calibration: not the same {named}"):
        calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **{**CALL, **change})
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_other_prompts_model_or_sampler_is_refused(pipe, tmp_path):
    checkpoint = tmp_path / "c.part"
    calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)
    with pytest.raises(CalibrationError, match="not the same prompts"):
        calibrate(DiffusersHost(pipe), PROMPTS[:-1], checkpoint=checkpoint, **CALL)
    with pytest.raises(CalibrationError, match="not the same model"):
        calibrate(DiffusersHost(make_pipe(seed=1)), PROMPTS, checkpoint=checkpoint, **CALL)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.raises(CalibrationError, match="not the same scheduler_config"):
        calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(CalibrationError, match=r"c\.part: not a valid safetensors file"):
        calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from support import make_pipe
from stageprune.core.calibration import calibrate
from stageprune.core.hosts.diffusers import DiffusersHost
pipe = make_pipe()
pipe.transformer.register_forward_hook(lambda *_: __import__("time").sleep(0.02))
calibrate(DiffusersHost(pipe), [1, 2, 3, 4, 5, 6, 7], steps=10, stages=2, batch_size=2, checkpoint=sys.argv[2])
"""


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(pipe, tmp_path):
    """SIGKILL at any moment leaves a whole checkpoint or none."""
    checkpoint = tmp_path / "c.part"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(checkpoint)]
    path = os.pathsep.join([str(Path(stageprune.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "STAGEPRUNE_QUIET": "1"})
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must have been killed, not have ended"
    assert 0 < Calibration.load(checkpoint).provenance["done"] < 4
    resumed = calibrate(DiffusersHost(pipe), PROMPTS, checkpoint=checkpoint, **CALL)
    assert bit_equal(resumed, calibrate(DiffusersHost(pipe), PROMPTS, **CALL))
