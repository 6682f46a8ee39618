"""Fixtures: a tiny random DiT pipeline, its calibrations, a bank for each way to hold weights, and the trained demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("STAGEPRUNE_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # so that every test module can import `support`

import pytest
import torch
from hypothesis import HealthCheck, settings

import stageprune
from stageprune.core.bundle import Bundle
from stageprune.core.calibration import Calibration, calibrate
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import Bank, prune
from support import LEVELS, SCHEDULE, SHARING_IDS, SHARINGS, STEPS, make_pipe

torch.set_num_threads(min(2, torch.get_num_threads()))
settings.register_profile(
    "stageprune", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("stageprune")

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo" / "dit-digits"


@pytest.fixture(scope="session")
def tiny_pipe():
    """Factory of tiny pipelines (5 heads x 8, 3 layers by default); the same arguments give equal weights."""
    return make_pipe


@pytest.fixture
def pipe(tiny_pipe):
    """A fresh tiny pipeline with the weights that `calibration` and `banks` were made for."""
    return tiny_pipe()


@pytest.fixture
def host(pipe):
    return DiffusersHost(pipe)


@pytest.fixture(scope="session")
def calibrated() -> Calibration:
    return calibrate(DiffusersHost(make_pipe()), [1, 2, 3] * 8, steps=STEPS, stages=5, tokens=1.0)


@pytest.fixture(scope="session")
def calibration(calibrated) -> Calibration:
    """Five stages kept apart."""
    return calibrated


@pytest.fixture(scope="session")
def pooled() -> Calibration:
    """The same trajectories, all stages in one."""
    return calibrate(DiffusersHost(make_pipe()), [1, 2, 3] * 8, steps=STEPS, stages=1, tokens=1.0)


@pytest.fixture(scope="session")
def banks(calibration) -> dict[str, Bank]:
    """`order-consumers` -> bank."""
    host = DiffusersHost(make_pipe())
    return {
        name: prune(host, calibration, levels=LEVELS, multiple=16, order=order, consumers=consumers)
        for name, (order, consumers) in zip(SHARING_IDS, SHARINGS, strict=True)
    }


@pytest.fixture(params=SHARING_IDS)
def bank(request, banks) -> Bank:
    """One bank for each way to hold weights."""
    return banks[request.param]


@pytest.fixture
def bundle(bank) -> Bundle:
    """The bank with a schedule in which every stage but one runs another level."""
    return Bundle(bank, SCHEDULE)


@pytest.fixture
def enabled(pipe, bundle):
    """The tiny pipeline with stage pruning on."""
    stageprune.enable_stage_pruning(pipe, bundle)
    return pipe


@pytest.fixture(scope="session")
def demo_pipe():
    """The trained demo, read once; tests that change it must restore it."""
    if not (DEMO / "model_index.json").is_file():
        pytest.skip("demo/dit-digits is not there: train it with demo/train_dit_digits.py")
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(DEMO)
    pipe.transformer.float()
    pipe.vae.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many tests did not run, and why."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("not run")
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
