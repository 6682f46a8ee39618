"""The training scripts of the demos: killed, a training goes on to the same weights; the same tokens each time."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

from shapes import text
from shapes.measure import write_figures
from training import Average, Batches, Descent, Progress, batches

DEMOS = Path(__file__).parent.parent / "demo"
STEPS = 30


def begin(folder: Path, run: str = "run") -> tuple[nn.Module, Average, Progress]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    average = Average(model, 0.9)
    drawn = Batches(10, 4, torch.Generator().manual_seed(1))
    progress = Progress(folder / "part.safetensors", run, Descent(model, STEPS, 1e-2, 0.01), average, drawn)
    return model, average, progress


def train(folder: Path, until: int = STEPS) -> list[torch.Tensor]:
    """As the scripts do: from the file, a file every seven steps, and dead after `until`."""
    model, average, progress = begin(folder)
    for step in range(progress.load() + 1, until + 1):
        picked = progress.drawn.draw()
        noise = torch.randn(len(picked), 4, generator=progress.drawn.generator)
        progress.descend((model(noise + picked[:, None]) - picked[:, None]).square().mean())
        average.update(step)
        if step % 7 == 0:
            progress.save()
    return [*average.weights, *(parameter.detach() for parameter in model.parameters())]


def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    whole = train(tmp_path / "a")
    for until in (3, 9, 16, 26, STEPS):
        resumed = train(tmp_path / "b", until)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole, resumed, strict=True))


def test_another_run_is_refused_and_left(tmp_path):
    train(tmp_path, 8)
    content = (tmp_path / "part.safetensors").read_bytes()
    with pytest.raises(ValueError, match="of a training with other settings: remove it"):
        begin(tmp_path, "another")[2].load()
    assert (tmp_path / "part.safetensors").read_bytes() == content


def test_the_rate_rises_and_falls():
    weight = nn.Parameter(torch.zeros(1))
    descend, rates = Descent([weight], 40, 0.5), []
    for _ in range(40):
        descend(weight.square().sum())
        rates.append(descend.optimizer.param_groups[0]["lr"])
    assert rates[:3] == [0.25, 0.5, 0.5] and rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.01


def test_every_epoch_has_every_example():
    drawn = torch.cat(list(batches(12, 4, 6, torch.Generator().manual_seed(0))))
    assert sorted(drawn[:12].tolist()) == sorted(drawn[12:].tolist()) == list(range(12))


def test_the_tokenizer_is_the_same_each_time():
    first, second = (text.clip_tokenizer() for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert [first.tokenize(word) for word in text.WORDS] == [[f"{word}</w>"] for word in text.WORDS]
    assert first.tokenize("fox") == ["f", "o", "x</w>"]
    ids = first("a small red circle above a blue square").input_ids
    assert len(ids) == 8 + 2 and first.decode(ids, skip_special_tokens=True) == "a small red circle above a blue square"


@pytest.mark.parametrize("name", ["sdxl-shapes", "flux-shapes"])
def test_the_readme_has_the_figures_of_the_file(tmp_path, name):
    for file in ("README.md", "figures.json"):
        shutil.copy(DEMOS / name / file, tmp_path)
    write_figures(tmp_path)
    assert (tmp_path / "README.md").read_text() == (DEMOS / name / "README.md").read_text()


def test_a_folder_without_a_readme_has_its_figures_logged(tmp_path, caplog):
    shutil.copy(DEMOS / "sdxl-shapes" / "figures.json", tmp_path)
    with caplog.at_level(logging.INFO):
        write_figures(tmp_path)
    assert "samples of held-out captions, 20 steps" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]
