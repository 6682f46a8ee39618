"""Several processes find what one finds. Here they are threads of one process, each with a pipeline of its own."""

from __future__ import annotations

import os
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from test_search_resume import OPTIONS, told

from stageprune.core import distributed
from stageprune.core.distributed import Accelerated, processes_here
from stageprune.core.errors import StagePruneError
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import search
from stageprune.core.processes import Single
from stageprune.core.pruning import prune
from support import make_pipe, raising
from together import run_together


@pytest.fixture(scope="module")
def bank():
    return prune(DiffusersHost(make_pipe()), method="magnitude", levels=[0.2, 0.35, 0.5, 0.7], multiple=8)


def together(bank, size, prepare=lambda rank, pipe: None, **options):
    """What each rank found, or the error that stopped it."""
    pipes = [make_pipe() for _ in range(size)]

    def run(ranks):
        prepare(ranks.place[0], pipes[ranks.place[0]])
        return search(DiffusersHost(pipes[ranks.place[0]]), bank, **OPTIONS, **options, processes=ranks)

    return run_together(size, run)


@pytest.fixture(scope="module")
def alone(bank):
    return told(search(DiffusersHost(make_pipe()), bank, **OPTIONS))


@pytest.mark.parametrize("size", [2, 3])
def test_they_find_what_one_finds(bank, alone, size, tmp_path):
    found = together(bank, size, checkpoint=tmp_path / "search.part")
    assert [told(result) for result in found] == [alone] * size
    assert search(DiffusersHost(make_pipe()), bank, **OPTIONS, checkpoint=tmp_path / "search.part").finalists


def test_one_of_them_is_killed(bank, alone, tmp_path):
    """All stop; the same call goes on, whatever the number of processes."""
    path = tmp_path / "search.part"

    def die(rank, pipe):
        if rank == 1:
            raising(pipe.transformer.transformer_blocks[0], KeyboardInterrupt(), 60).__enter__()

    stopped = together(bank, 2, die, checkpoint=path)
    assert isinstance(stopped[1], KeyboardInterrupt) and isinstance(stopped[0], threading.BrokenBarrierError)
    assert [told(result) for result in together(bank, 2, checkpoint=path)] == [alone] * 2


def test_all_refuse_what_the_first_refuses(bank, tmp_path):
    path = tmp_path / "search.part"
    path.write_bytes(b"nothing")
    assert all("is not a valid safetensors file" in str(error) for error in together(bank, 2, checkpoint=path))


def test_work_is_divided_whole():
    for size in range(1, 5):
        for count in range(9):
            parts = [Accelerated(SimpleNamespace(process_index=r, num_processes=size)).part(count) for r in range(size)]
            assert [place for part in parts for place in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_launched_alone_it_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(processes_here(), Single)


def test_launched_with_others_it_asks_accelerate(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(StagePruneError, match="need accelerate: pip install accelerate"):
        processes_here()
    library = ModuleType("accelerate")
    library.PartialState = lambda cpu, timeout: SimpleNamespace(
        is_main_process=False, device="cuda:1", process_index=1, num_processes=2, cpu=cpu, timeout=timeout
    )
    monkeypatch.setitem(sys.modules, "accelerate", library)
    found = processes_here()
    assert (found.first, found.device, list(found.part(5))) == (False, "cuda:1", [2, 3, 4])
    assert found.state.timeout == distributed._PATIENCE
