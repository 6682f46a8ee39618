"""Run as a program by `test_search_resume.py`: a search that is killed at random moments, and one that is left alone.

usage: killed_search.py FOLDER KILLS
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from safetensors import safe_open
from test_search_resume import OPTIONS, DiffusersHost, make_pipe, prune, told

from stageprune.core.planning import search

SETTINGS = dataclasses.replace(OPTIONS["settings"], generations=12, offspring=8, patience=None)
LONGER = {**OPTIONS, "settings": SETTINGS, "steps": 6, "stages": 6}


def run(host, bank, path: Path, result: Path, seconds: float | None = None, generation: int = -1) -> tuple[bool, float]:
    """Search in a child, which SIGKILL ends so much processor time after its checkpoint has got to a generation.
    Whether it did, and what the child took.
    """
    child = os.fork()
    if child == 0:
        if seconds is not None:
            threading.Thread(target=die, args=(path, generation, seconds), daemon=True).start()
        result.write_text(json.dumps(told(search(host, bank, **LONGER, checkpoint=path))))
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status), used.ru_utime + used.ru_stime


def die(path: Path, generation: int, seconds: float) -> None:
    """Processor time, not time, so that a busy machine changes little."""
    while generations(path) < generation:
        time.sleep(0.003)
    at = time.process_time() + seconds
    while time.process_time() < at:
        time.sleep(0.003)
    os.kill(os.getpid(), signal.SIGKILL)


def generations(path: Path) -> int:
    """How far a checkpoint is."""
    if not path.exists():
        return -1
    with safe_open(path, framework="pt") as file:
        return len(json.loads(file.metadata()["state"])["history"])


def main(folder: Path, kills: int) -> None:
    """Kill the search so often, and write whether it ended as the one that was left alone."""
    host = DiffusersHost(make_pipe())
    bank = prune(host, method="magnitude", levels=[0.2, 0.35, 0.5, 0.7], multiple=8)
    _, whole = run(host, bank, folder / "whole.part", folder / "whole.json")
    draw, at, killed = random.Random(), [], True
    while killed:
        # Two draws never add up to the whole, and every third child gets a little further than those before it: there
        # are three kills at least, and not all in one generation.
        further = len(at) % 3 == 2
        seconds = draw.uniform(0.0, 0.05 if further else 0.3) * whole if len(at) < kills else None
        generation = max(at) + 1 if further else -1
        killed, _ = run(host, bank, folder / "killed.part", folder / "killed.json", seconds, generation)
        at += [generations(folder / "killed.part")] if killed else []
    same = (folder / "killed.json").read_text() == (folder / "whole.json").read_text()
    outcome = {"killed": len(at), "identical": same, "generations": at, "seconds": whole}
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
