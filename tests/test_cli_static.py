"""The verbs `sparsify` and `export`, and what `calibrate` and `prune` do for them, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from diffusers import DiTPipeline
from test_cli import run

from stageprune.core.bundle import Bundle
from stageprune.core.calibration import Calibration
from stageprune.core.plain_folder import RECORD
from support import make_pipe

PROMPTS = ("--prompts", "1,2,3", "--count", 12, "--steps", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    make_pipe().save_pretrained(path / "pipe")
    return path


@pytest.fixture
def stageprune(folder, monkeypatch, capsys):
    """Run a verb that takes the pipeline."""
    return lambda verb, *more: run(monkeypatch, capsys, verb, folder / "pipe", *more, "--device", "cpu")


def test_sparsify(folder, stageprune):
    calibration = folder / "all.safetensors"
    assert stageprune("calibrate", "-o", calibration, *PROMPTS, "--layers", "all")[0] == 0
    assert Calibration.load(calibration).knows("transformer_blocks.0.attn1.to_k")
    code, out, _ = stageprune(
        "sparsify", "--calibration", calibration, "-o", folder / "sparse", "--keep-dense", "transformer_blocks.0.*"
    )
    assert code == 0 and "pattern 2:4, method obs, 12 layers, 0.5000 of their weights are 0, masks valid in all" in out
    assert "transformer_blocks.0.attn1.to_q: dense, asked for" in out
    weight = DiTPipeline.from_pretrained(folder / "sparse").transformer.transformer_blocks[1].ff.net[2].weight
    assert bool(((weight != 0).view(40, 40, 4).sum(2) == 2).all())


def test_sparsify_needs_no_data_for_magnitude(folder, stageprune):
    code, _, _ = stageprune(
        "sparsify", "--method", "magnitude", "--pattern", 0.7, "-o", folder / "alone", "--denoiser-only"
    )
    assert code == 0
    assert {path.name for path in (folder / "alone").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        RECORD,
    }
    assert json.loads((folder / "alone" / RECORD).read_text())["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_depth_and_export(folder, stageprune):
    calibration, bank = folder / "blocks.safetensors", folder / "depth"
    code, _, _ = stageprune("calibrate", "-o", calibration, *PROMPTS, "--kinds", "block", "--skip-blocks")
    assert code == 0
    for method in ("depth", "depth-output"):
        code, out, _ = stageprune(
            "prune", "--calibration", calibration, "-o", bank, "--method", method, "--levels", "0.35"
        )
        assert code == 0 and "1 of blocks" in out
    first = 0 in Bundle.load(bank).bank.skipped(1, 0)  # then no plain DiT can be that
    code, out, err = stageprune("export", bank, "-o", folder / "plain", "--sparsity", 0.35)
    assert (code, "that block's norm" in err) == ((2, True) if first else (0, False))
    if not first:
        assert len(DiTPipeline.from_pretrained(folder / "plain").transformer.transformer_blocks) == 2
    code, out, _ = stageprune("export", bank, "-o", folder / "zeros", "--sparsity", 0.35, "--zeros")
    assert code == 0 and f"saved to {folder / 'zeros'}" in out


def test_what_cannot_be_is_said_in_one_line(folder, stageprune):
    code, _, err = stageprune("prune", "--method", "obs-nm")
    assert code == 2 and "stageprune sparsify" in err and "Traceback" not in err
    stageprune("prune", "-o", folder / "bank", "--method", "magnitude", "--levels", "0.5")
    code, _, err = stageprune("export", folder / "bank", "-o", folder / "nowhere")
    assert code == 2 and "say which level to export" in err
    code, _, err = stageprune("export", folder / "bank", "-o", folder / "nowhere", "--sparsity", 0.5)
    assert code == 2 and "no configuration of DiTTransformer2DModel" in err and not (folder / "nowhere").exists()


def test_a_plain_pipeline_needs_no_stageprune(folder, stageprune):
    stageprune("sparsify", "--method", "magnitude", "-o", folder / "free")
    script = (
        "import sys; from diffusers import DiffusionPipeline;"
        f"pipe = DiffusionPipeline.from_pretrained({str(folder / 'free')!r});"
        "pipe.set_progress_bar_config(disable=True);"
        "pipe([1], num_inference_steps=2);"
        "assert not any(name.partition('.')[0] == 'stageprune' for name in sys.modules)"
    )
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], check=True, env=bare, cwd=folder, capture_output=True, timeout=300)
