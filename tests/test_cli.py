"""The command, verb by verb, as a user types it: on a saved tiny pipeline, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stageprune.core import cli
from stageprune.core.bundle import Bundle
from stageprune.core.calibration import Calibration
from stageprune.core.cli_options import read_prompts
from stageprune.core.hosts.diffusers import DiffusersHost
from support import make_pipe
from zoo import make_pipeline

VERBS = ("calibrate", "prune", "allocate", "search", "generate", "evaluate", "inspect", "bench", "demo", "env")


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `stageprune ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["stageprune", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as request:
        code = int(request.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    make_pipe().save_pretrained(path / "pipe")
    return path


def test_the_whole_way(folder, monkeypatch, capsys):
    pipe, common = folder / "pipe", ("--device", "cpu")
    code, out, _ = run(
        monkeypatch, capsys, "calibrate", pipe, "-o", folder / "cal.safetensors", "--prompts", "1,2,3", "--count", 24,
        "--steps", 5, *common,
    )  # fmt: skip
    assert code == 0 and "24 prompts" in out
    assert Calibration.load(folder / "cal.safetensors").provenance["prompts"] == [1, 2, 3] * 8
    assert not (folder / "cal.safetensors.part").exists()

    code, out, _ = run(
        monkeypatch, capsys, "prune", pipe, "--calibration", folder / "cal.safetensors", "-o", folder / "bank",
        "--levels", "0,0.2,0.5,0.7", "--multiple", 16, *common,
    )  # fmt: skip
    assert code == 0 and "level 3" in out
    assert Bundle.load(folder / "bank").schedule is None

    code, out, _ = run(
        monkeypatch, capsys, "allocate", pipe, folder / "bank", "-o", folder / "bundle", "--target", "0.6", *common
    )
    assert code == 0 and "held-out" in out and "Error table" in out
    assert len(Bundle.load(folder / "bundle").schedule.stages) == 5

    code, out, _ = run(
        monkeypatch, capsys, "generate", pipe, "--bundle", folder / "bundle", "-o", folder / "images",
        "--prompts", "1,2", "--steps", 5, *common,
    )  # fmt: skip
    assert code == 0 and "MACs" in out
    assert len(list((folder / "images").glob("*.png"))) == 2

    code, out, _ = run(
        monkeypatch, capsys, "evaluate", pipe, folder / "bundle", "-o", folder / "report", "--count", 4, *common
    )
    assert code == 0 and "dense, 3 steps" in out and "magnitude" in out
    assert json.loads((folder / "report" / "report.json").read_text())
    assert (folder / "report" / "report.html").is_file()

    for target, expected in ((folder / "bundle", "StageSchedule"), (folder / "cal.safetensors", "24 prompts")):
        code, out, _ = run(monkeypatch, capsys, "inspect", target)
        assert code == 0 and expected in out
    code, out, _ = run(monkeypatch, capsys, "inspect", pipe)
    assert code == 0 and "blocks.0.attn: 5 heads x 8" in out

    code, out, _ = run(
        monkeypatch, capsys, "bench", pipe, "--bundle", folder / "bundle", "--levels", "0,0.5", "--batch", 2,
        "--rounds", 2, "-o", folder / "bench.json", *common,
    )  # fmt: skip
    assert code == 0 and "MAC-ideal" in out
    bench = json.loads((folder / "bench.json").read_text())
    assert [row["sparsity"] for row in bench["levels"]["levels"]] == [0.0, 0.5]
    assert sum(stage["calls"] for stage in bench["images"]["stages"]) == bench["images"]["image"]["calls"] == 5


def test_hand_written_levels(folder, monkeypatch, capsys, banks):
    Bundle(banks["shared-shared"]).save(folder / "plain")
    code, out, _ = run(
        monkeypatch, capsys, "allocate", folder / "pipe", folder / "plain", "-o", folder / "by-hand",
        "--strategy", "hand", "--levels", "0,0.5,0.7",
    )  # fmt: skip
    assert code == 0, out
    assert "target 1.000 of the dense MACs, executes" in out
    assert Bundle.load(folder / "by-hand").schedule.levels == [0, 0.5, 0.7]


@pytest.mark.parametrize(
    ("options", "edges"),
    [
        (("--strategy", "uniform"), [1, 0.8, 0.6, 0.4, 0.2, 0]),
        (("--strategy", "pattern:ends", "--stages", "4"), [1, 0.75, 0.5, 0.25, 0]),
        (("--strategy", "mosaic", "--steps", "20", "--target", "sparsity:0.3"), None),
        (("--strategy", "pattern:back", "--stages", "equal-steps:2", "--steps", "4"), [1, 0.624, 0]),
        (("--strategy", "pattern:back", "--stages", "0.9,.5", "--target", "0.8"), [1, 0.9, 0.5, 0]),
        (("--strategy", "pattern:zigzag", "--stages", "10", "--empty", "merge", "--steps", "2"), [1, 0.5, 0]),
    ],
)
def test_strategies_and_stages(options, edges, folder, monkeypatch, capsys, banks):
    Bundle(banks["shared-shared"]).save(folder / "plain")
    allocate = ("allocate", folder / "pipe", folder / "plain", "-o", folder / "planned", "--device", "cpu", *options)
    code, out, err = run(monkeypatch, capsys, *allocate)
    assert code == 0, err
    found = Bundle.load(folder / "planned").schedule.edges
    assert found == pytest.approx(edges) if edges else len(found) == 4
    assert "of the dense" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "hand"), "strategy 'hand' needs `levels`"),
        (("--strategy", "hand", "--levels", "0,0.2", "--target", "0.5"), "`levels` are over the budget"),
        (("--strategy", "best"), "`strategy` must be one of"),
        (("--stages", "thirds"), "`stages` must be a number, boundaries in tau, or one of equal-tau"),
        (("--stages", "0.5,x"), "--stages must be numbers separated by commas"),
        (("--stages", "10", "--steps", "4"), "no step of a 4-step run falls in stage 1"),
        (("--target", "seconds:3"), "`target` must look like"),
        (("--empty", "fill"), "`empty` must be one of refuse, merge"),
    ],
)
def test_allocate_says_what_is_wrong(options, message, folder, monkeypatch, capsys, banks):
    Bundle(banks["shared-shared"]).save(folder / "plain")
    code, _, err = run(monkeypatch, capsys, "allocate", folder / "pipe", folder / "plain", *options)
    assert code == 2 and message in " ".join(err.split())


def test_help_names_every_strategy_and_partition(monkeypatch, capsys):
    from stageprune.core.planning import PARTITIONS
    from stageprune.core.planning.allocate import STRATEGIES

    monkeypatch.setenv("COLUMNS", "400")
    _, out, _ = run(monkeypatch, capsys, "allocate", "--help")
    known = [*STRATEGIES, *(name for name in PARTITIONS if name != "equal-tau"), "refuse", "merge"]  # the plain number
    assert [name for name in known if name not in out] == []
    assert all(target in out for target in ("macs:0.67", "latency:0.77", "speedup:1.3", "sparsity:0.3"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, verb, "--help")
    assert code == 0 and "Usage" in out


def test_env_names_versions(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "env")
    assert code == 0
    assert all(word in out for word in ("torch", "diffusers", "cpu", "dit (DiTTransformer2DModel)"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "no/such/folder/here"), "no such folder"),
        (("calibrate", "."), "no model_index.json"),
        (("calibrate", "PIPE", "--prompts", "@missing.txt"), "no such file"),
        (("calibrate", "PIPE", "--prompts", "cat"), "no class of this pipeline"),
        (("calibrate", "PIPE", "--prompts", "²"), "prompt '²' is no class of this pipeline"),
        (("calibrate", "PIPE", "--device", "mps"), "--device must be auto, cpu or cuda for this verb, got mps"),
        (("evaluate", "PIPE", "missing", "--device", "mps:0"), "for this verb, got mps:0: MPS has no float64"),
        (("calibrate", "PIPE", "--prompts", "1", "--count", "1", "--steps", "1"), "too few calibration data"),
        (("calibrate", "PIPE", "--alpha", "sideways"), "uniform, log-decrease"),
        (("prune", "PIPE"), "needs a `calibration`"),
        (("prune", "PIPE", "--method", "wish"), "must be one of"),
        (("prune", "PIPE", "--method", "magnitude", "--levels", "0,two"), "--levels must be numbers"),
        (("prune", "PIPE", "--method", "magnitude", "--levels", "0,1.5"), "in [0, 1)"),
        (("allocate", "PIPE", "missing"), "no such bundle folder"),
        (("generate", "PIPE", "--dtype", "int3"), "must be one of float32"),
        (("generate", "PIPE", "--size", "64"), "must be 16 x 16 pixels, the one that this DiT is made for"),
        (("generate", "PIPE", "--size", "16by16"), "--size must be a side in pixels, or height x width"),
        (("inspect", "CALIBRATION", "--size", "16"), "--size goes with a pipeline"),
        (("bench", "dit-xl", "--size", "256"), "`size` goes with a pipeline; dit-xl is timed at 256 pixels"),
        (("demo", "no-such-demo"), "no demo pipeline"),
        (("calibrate", "PIPE", "--steps", "0"), "--steps"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(arguments, message, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    places = {"PIPE": folder / "pipe", "CALIBRATION": tmp_path / "file"}
    words = [places.get(word, word) for word in arguments]
    code, _, err = run(monkeypatch, capsys, *words)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "no-pipe"), "exists and is not a bundle; it is not overwritten"),
        (("allocate", "no-pipe", "no-bundle"), "exists and is not a bundle; it is not overwritten"),
        (("search", "no-pipe", "no-bundle"), "exists and is not a bundle; it is not overwritten"),
        (("sparsify", "no-pipe"), "exists and was not written by stageprune; it is not overwritten"),
        (("export", "no-pipe", "no-bundle"), "exists and was not written by stageprune; it is not overwritten"),
    ],
)
def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    for out in ("taken", "taken/thesis.txt"):
        code, _, err = run(monkeypatch, capsys, *arguments, "-o", out)
        assert code == 2 and f"{out} {message}" in " ".join(err.split())
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_the_installed_command_starts():
    result = subprocess.run(
        [sys.executable, "-m", "stageprune.core.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "calibrate" in result.stdout


def test_text_prompts(tmp_path, monkeypatch, capsys):
    """A pipeline with texts: from a file, or its own; guidance is the pipeline's unless it is given."""
    make_pipeline("sd15").save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a fox, red\nan old house\n", "utf-8")
    pipe, common = tmp_path / "pipe", ("--device", "cpu", "--steps", 4, "--prompts", f"@{tmp_path / 'prompts.txt'}")
    code, out, error = run(monkeypatch, capsys, "generate", pipe, "-o", tmp_path / "images", *common)
    assert code == 0 and "2 images saved" in out and "Loading weights" not in error
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    calibration = tmp_path / "cal.safetensors"
    code, out, _ = run(monkeypatch, capsys, "calibrate", pipe, "-o", calibration, "--count", 8, *common)
    assert code == 0
    provenance = Calibration.load(calibration).provenance
    assert provenance["guidance"] == 7.5 and provenance["prompts"] == ["a fox, red", "an old house"] * 4


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [("sd15", "1984\n²\nan old house\n", ["1984", "²", "an old house"]), ("dit", "7\n١\n", [7, 1])],
)
def test_digits_are_labels_only_where_there_are_classes(kind, given, expected, tmp_path):
    (tmp_path / "prompts.txt").write_text(given, "utf-8")
    pipe = make_pipeline(kind)
    prompts = read_prompts(f"@{tmp_path / 'prompts.txt'}", pipe)
    assert prompts == expected
    assert len(DiffusersHost(pipe).encode(prompts)) == len(expected)


def test_a_size(tmp_path, monkeypatch, capsys):
    """Given once, to `calibrate`; generating is at the pipeline's own size unless it is given again."""
    make_pipeline("flux").save_pretrained(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    common = ("--device", "cpu")
    code, _, error = run(
        monkeypatch, capsys, "calibrate", "pipe", "-o", "cal", "--count", 6, "--steps", 4, "--size", "16x24", *common
    )
    assert code == 0, error
    assert Calibration.load("cal").provenance["size"] == [16, 24]
    prune = ("prune", "pipe", "-o", "bank", "--levels", "0.3,0.6", "--multiple", 8)
    code, out, _ = run(monkeypatch, capsys, *prune, "--calibration", "cal", *common)
    assert code == 0 and Bundle.load("bank").bank.provenance["size"] == [16, 24]
    allocate = ("allocate", "pipe", "bank", "-o", "bundle", "--target", "0.7", "--strategy", "uniform", *common)
    assert run(monkeypatch, capsys, *allocate)[0] == 0
    code, out, _ = run(monkeypatch, capsys, "evaluate", "pipe", "bundle", "-o", "report", "--count", 2, *common)
    assert code == 0 and json.loads(Path("report/report.json").read_text())["environment"]["size"] == "16 x 24 pixels"
    code, out, _ = run(
        monkeypatch, capsys, "generate", "pipe", "--bundle", "bundle", "-o", "images", "--prompts", "fox",
        "--steps", 2, "--size", "24", *common,
    )  # fmt: skip
    assert code == 0 and "at latents of 12 x 12 and 16 text tokens" in out
    assert Image.open(next(Path("images").glob("*.png"))).size == (24, 24)
    code, out, _ = run(monkeypatch, capsys, "inspect", "pipe", "--size", "16x24")
    assert code == 0 and "GMACs a forward at latents of 8 x 12 and 16 text tokens" in out
    code, out, error = run(monkeypatch, capsys, *prune, "--method", "magnitude", "--size", "16x30", *common)
    assert code == 2 and "multiples of 4 pixels" in " ".join(error.split())


def test_kinds_are_those_that_were_calibrated(tmp_path, monkeypatch, capsys):
    make_pipeline("sdxl").save_pretrained(tmp_path / "pipe")
    pipe, common = tmp_path / "pipe", ("--device", "cpu")
    code, _, err = run(
        monkeypatch, capsys, "calibrate", pipe, "-o", tmp_path / "cal", "--kinds", "channel,head", "--count", 12,
        "--steps", 2, *common,
    )  # fmt: skip
    assert code == 0, err
    code, _, err = run(
        monkeypatch, capsys, "prune", pipe, "--calibration", tmp_path / "cal", "-o", tmp_path / "bank", "--levels",
        "0,0.5", *common,
    )  # fmt: skip
    assert code == 0, err
    assert {group.kind for group in Bundle.load(tmp_path / "bank").bank.groups} == {"channel", "head"}
    code, _, err = run(monkeypatch, capsys, "calibrate", pipe, "-o", tmp_path / "x", "--kinds", "wall", *common)
    assert code == 2 and "`kinds` must be some of ['block', 'channel', 'head', 'neuron']" in err
