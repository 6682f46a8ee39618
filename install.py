"""Set-up without prerequisites: only Python 3.11 or newer.

python install.py demo    make .venv, install, run the main job on the embedded pipeline
python install.py test    make .venv, install, run ruff, mypy and the tests
python install.py         add what is missing to the current interpreter (what ComfyUI-Manager runs); never torch
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("STAGEPRUNE_VENV", ROOT / ".venv"))
TORCH = "torch==2.13.0"  # the version the tests run on; any torch that is installed already is kept
RUNTIME = {  # import name -> requirement
    "diffusers": "diffusers>=0.37.1,<1",
    "safetensors": "safetensors>=0.5",
    "huggingface_hub": "huggingface_hub>=1.0,<3",
    "tqdm": "tqdm>=4.60",
}


def main() -> int:
    """Dispatch on the one argument."""
    if sys.version_info < (3, 11):
        print(f"StagePrune needs Python 3.11 or newer; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 2
    job = sys.argv[1] if len(sys.argv) > 1 else "here"
    jobs = {"demo": demo, "test": test, "here": here}
    if job not in jobs or len(sys.argv) > 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        return jobs[job]()
    except subprocess.CalledProcessError as error:
        print(f"failed ({error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode or 1
    except KeyboardInterrupt:
        return 130


def demo() -> int:
    """The main job on the embedded pipeline."""
    python = environment("demo")
    return subprocess.call([python, "-m", "stageprune.core.cli", "demo", "--out", str(ROOT / "out" / "demo")])


def test() -> int:
    """Lint, types, then the tests; the first that fails decides."""
    python = environment("test")
    cores = os.cpu_count() or 1
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread a worker: more would fight over the cores
    subprocess.run([python, "-m", "ruff", "check", "."], cwd=ROOT, check=True)
    subprocess.run([python, "-m", "ruff", "format", "--check", "."], cwd=ROOT, check=True)
    subprocess.run([python, "-m", "mypy"], cwd=ROOT, check=True)
    # The folder, not the package: to find a package's files coverage imports torch, and a second time for the tests.
    tests = [python, "-m", "pytest", "-n", str(min(cores, 4)), "--cov=core", "--cov-report=term"]
    return subprocess.call(tests, cwd=ROOT, env=single)


def here() -> int:
    """Install what is missing for this interpreter. An installed torch is pinned, so that pip cannot replace it."""
    missing = [requirement for name, requirement in RUNTIME.items() if importlib.util.find_spec(name) is None]
    if not missing:
        return 0
    if importlib.util.find_spec("torch") is None:
        missing.insert(0, TORCH)
    else:
        from importlib.metadata import version

        missing.append(f"torch=={version('torch')}")
    return subprocess.call([sys.executable, "-m", "pip", "install", *missing])


def environment(extra: str) -> str:
    """A virtual environment with the package in editable mode and this extra; its Python. Made once, then reused."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + TORCH.encode()).hexdigest()
    stamp = VENV / f".stageprune-{extra}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    print(f"installing into {VENV} (once; torch is large)", flush=True)
    if not python.exists():
        venv.create(VENV, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch goes first and pinned: by a range, pip would take the newest build with gigabytes of CUDA packages.
    if subprocess.call([str(python), "-c", "import torch"], stderr=subprocess.DEVNULL):
        subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{extra}]"], check=True)
    stamp.write_text(wanted)
    return str(python)


if __name__ == "__main__":
    sys.exit(main())
