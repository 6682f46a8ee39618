"""A search that is interrupted, or killed at any moment, goes on to the identical schedule and history."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import stageprune
from stageprune import Fitness, Round, SearchSettings
from stageprune.core.errors import SearchError
from stageprune.core.evaluation import ClassJudge
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import search
from stageprune.core.pruning import prune
from support import make_pipe, raising, same_state, state_of

SETTINGS = SearchSettings(generations=4, offspring=5, rounds=(Round(3, 0.5), Round(2)))
OPTIONS = {
    "target": 0.67,
    "prompts": [1, 2, 3, 4] * 2,
    "steps": 4,
    "stages": 4,
    "guidance": 1.0,
    "init": "mosaic",
    "settings": SETTINGS,
}


@pytest.fixture(scope="module")
def bank():
    return prune(DiffusersHost(make_pipe()), method="magnitude", levels=[0.2, 0.35, 0.5, 0.7], multiple=8)


def find(host, bank, **options):
    return search(host, bank, **{**OPTIONS, **options})


def told(result):
    """All of a result but what the interruptions themselves cost."""
    data = result.to_dict()
    return {**data, "cost": {**data["cost"], "seconds": 0, "repeated": 0}}


@pytest.fixture(scope="module")
def whole(bank):
    """Uninterrupted."""
    return find(DiffusersHost(make_pipe()), bank)


@pytest.mark.parametrize("calls", [1, 25, 60, 90, 120])
def test_an_interrupted_search_goes_on_to_the_identical_result(bank, whole, calls, tmp_path):
    pipe, path = make_pipe(), tmp_path / "search.part"
    host, state = DiffusersHost(pipe), state_of(pipe.transformer)
    with (
        raising(pipe.transformer.transformer_blocks[0], KeyboardInterrupt(), calls),
        pytest.raises(KeyboardInterrupt) as stop,
    ):
        find(host, bank, checkpoint=path)
    assert f"the same call goes on from {path}" in str(stop.value) and "search interrupted after" in str(stop.value)
    assert same_state(state, state_of(pipe.transformer))
    assert [file.name for file in tmp_path.iterdir()] == ["search.part"]
    (tmp_path / ".search.part.x1.tmp").touch()  # what SIGKILL leaves where it hits a write
    found = find(host, bank, checkpoint=path)
    assert told(found) == told(whole) and [file.name for file in tmp_path.iterdir()] == ["search.part"]


def test_interrupted_in_every_generation(bank, whole, tmp_path):
    """And a little further each time: no generation is begun twice in the history, no state is counted twice."""
    pipe, path, sessions = make_pipe(), tmp_path / "search.part", 0
    while True:
        sessions += 1
        try:
            with raising(pipe.transformer.transformer_blocks[0], KeyboardInterrupt(), 60):
                found = find(DiffusersHost(pipe), bank, checkpoint=path)
            break
        except KeyboardInterrupt:
            assert sessions < 10
    assert sessions > 2 and told(found) == told(whole) and found.cost.repeated > 0


def test_a_finished_search_is_not_run_again(bank, whole, tmp_path):
    pipe, path = make_pipe(), tmp_path / "search.part"
    first = find(DiffusersHost(pipe), bank, checkpoint=path)
    with raising(pipe.transformer.transformer_blocks[0], AssertionError("ran"), 1):
        again = find(DiffusersHost(pipe), bank, checkpoint=path)
    assert again == first and told(again) == told(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5}, r"not the same target \(\"macs:0.67\" there, \"macs:0.5\" here\)"),
        ({"settings": dataclasses.replace(SETTINGS, seed=3)}, r"not the same settings.seed \(0 there, 3 here\)\."),
        ({"settings": dataclasses.replace(SETTINGS, rounds=(Round(2),))}, "not the same settings.rounds"),
        ({"guidance": 1.5}, r"not the same guidance \(1.0 there, 1.5 here\)"),
        ({"steps": 5}, r"not the same steps \(4 there, 5 here\)"),
        ({"stages": [0.8, 0.6, 0.4]}, "not the same stages"),
        ({"prompts": [1, 2, 3, 5] * 2}, "not the same prompts"),
        ({"seed": 1}, "not the same seed"),
        ({"batch_size": 2}, "not the same batch_size"),
        ({"fitness": "latent_mae", "init": "random"}, "not the same fitness .*, init "),
        ({"judge": ClassJudge([1, 2, 3, 4])}, "not the same judge"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(bank, whole, options, message, checkpoint):
    with pytest.raises(SearchError, match=f"belongs to another search: {message}.*Delete it, or name another file"):
        find(DiffusersHost(make_pipe()), bank, checkpoint=checkpoint, **options)


@pytest.fixture(scope="module")
def checkpoint(bank, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "search.part"
    find(DiffusersHost(make_pipe()), bank, checkpoint=path)
    return path


def test_a_checkpoint_of_another_bank_or_sampler_is_refused(bank, checkpoint):
    other = prune(DiffusersHost(make_pipe()), method="random", levels=[0.2, 0.35, 0.5, 0.7], multiple=8)
    with pytest.raises(SearchError, match=r"not the same bank \("):
        find(DiffusersHost(make_pipe()), other, checkpoint=checkpoint)
    pipe = make_pipe()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="leading")
    with pytest.raises(SearchError, match="not the same scheduler_config"):
        find(DiffusersHost(pipe), bank, checkpoint=checkpoint)


def test_damaged_checkpoints_are_refused(bank, checkpoint, tmp_path):
    host, path = DiffusersHost(make_pipe()), tmp_path / "search.part"
    path.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(SearchError, match="is not a valid safetensors file"):
        find(host, bank, checkpoint=path)
    with safe_open(checkpoint, framework="pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={**meta, "format": "stageprune.search.0"})
    with pytest.raises(SearchError, match=r"format is 'stageprune\.search\.0', this version reads"):
        find(host, bank, checkpoint=path)
    state = json.loads(meta["state"])
    for broken in ({**state, "random": [3, [1, 2], None]}, {key: state[key] for key in state if key != "costs"}):
        save_file(tensors, path, metadata={**meta, "state": json.dumps(broken)})
        with pytest.raises(SearchError, match=r"is damaged \(.*Delete it to begin anew"):
            find(host, bank, checkpoint=path)
    save_file({**tensors, "probes": tensors["probes"] + 1}, path, metadata=meta)
    with pytest.raises(SearchError, match="is damaged"):
        find(host, bank, checkpoint=path)


def test_measured_times_are_kept(bank, tmp_path, monkeypatch):
    """Timed again after an interruption they would differ, and with them the budget."""
    timed = []

    def relative_times(sampling, pruner):
        timed.append(1)
        return {sparsity: 1 - sparsity * (0.9 + 0.01 * len(timed)) for sparsity in pruner.bank.sparsities}

    monkeypatch.setattr("stageprune.core.planning.costs.relative_times", relative_times)
    pipe, path = make_pipe(), tmp_path / "search.part"
    options = {"target": "speedup:1.4", "init": "random", "checkpoint": path}
    with raising(pipe.transformer.transformer_blocks[0], KeyboardInterrupt(), 60), pytest.raises(KeyboardInterrupt):
        find(DiffusersHost(pipe), bank, **options)
    found = find(DiffusersHost(pipe), bank, **options)
    assert len(timed) == 1 and found.spent <= 1 / 1.4 + 0.005


def test_a_user_s_function_can_be_resumed(bank, tmp_path):
    """Statistics of any width, and as many probes as were run, come back."""

    def spread(made, dense):
        return (made.latents - dense.latents).flatten(1)[:, :3]

    fitness = Fitness("spread", spread, reduce=lambda values: float(values.var(0).sum()), probes=2)
    whole = find(DiffusersHost(make_pipe()), bank, fitness=fitness)
    pipe, path = make_pipe(), tmp_path / "search.part"
    with raising(pipe.transformer.transformer_blocks[0], KeyboardInterrupt(), 80), pytest.raises(KeyboardInterrupt):
        find(DiffusersHost(pipe), bank, fitness=fitness, checkpoint=path)
    assert told(find(DiffusersHost(pipe), bank, fitness=fitness, checkpoint=path)) == told(whole)


def test_through_the_public_function(bank, tmp_path):
    pipe, options = make_pipe(), {**OPTIONS, "checkpoint": tmp_path / "search.part"}
    first = stageprune.search(pipe, bank, **options)
    assert stageprune.search(pipe, bank, **options) == first


def test_killed_at_random_moments_it_resumes_to_the_identical_result(tmp_path):
    """SIGKILL, in processes of their own: one that is left alone, and one that is killed again and again."""
    script = Path(__file__).with_name("killed_search.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), "6"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # it forks, which threads of OpenMP do not survive
        capture_output=True,
        text=True,
        check=False,
        timeout=570,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["killed"] >= 3 and outcome["identical"], outcome
    assert len(set(outcome["generations"])) > 1, "at different moments"
