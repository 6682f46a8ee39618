"""The verb `search`, as a user types it: on a saved tiny pipeline, in this process."""

from __future__ import annotations

import json

import pytest
from test_cli import run

from stageprune.core.bundle import Bundle
from stageprune.core.evaluation import ClassJudge
from stageprune.core.planning.search import FITNESS, INITIALS
from stageprune.core.runtime import StagePruner
from support import SCHEDULE, make_pipe

SHORT = ("--generations", 2, "--offspring", 3, "--steps", 5, "--prompts", "1,2,3,1,2,3,1,2", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, banks):
    path = tmp_path_factory.mktemp("cli-search")
    make_pipe().save_pretrained(path / "pipe")
    Bundle(banks["shared-shared"]).save(path / "bank")
    Bundle(banks["shared-shared"], SCHEDULE).save(path / "start")
    return path


def test_it_saves_the_winner(folder, monkeypatch, capsys):
    search = ("search", folder / "pipe", folder / "bank", "-o", folder / "found", "--target", "0.6", *SHORT)
    code, out, err = run(monkeypatch, capsys, *search, "--history", folder / "history.json")
    assert code == 0, err
    assert "denoiser steps" in out and "held-out" in out and "StageSchedule" in out
    found, history = Bundle.load(folder / "found").schedule, json.loads((folder / "history.json").read_text())
    assert history["schedule"] == found.to_dict() and len(history["history"]) == 2
    assert history["settings"]["generations"] == 2 and history["settings"]["init"] == "measured"
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--init", "START", "--target", "0.9"), {"fitness": "latent_mse"}),
        (("--init", "hybrid", "--fitness", "accuracy", "--judge", "JUDGE"), {"fitness": "accuracy"}),
        (("--preset", "published-name",), None),
        (("--preset", "sdxl", "--init", "uniform", "--memory", "0.5", "--patience", "3", "--seed", "4"), {}),
    ],
)  # fmt: skip
def test_options(options, told, folder, monkeypatch, capsys):
    ClassJudge([1, 2, 3]).save(folder / "judge")
    places = {"START": folder / "start", "JUDGE": folder / "judge"}
    search = ("search", folder / "pipe", folder / "bank", "-o", folder / "x", "--history", folder / "h.json", *SHORT)
    code, _, err = run(monkeypatch, capsys, *search, *(places.get(word, word) for word in options))
    if told is None:
        assert code == 2 and "published settings for dit and sdxl, not for 'published-name'" in " ".join(err.split())
        return
    assert code == 0, err
    history = json.loads((folder / "h.json").read_text())
    assert told.items() <= history.items()
    if "START" in options:
        assert len(history["schedule"]["stages"]) == len(SCHEDULE.stages) and history["start"] is not None
    if "sdxl" in options:
        settings = history["settings"]
        assert (settings["max_levels"], settings["patience"], settings["memory"], settings["seed"]) == (3, 3, 0.5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init", "best"), "`init` must be one of random, uniform, patterns, hybrid, measured"),
        (("--init", "BANK"), "that bundle has no schedule; `stageprune allocate` makes one"),
        (("--fitness", "beauty"), "`fitness` must be one of accuracy"),
        (("--fitness", "frechet"), "fitness 'frechet' needs a `judge`"),
        (("--prompts", "1"), "give at least 2 `prompts`"),
        (("--generations", "0"), "--generations"),
        (("--target", "0.1"), "cannot be met"),
    ],
)
def test_it_says_what_is_wrong(options, message, folder, monkeypatch, capsys):
    words = (folder / "bank" if word == "BANK" else word for word in options)
    search = ("search", folder / "pipe", folder / "bank", "-o", folder / "wrong", *SHORT)
    code, _, err = run(monkeypatch, capsys, *search, *words)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err
    assert not list(folder.glob("wrong*")), "nothing is left behind"


def test_interrupted_it_says_how_to_go_on_and_does(folder, monkeypatch, capsys):
    search = ("search", folder / "pipe", folder / "bank", "-o", folder / "later", "--target", "0.6", *SHORT)
    left, real = [60], StagePruner._on_call

    def interrupt(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(StagePruner, "_on_call", interrupt)
    code, _, err = run(monkeypatch, capsys, *search)
    assert code == 130 and f"goes on from {folder / 'later.search.part'}" in err.replace("\n", "")
    assert (folder / "later.search.part").exists() and not (folder / "later").exists()
    code, _, _ = run(monkeypatch, capsys, *search)
    assert code == 0 and Bundle.load(folder / "later").schedule is not None
    assert not (folder / "later.search.part").exists()


def test_help_names_every_fitness_and_initialisation(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    _, out, _ = run(monkeypatch, capsys, "search", "--help")
    assert [name for name in (*FITNESS, *INITIALS, "measured", "mosaic", "dit", "sdxl") if name not in out] == []
