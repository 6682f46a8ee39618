"""Judges: what a caption asks for, what counts as shown, and judges on file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stageprune.core.errors import StagePruneError
from stageprune.core.evaluation import ClassJudge, Judge, SceneChecker
from stageprune.core.evaluation.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing
from stageprune.core.evaluation.scene_checker import Found, related, shows
from stageprune.core.host import Conditions

DEMO = Path(__file__).parent.parent / "demo"

things = st.builds(
    Thing, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.one_of(st.none(), st.sampled_from(SIZES))
)
scenes = st.one_of(
    st.builds(lambda thing: Scene((thing,)), things),
    st.builds(lambda a, b, relation: Scene((a, b), relation), things, things, st.sampled_from(RELATIONS)),
)


@given(scenes)
def test_a_caption_says_what_the_scene_is(scene):
    assert Scene.parse(str(scene)) == scene
    assert Scene.parse(f"  {str(scene).upper()} ") == scene


@pytest.mark.parametrize(
    "caption", ["", "a circle", "a red circle on a blue square", "two red circles", "a red circle above"]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(StagePruneError, match="cannot be checked: write 'a \\[size\\] colour shape'"):
        Scene.parse(caption)


RED = Found(Thing("circle", "red", "small"), 20, 10)
BLUE = Found(Thing("square", "blue", "large"), 24, 40)


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a red circle above a blue square", True),
        ("a small red circle above a large blue square", True),
        ("a blue square below a red circle", True),
        ("a red circle below a blue square", False),
        ("a red circle left of a blue square", False),
        ("a large red circle above a blue square", False),
        ("a red circle above a green square", False),
        ("a red square above a blue circle", False),
        ("a red circle", False),
    ],
)
def test_all_or_nothing(caption, right):
    for found in ([RED, BLUE], [BLUE, RED]):
        assert shows(found, Scene.parse(caption)) is right
    assert not shows([RED, BLUE, RED], Scene.parse(caption))
    assert not shows([], Scene.parse(caption))


def test_one_object():
    assert shows([RED], Scene.parse("a small red circle")) and shows([RED], Scene.parse("a red circle"))
    assert not shows([RED], Scene.parse("a large red circle"))


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_opposite_relations_exclude_each_other(right, down):
    first, second = Found(RED.thing, 32 + right, 32 + down), Found(RED.thing, 32, 32)
    for relation, opposite in (("above", "below"), ("left of", "right of")):
        assert not (related(first, second, relation) and related(first, second, opposite))
        assert related(first, second, relation) == related(second, first, opposite)


JUDGES = {"classes": lambda: ClassJudge([1, 5], held_out_accuracy=0.9), "scenes": lambda: SceneChecker(width=8)}


@pytest.mark.parametrize("kind", list(JUDGES))
def test_round_trip(kind, tmp_path):
    torch.manual_seed(0)
    judge, pictures = JUDGES[kind]().eval(), torch.rand(40, 3, 64, 64)
    judge.fit_reference(pictures)
    assert judge.frechet(pictures) == pytest.approx(0, abs=1e-3)
    judge.save(tmp_path)
    loaded = Judge.load(tmp_path)
    assert type(loaded) is type(judge) and loaded.config() == judge.config()
    assert torch.equal(loaded.features(pictures[:3]), judge.features(pictures[:3]))
    assert loaded.frechet(pictures[:30] * 0.5) == judge.frechet(pictures[:30] * 0.5) > 0


def test_files_of_another_kind(tmp_path):
    SceneChecker(width=8).save(tmp_path)
    with pytest.raises(StagePruneError, match="holds a judge of kind 'scenes', not a ClassJudge; give the folder of"):
        ClassJudge.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "oracle"}))
    with pytest.raises(StagePruneError, match="`kind` must be one of classes, scenes, got 'oracle'; give a judge's"):
        Judge.load(tmp_path)
    for text, message in (
        (json.dumps({**config, "kind": []}), r"`kind` must be .* got \[\]"),
        (json.dumps({**config, "extra": 1}), "must hold the keys"),
        (json.dumps({**config, "num_features": 3}), "num_features must be 32"),
        (json.dumps({**config, "width": "wide"}), "does not describe a judge"),
        (json.dumps({**config, "width": 16}), "where the judge needs"),
        ("{", "not readable JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(StagePruneError, match=rf"{tmp_path}.*{message}.*; give a judge's folder, restore it"):
            Judge.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StagePruneError, match="is not a readable safetensors file"):
        Judge.load(tmp_path)
    with pytest.raises(StagePruneError, match=r"nowhere/config\.json is missing; give a judge's folder"):
        Judge.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", list(JUDGES))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_image_shows_nothing(kind, value, monkeypatch):
    """Not even if only a corner is no image; the others count as before."""
    judge, images = JUDGES[kind]().eval(), torch.rand(4, 3, 64, 64)
    if kind == "scenes":
        monkeypatch.setattr(SceneChecker, "find", lambda self, images: [[RED] for _ in images])
        wanted = ["a red circle"] * 4
    else:
        first = [judge.hits(images[i : i + 1], [1]).item() for i in range(4)]
        wanted = [1 if right else 5 for right in first]
    assert judge.hits(images, wanted).tolist() == [True] * 4
    images[1] = value
    images[2, :, 0, 0] = value
    if kind == "classes":
        wanted[1] = wanted[2] = judge.labels[0]
    hits = judge.hits(images, wanted)
    assert hits.dtype == torch.bool and hits.tolist() == [True, False, False, True]


def test_prompts_that_a_judge_does_not_know():
    conditions = Conditions({"embeds": torch.zeros(1, 2)})
    with pytest.raises(StagePruneError, match="'a house' cannot be checked"):
        SceneChecker(width=8).wanted(["a house"], conditions)
    assert ClassJudge([1, 2]).wanted(["a house"], conditions) is None
    with pytest.raises(StagePruneError, match="does not know class 7"):
        ClassJudge([1, 2]).wanted([7], Conditions({"class_labels": torch.tensor([7])}))


@pytest.fixture(scope="module")
def scenes_module():
    sys.path.insert(0, str(DEMO))
    try:
        from shapes import scenes
    finally:
        sys.path.remove(str(DEMO))
    return scenes


@pytest.mark.demo
@pytest.mark.parametrize("name", ["sdxl-shapes", "flux-shapes"])
def test_the_checker_is_right_on_held_out_scenes(name, scenes_module):
    folder = DEMO / name / "judge"
    if not folder.is_dir():
        pytest.skip(f"demo/{name} is not there: train it with demo/train_shapes.py")
    checker, generator = SceneChecker.load(folder), torch.Generator().manual_seed(77)
    layout = scenes_module.draw_layouts(300, generator, held=True)
    pictures, captions = scenes_module.render(layout, generator), [str(scene) for scene in layout.scenes()]
    assert checker.hits(pictures, captions).double().mean() >= 0.97
    assert checker.hits(pictures, captions[1:] + captions[:1]).double().mean() <= 0.05
    assert checker.held_out_accuracy >= 0.97
    assert checker.frechet(pictures) < checker.frechet(pictures * 0.7)
