"""Benchmark scripts stay runnable: what of them does not take long."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import common
import families
import front
import front_page
import provenance
import stages_page


@pytest.mark.parametrize("name", [*families.TINY])
def test_slicing_equals_masking_on_a_tiny_model_of_each_architecture(name):
    found = families.tiny_check(name)
    assert found["checks"] >= 3 and found["largest_error"] < 1e-4


CALLS = front.CALLS["dit-digits"]


def front_of(demo: str, solver: str) -> dict:
    """What `front.py` writes, made up: error 1 / cost, half of it for steps and levels."""
    rows = {"fine": {"calls": 40.0, "steps": 40}}
    for calls in CALLS:
        for way in ("fewer steps", "steps", "joint", "joint by Frechet", "uniform, 20 steps", "measured, 4 steps"):
            error = {"mean": (0.5 if way.startswith("joint") else 1.0) / calls, "std": 0.0}
            facts = {
                "calls": float(calls),
                "steps": calls,
                "fine": error,
                "accuracy": {"mean": 0.9},
                "frechet": 2.0,
                "predicted": error["mean"] / 3,
                "images": [error["mean"] * (1 + 0.1 * (image % 3)) for image in range(12)],
            }
            rows[f"{calls}/{way}"] = facts
    rows["2/joint"] = {"refused": "not a single step fits"}
    return {"demo": demo, "solver": solver, "sets": 3, "count": 40, "environment": {"cpu": "a CPU"}, "rows": rows}


def test_the_page_of_fronts_counts_who_is_best(tmp_path):
    fronts = {f"front-x-{solver}": front_of("x", solver) for solver in front.SOLVERS}
    text = front_page.page(fronts, tmp_path)
    budgets = len(CALLS) - 1
    assert f"| x | first | steps and levels | {budgets - 1}, 0, 0 | {budgets - 1} of {budgets} |" in text
    assert f"| x | second | steps and levels, by Frechet | 1, {budgets - 1}, 0 |" in text and "| 0.50 |" in text
    lost = f"| x | first | fewer steps | 0, 1, {budgets - 1} | {budgets} of {budgets} | {budgets} of {budgets} | 1.00 |"
    assert lost in text, "tied where the plan was refused"
    assert f"| x | first | {2 * len(CALLS) - 1} | 3.00 | 3.00 | 3.00 |" in text
    short = front_page.short(fronts)
    four = "| x, second order | 4 | 0.2500 / 2.00 | 0.2500 / 2.00 | 0.2500 / 2.00 | 0.1250 / 2.00 | 0.1250 / 2.00 |"
    assert four in short
    assert "| x, first order | 2 | 0.5000 / 2.00 | 0.5000 / 2.00 | 0.5000 / 2.00 |  | 0.2500 / 2.00 |" in short, (
        "refused: an empty cell"
    )
    assert (tmp_path / "front-x.png").stat().st_size > 10_000 and (tmp_path / "front-x-few.png").exists()


@pytest.mark.parametrize("name", ["dit-digits", "flux-shapes"])
def test_both_solvers_of_a_demo_visit_lists(name):
    subject = common.Subject(name)
    for solver in front.SOLVERS:
        if solver == "second":
            subject.pipe.scheduler = front.second_order(subject.pipe.scheduler)
        host = subject.host
        own = host.taus(4)
        assert len(own) == 4 and host.visiting(own[:2] + own[3:]).taus(3) == pytest.approx(own[:2] + own[3:])


def strategies_of(ours: float, theirs: float) -> dict:
    """What `strategies.py` writes, made up: two searches of one target, ours at 100 steps, Diff-ES at 1,000."""
    judged = {"accuracy": {"mean": 1.0}, "frechet_pooled": 2.0, "seconds": 3.0}
    found = {"ours": (ours, 100, [[40, 9.0], [60, 2.0]]), "Diff-ES as published": (theirs, 1000, [[1000, theirs]])}
    rows = {
        f"0.67/{name}/{seed}": {
            **judged,
            "latent_mse": {"mean": fitness + seed},
            "fitness": fitness,
            "denoiser_steps": steps,
            "course": course,
        }
        for name, (fitness, steps, course) in found.items()
        for seed in (0, 1)
    }
    rows["0.67/uniform/0"] = {**judged, "latent_mse": {"mean": 5.0}}
    return {"steps": 10, "stages": 10, "probes": 8, "sets": 3, "count": 40, "rows": rows}


def test_the_page_of_stages_says_when_ours_was_there(tmp_path):
    text = stages_page.page({"strategies": {"x": strategies_of(2.0, 3.0)}})
    assert "in 2 of 2 runs, after 0.060 to 0.060 of its denoiser steps" in text
    assert "no worse in 2;" in text and "0.71 times" in text
    assert "| 0.67 | ours | 2 | 2.50000 ± 0.50000 | 1.000 | 2.00 | 100 | 3 |" in text
    assert "| 0.67 | uniform | 1 | 5.00000 | 1.000 | 2.00 |  | 3 |" in text
    worse = stages_page.page({"strategies": {"x": strategies_of(2.0, 1.0)}})
    assert "in none of 2 runs" in worse and "no worse in 0;" in worse and "What the aim does" not in worse


def test_the_page_of_stages_says_which_rule_ends_a_race():
    """Means over the budgets, and a rule that gives nobody up."""
    rows = [{"each": 8, "clear": clear, "rounds": 4, "error": 1.21, "runs": 100.0} for clear in (2.5, None)]
    other = [{**row, "error": 1.0, "runs": 400.0} for row in rows]
    targets = {"0.8": {"any": 2.0, "rules": rows}, "0.5": {"any": 2.0, "rules": other}}
    facts = {"table_probes": 8, "probes": 192, "draws": 60, "targets": targets}
    text = stages_page.page({"races": {"x": facts}})
    assert "| 2.5, 4 rounds | never, 4 rounds |" in text and "geometric means over 0.8, 0.5 of the MACs" in text
    assert "| x | 8 | 2.00 | 1.100 (200) | 1.100 (200) |" in text


SOURCES = {
    "as it was": "TIMES = 2\n\n\ndef twice(x):\n    return TIMES * x\n",
    "described": '"""What it is."""\nTIMES = 2  # why\n\n\ndef twice(x):\n    """Of x."""\n    return TIMES * x\n',
    "changed": "TIMES = 3\n\n\ndef twice(x):\n    return TIMES * x\n",
}


def test_rows_belong_to_a_state_of_the_code(tmp_path, monkeypatch):
    """Words about the code change nothing; the code, and which file it is in, does."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)

    def state_of(source, name="a.py", part="groups", kind="engine"):
        for old in (tmp_path / "core").rglob("*.py"):
            old.unlink()
        (tmp_path / "core" / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / "core" / part / name).write_text(source)
        provenance.code.cache_clear()
        return provenance.code(kind)

    states = {name: state_of(source) for name, source in SOURCES.items()}
    assert states["as it was"] == states["described"] != states["changed"]
    assert state_of(SOURCES["as it was"], "b.py") != states["as it was"]
    assert state_of(SOURCES["changed"], part="planning") == state_of(SOURCES["as it was"], part="planning")
    kinds = [state_of(SOURCES[name], part="planning", kind="planner") for name in ("as it was", "changed")]
    assert kinds[0] != kinds[1], "plans depend on the planning too"
    for kind, same in (("planner", True), ("search", False)):
        states = {state_of(SOURCES[name], part="planning/search", kind=kind) for name in ("as it was", "changed")}
        assert (len(states) == 1) is same, "on searches only if they are made by one"
    provenance.code.cache_clear()


def test_rows_of_another_state_are_measured_again_if_asked_for():
    old, new = {"error": 0.1, "levels": [0, 1], "seconds": 3.0}, {"error": 0.1, "levels": (0, 1), "seconds": 4.0}
    assert provenance.needed({}, "a", False)
    assert not provenance.needed({"a": old}, "a", False) and provenance.needed({"a": old}, "a", True)
    row = provenance.stamped(new, old)
    assert row["same_again"] and not provenance.needed({"a": row}, "a", True)
    assert provenance.stamped({**new, "error": 0.2}, old)["same_again"] is False
    text = provenance.told({"demo": {"rows": {"a": row, "b": provenance.stamped(new, None), "c": old}}})
    assert text.startswith("2 of 3 rows are of one state") and "1 of them an earlier one had measured too" in text
    assert provenance.told({"demo": {"rows": {"a": old}}}).startswith("The rows are of earlier states")
    assert provenance.told({"demo": {"rows": {"b": provenance.stamped(new, None)}}}).startswith("All rows")
