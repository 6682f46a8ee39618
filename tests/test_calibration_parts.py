"""A calibration in parts: Hessians in packages, a share of the tokens, prompts divided among processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stageprune
import zoo
from stageprune.core.calibration import Calibration, calibrate
from stageprune.core.calibration.packages import GIB, hessian_bytes, packages
from stageprune.core.errors import CalibrationError, StagePruneError
from stageprune.core.hosts.diffusers import DiffusersHost
from support import make_pipe, raising, relative
from together import run_together

PROMPTS = [1, 2, 3, 4, 5, 6, 7]
CALL = {"steps": 6, "guidance": 1.5, "stages": 2, "batch_size": 2}


def run(pipe=None, prompts=PROMPTS, **options) -> Calibration:
    return calibrate(DiffusersHost(pipe or make_pipe()), prompts, **{**CALL, **options})


@pytest.fixture(scope="module")
def whole() -> Calibration:
    return run()


def half(calibration: Calibration) -> float:
    """A budget that takes half of the Hessians, about."""
    return sum(hessian_bytes(table.shape[-1] - 1, 2) for table in calibration.hessians.values()) / GIB / 2


@given(
    columns=st.lists(st.integers(1, 400), min_size=1, max_size=12), stages=st.integers(1, 5), extra=st.floats(1.0, 20)
)
def test_packages_hold_every_layer_once_within_the_budget(columns, stages, extra):
    widths = {f"layer{index}": each for index, each in enumerate(columns)}
    budget = extra * hessian_bytes(max(columns), stages) / GIB
    parts = packages(widths, stages, budget)
    assert [path for part in parts for path in part] == [*widths]
    sizes = [sum(hessian_bytes(widths[path], stages) for path in part) / GIB for part in parts]
    assert all(part for part in parts) and max(sizes) <= budget * (1 + 1e-9)
    assert all(
        size + following > budget * (1 - 1e-9)
        for size, following in zip(sizes[:-1], _firsts(parts, widths, stages), strict=True)
    )


def _firsts(parts, widths, stages):
    """Size of the layer that each package had no room for."""
    return [hessian_bytes(widths[part[0]], stages) / GIB for part in parts[1:]]


@pytest.mark.parametrize("budget", [0.0, -1.0, 1e-6])
def test_a_budget_for_not_even_one_layer_is_refused(budget):
    with pytest.raises(CalibrationError, match=r"`hessian_budget` is too small: got .* GiB; the Hessian of `.*` alone"):
        run(hessian_budget=budget)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_packages_sum_the_same(name):
    """The prompts run once for each package; every Hessian is that of a single run, bit for bit."""
    pipe = zoo.make_pipeline(name)
    prompts, calls = (list(zoo.prompts_for(pipe)) * 4)[:4], []
    options = {"prompts": prompts, "kinds": ["head", "neuron", "block"], "stages": 1}
    alone = run(pipe, **options)
    hook = DiffusersHost(pipe).denoiser.register_forward_hook(lambda *_: calls.append(1))
    parted = run(pipe, **options, hessian_budget=half(alone) / 2 * 1.3)
    hook.remove()
    assert len(calls) > 1.5 * 6 * 2
    assert parted.hessians.keys() == alone.hessians.keys()
    for path, table in alone.hessians.items():
        assert torch.equal(parted.hessians[path], table) and torch.equal(parted.rows[path], alone.rows[path])
    assert all(torch.equal(parted.scores[name], table) for name, table in alone.scores.items()) and alone.scores


@pytest.mark.parametrize("calls", [20, 30, 45])
def test_interrupted_in_any_package_it_resumes_to_the_same(whole, calls, tmp_path):
    options = {"hessian_budget": half(whole) * 1.3, "checkpoint": tmp_path / "c.part", "tokens": 0.9}
    pipe = make_pipe()
    straight = run(hessian_budget=options["hessian_budget"], tokens=0.9)
    with pytest.raises(KeyboardInterrupt), raising(pipe.transformer, KeyboardInterrupt(), calls):
        run(pipe, **options)
    made = []
    pipe.transformer.register_forward_hook(lambda *_: made.append(1))
    resumed = run(pipe, **options)
    assert len(made) == 48 - 6 * ((calls - 1) // 6), "two packages of four batches; those that were done are not again"
    assert all(torch.equal(resumed.hessians[path], table) for path, table in straight.hessians.items())
    assert resumed.provenance == straight.provenance
    with pytest.raises(CalibrationError, match="not the same hessian_budget"):
        run(pipe, **{**options, "hessian_budget": None})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_drawn_depends_neither_on_batches_nor_on_packages(whole, batch_size):
    some = run(tokens=0.5)
    other = run(tokens=0.5, batch_size=batch_size, hessian_budget=half(whole) * 1.3)
    for path, table in some.hessians.items():
        assert torch.equal(other.rows[path], some.rows[path]) and relative(other.hessians[path], table) < 1e-5


def test_by_itself_it_draws_what_a_hessian_needs(monkeypatch):
    """With few data all; else so many a column and stage as is said."""
    everything, plain = run(tokens=1.0), run()
    assert all(torch.equal(plain.hessians[path], table) for path, table in everything.hessians.items())
    monkeypatch.setattr("stageprune.core.calibration.recorders.INPUTS_PER_COLUMN", 2)
    fewer = run()
    for path, table in fewer.hessians.items():
        seen = int(fewer.rows[path].sum()) / fewer.stages
        assert 2 * table.shape[-1] <= 1.3 * seen and seen < int(everything.rows[path].sum()) / fewer.stages


def test_some_tokens_tell_nearly_the_same():
    """Half of them, drawn at random: the mean second moment is that of all within the noise of so few data."""
    whole, some = run(tokens=1.0, steps=30), run(tokens=0.5, steps=30)
    for path, table in whole.hessians.items():
        assert some.rows[path].tolist() == pytest.approx([count / 2 for count in whole.rows[path].tolist()], rel=0.2)
        drawn = some.hessians[path] / some.hessians[path][:, -1:, -1:]
        assert 0 < relative(drawn, table / table[:, -1:, -1:]) < 0.25
    again = run(tokens=0.5, steps=30)
    assert all(torch.equal(again.hessians[path], table) for path, table in some.hessians.items())


@pytest.mark.parametrize("tokens", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_of_tokens_out_of_range(tokens):
    with pytest.raises(CalibrationError, match=r"`tokens` must be a share of each call's inputs in \(0, 1\], got"):
        run(tokens=tokens)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_find_what_one_finds(whole, size, tmp_path):
    pipes = [make_pipe() for _ in range(size)]
    made = run_together(size, lambda ranks: run(pipes[ranks.place[0]], processes=ranks, checkpoint=tmp_path / "c.part"))
    assert len(list(tmp_path.iterdir())) == size, "each has its own checkpoint"
    for found in made:
        assert found.provenance == whole.provenance
        for path, table in whole.hessians.items():
            assert torch.equal(found.rows[path], whole.rows[path]) and relative(found.hessians[path], table) < 1e-6
            assert torch.equal(found.hessians[path], made[0].hessians[path])


def test_a_killed_process_stops_all_and_the_same_call_goes_on(whole, tmp_path):
    path, calls = tmp_path / "c.part", []

    def work(ranks, dies):
        pipe = make_pipe()
        pipe.transformer.register_forward_hook(lambda *_: calls.append(ranks.place[0]))
        if ranks.place[0] == 1 and dies:
            with raising(pipe.transformer, KeyboardInterrupt(), 9):
                return run(pipe, processes=ranks, checkpoint=path)
        return run(pipe, processes=ranks, checkpoint=path)

    stopped = run_together(2, lambda ranks: work(ranks, dies=True))
    assert isinstance(stopped[0], threading.BrokenBarrierError) and isinstance(stopped[1], KeyboardInterrupt)
    calls.clear()
    found = run_together(2, lambda ranks: work(ranks, dies=False))
    assert calls == [1] * 6, "the first had finished; the second had done one of its two batches"
    assert all(relative(found[0].hessians[name], table) < 1e-6 for name, table in whole.hessians.items())
    (tmp_path / "c.part.1-of-2").rename(tmp_path / "c.part.1-of-3")
    other = run_together(3, lambda ranks: work(ranks, dies=False) if ranks.first else None)
    assert isinstance(other[0], StagePruneError) and "not the same share" in str(other[0])


@pytest.mark.slow
def test_two_real_processes(whole, tmp_path):
    """torchrun starts the command twice (accelerate does so on GPUs only); one of them is killed at first."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    make_pipe().save_pretrained(tmp_path / "pipe")
    root = str(Path(stageprune.__file__).parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
        "STAGEPRUNE_QUIET": "1",
    }  # fmt: skip
    out = tmp_path / "c.safetensors"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stageprune",
        "calibrate", tmp_path / "pipe", "--prompts", "1,2,3,4,5,6,7", "--count", "7", "--steps", "6",
        "--guidance", "1.5", "--stages", "2", "--batch-size", "2", "--device", "cpu", "-o", out,
    ]  # fmt: skip
    dies = tmp_path / "sitecustomize.py"
    dies.write_text(DIES)
    path = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    killed = subprocess.run(
        command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert killed.returncode and "Signal 9" in killed.stderr and not out.exists()
    assert (tmp_path / "c.safetensors.part.2-of-2").exists()
    dies.unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.part*"))
    found = Calibration.load(out)
    for name, table in whole.hessians.items():
        assert torch.equal(found.rows[name], whole.rows[name]) and relative(found.hessians[name], table) < 1e-6


DIES = """
import os
if os.environ.get("RANK") == "1":
    from stageprune.core.calibration.calibration import Calibration
    save = Calibration.save
    def saved(self, path):
        save(self, path)
        os.kill(os.getpid(), 9)
    Calibration.save = saved
"""
