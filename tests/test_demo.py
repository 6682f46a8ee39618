"""The trained demo: the main job in small, and what the README tells a user to type."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from stageprune.core import demo
from stageprune.core.bundle import Bundle
from stageprune.core.errors import BundleError
from stageprune.core.evaluation import load_judge
from stageprune.core.evaluation.scene import Scene

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.demo, pytest.mark.slow]


SMALL = {"calibration_prompts": 10, "probes": 6, "images": 10, "steps": 8}
LEVELS = {"dit-digits": (0.0, 0.2, 0.335, 0.505), "sdxl-shapes": (0.0, 0.23, 0.385), "flux-shapes": (0.0, 0.335, 0.51)}


def shrink(monkeypatch, name):
    """The demo's recipe with fewer of everything; skips where the trained pipeline is missing."""
    if not (ROOT / "demo" / name / "model_index.json").is_file():
        pytest.skip(f"demo/{name} is not there: train it with the script in demo/")
    recipe = dataclasses.replace(demo.RECIPES[name], levels=LEVELS[name], **SMALL)
    monkeypatch.setitem(demo.RECIPES, name, recipe)


@pytest.fixture
def small_recipe(monkeypatch, demo_pipe):
    shrink(monkeypatch, "dit-digits")


@pytest.mark.parametrize("name", list(demo.RECIPES))
def test_the_main_job_leaves_a_report_and_a_bundle(name, monkeypatch, tmp_path):
    shrink(monkeypatch, name)
    said = []
    page = demo.run_demo(name, tmp_path / "out", target="macs:0.7", say=said.append)
    assert page.is_file()
    report = json.loads((page.parent / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["dense"]["accuracy"] >= fidelity(name) - 0.35  # ten images
    assert rows["magnitude"]["latent_mse"] > rows["uniform"]["latent_mse"] > 0
    bundle = Bundle.load(tmp_path / "out" / "bundle")
    assert bundle.schedule is not None
    assert 4 <= len(bundle.schedule.stages) <= 5  # with so few steps none may fall into a stage, which is then merged
    assert not list((tmp_path / "out").glob("*.part"))
    assert "enable_stage_pruning" in said[-1]


def test_a_place_that_is_taken_is_refused_before_the_work(tmp_path):
    (tmp_path / "bundle").write_text("a file")
    said = []
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        demo.run_demo("dit-digits", tmp_path, say=said.append)
    assert not said


@pytest.mark.parametrize("name", ["sdxl-shapes", "flux-shapes"])
def test_captions_to_judge_with_were_never_trained_on(name):
    path = ROOT / "demo" / name / "prompts.json"
    if not path.is_file():
        pytest.skip(f"demo/{name} is not there: train it with the script in demo/")
    prompts = json.loads(path.read_text("utf-8"))
    assert len(set(prompts["held_out"])) >= 200
    assert all(Scene.parse(caption).relation for caption in prompts["held_out"])
    assert not {bare(c) for c in prompts["held_out"]} & {bare(c) for c in prompts["calibration"]}


def fidelity(name):
    """Share of the dense model's pictures that are right, as its README says."""
    figures = json.loads((ROOT / "demo" / name / "figures.json").read_text("utf-8"))["samples_20_steps"]
    return figures.get("right", figures.get("recognised"))


def bare(caption):
    """The caption without sizes."""
    return re.sub("small |large ", "", caption)


def test_the_readme_s_snippets_run(small_recipe, tmp_path, monkeypatch):
    """Word for word, but for fewer calibration prompts."""
    demo.run_demo("dit-digits", tmp_path / "out" / "demo")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert len(snippets) == 2
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet.replace("* 6", "* 1"), "README.md", "exec"), names)
    assert len(names["images"]) == 2
    assert names["pipe"].is_stage_pruning_enabled()
    assert Bundle.load("out/bundle").schedule == names["allocation"].schedule


def test_the_demo_is_what_its_readme_says(demo_pipe):
    """Dense samples are recognised as the class asked for."""
    judge = load_judge(ROOT / "demo" / "dit-digits")
    assert judge is not None
    labels = list(range(10)) * 2
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    images = demo_pipe(
        labels, num_inference_steps=20, guidance_scale=1.5, generator=generators, output_type="pt"
    ).images
    assert (judge.logits(images).argmax(1) == torch.tensor(labels)).float().mean() >= 0.9
