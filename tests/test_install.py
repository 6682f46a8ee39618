"""install.py and the package's metadata, without installing anything."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed(project):
    found = {
        ".".join(("stageprune", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / "core").rglob("__init__.py")
    }
    assert found | {"stageprune"} == set(project["tool"]["setuptools"]["packages"])


def test_run_time_requirements_are_the_package_s(install, project):
    assert {*install.RUNTIME.values(), "torch>=2.6", "packaging>=21"} == set(project["project"]["dependencies"])


def test_here_installs_nothing_when_all_is_there(install, monkeypatch):
    monkeypatch.setattr(install.subprocess, "call", lambda *_: pytest.fail("called pip"))
    assert install.here() == 0


def test_here_never_replaces_torch(install, monkeypatch):
    calls = []
    monkeypatch.setitem(install.RUNTIME, "no_such_module", "no-such-package>=1")
    monkeypatch.setattr(install.subprocess, "call", lambda command: calls.append(command) or 0)
    assert install.here() == 0
    import torch

    assert calls[0][-2:] == ["no-such-package>=1", f"torch=={torch.__version__}"]


def test_an_unknown_job_is_refused():
    result = subprocess.run([sys.executable, ROOT / "install.py", "fly"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "install.py demo" in result.stderr


def test_importing_is_quiet_and_quick_to_say_what_it_has():
    code = "import stageprune, diffusers; print(hasattr(diffusers.DiffusionPipeline, 'enable_stage_pruning'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "True"
