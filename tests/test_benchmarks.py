"""Benchmark scripts stay runnable: the part of `families.py` that runs tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import families


@pytest.mark.parametrize("name", [*families.TINY])
def test_slicing_equals_masking_on_a_tiny_model_of_each_architecture(name):
    found = families.tiny_check(name)
    assert found["checks"] >= 3 and found["largest_error"] < 1e-4
