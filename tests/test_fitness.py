"""Fitnesses: each by its formula, the least for the dense model itself; judges and extras; functions of a user."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from stageprune import Fitness, Round, SearchSettings, register_fitness
from stageprune.core.errors import SearchError, StagePruneError
from stageprune.core.evaluation import ClassJudge, SceneChecker
from stageprune.core.evaluation.metrics import ssim
from stageprune.core.host import Conditions
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.planning import search
from stageprune.core.planning.fitness import FITNESS, Outcome, fitness_of
from stageprune.core.planning.fitness.images import high_frequency_energy
from stageprune.core.planning.search.ledger import Ledger
from stageprune.core.pruning import prune
from support import make_pipe

PAIRED = ("latent_mse", "latent_mae", "latent_cosine", "latent_snr", "image_mse", "image_ssim", "image_frequency")
OPTIONS = {
    "target": 0.67,
    "prompts": [1, 2, 3, 1] * 2,
    "steps": 3,
    "stages": 3,
    "init": "uniform",
    "settings": SearchSettings(generations=2, offspring=3, rounds=(Round(3, 0.5), Round(2))),
}


def outcome(latents, prompts=(1, 2, 3)):
    """Decoding takes the first three channels, and brings them into [0, 1]."""
    labels = Conditions({"class_labels": torch.tensor(prompts)})
    return Outcome(latents, prompts, labels, lambda given: given[:, :3].sigmoid())


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    dense = torch.randn(3, 4, 16, 16)
    return outcome(dense + 0.3 * torch.randn(3, 4, 16, 16)), outcome(dense)


@pytest.fixture
def judge():
    torch.manual_seed(0)
    found = ClassJudge([1, 2, 3]).eval()
    found.fit_reference(torch.rand(60, 3, 16, 16))
    return found


@pytest.mark.parametrize("name", PAIRED)
def test_each_is_its_formula(pair, name):
    made, dense = pair
    ours, theirs, shown, shown_dense = made.latents, dense.latents, made.images, dense.images
    flat = (ours.flatten(1), theirs.flatten(1))
    expected = {
        "latent_mse": (ours - theirs).square().mean((1, 2, 3)),
        "latent_mae": (ours - theirs).abs().mean((1, 2, 3)),
        "latent_cosine": 1 - (flat[0] * flat[1]).sum(1) / flat[0].norm(dim=1) / flat[1].norm(dim=1),
        "latent_snr": 20 * (torch.log10((flat[0] - flat[1]).norm(dim=1)) - torch.log10(flat[1].norm(dim=1))),
        "image_mse": (shown - shown_dense).square().mean((1, 2, 3)),
        "image_ssim": 1 - ssim(shown, shown_dense),
        "image_frequency": (high_frequency_energy(shown) / high_frequency_energy(shown_dense)).log().abs(),
    }[name]
    fitness = fitness_of(name)
    assert fitness.name == name
    found = fitness.statistics(made, dense)
    assert found.shape == (3, 1) and found.dtype == torch.float64
    assert found[:, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    same = fitness.reduce(fitness.statistics(dense, dense))
    assert same <= fitness.reduce(found) and same == pytest.approx(-120 if name == "latent_snr" else 0, abs=1e-6)
    assert float(found.min()) >= fitness.floor <= same


def test_high_frequencies():
    """A checkerboard has nothing else, a constant none; energy is that of the pixels (Parseval)."""
    rows = torch.arange(8)
    board = ((rows[:, None] + rows) % 2).float().expand(1, 3, 8, 8)
    assert float(high_frequency_energy(torch.full((1, 3, 8, 8), 0.7))) < 1e-12 < float(high_frequency_energy(board))
    assert float(high_frequency_energy(2 * board)) == pytest.approx(4 * float(high_frequency_energy(board)))


def test_images_are_decoded_once_and_only_when_asked_for():
    decoded = []
    made = Outcome(torch.zeros(2, 4, 4, 4), [1, 2], Conditions({}), lambda given: decoded.append(1) or given)
    fitness_of("latent_mse").statistics(made, made)
    assert not decoded
    fitness_of("image_mse").statistics(made, made)
    assert decoded == [1]


def test_set_metrics(pair, judge):
    made, dense = pair
    frechet = fitness_of("frechet", judge)
    found = frechet.statistics(made, dense)
    assert found.shape == (3, 32) and frechet.floor is None and frechet.probes == 2
    assert frechet.reduce(found) == pytest.approx(judge.frechet(made.images), rel=1e-6)
    assert torch.equal(found, frechet.statistics(made, made)) and not frechet.paired
    accuracy = fitness_of("accuracy", judge)
    assert torch.equal(accuracy.statistics(made, dense), accuracy.statistics(made, made)) and not accuracy.paired
    hits = judge.hits(made.images, [1, 2, 3])
    assert accuracy.statistics(made, dense)[:, 0].tolist() == [1 - float(hit) for hit in hits]


def test_what_a_judge_lacks(pair, judge):
    for name in ("frechet", "accuracy"):
        with pytest.raises(SearchError, match=f"fitness '{name}' needs a `judge`"):
            fitness_of(name)
    texts = Outcome(torch.zeros(1, 4, 16, 16), ["a fox"], Conditions({}), lambda given: given[:, :3])
    with pytest.raises(SearchError, match="a judge of kind 'classes' cannot check prompts such as 'a fox'"):
        fitness_of("accuracy", judge).statistics(texts, texts)
    with pytest.raises(StagePruneError, match="cannot be checked: write"):
        fitness_of("accuracy", SceneChecker(width=8)).statistics(texts, texts)


@pytest.mark.parametrize(("name", "library"), [("lpips", "lpips"), ("iqa:topiq_nr", "pyiqa")])
def test_extras_say_how_to_install_them(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SearchError, match=rf"needs {library}, which is not installed: pip install 'stageprune\[iqa\]'"):
        fitness_of(name)


def test_ssim_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(StagePruneError, match=r"pip install 'stageprune\[report\]'"):
        fitness_of("image_ssim")


class Metric:
    """As pyiqa's: better the higher, or the lower; of one image, or of two."""

    def __init__(self, lower_better, metric_mode):
        self.lower_better, self.metric_mode, self.device = lower_better, metric_mode, "cpu"

    def __call__(self, *images):
        return sum(sign * each.flatten(1).mean(1, keepdim=True) for sign, each in zip((1, -1), images, strict=False))


def test_pyiqa(pair, monkeypatch):
    """Against a stand-in: the sign, and the dense image where a metric compares."""
    metrics = {"up": Metric(False, "NR"), "down": Metric(True, "FR")}
    library = SimpleNamespace(list_models=lambda: list(metrics), create_metric=lambda name: metrics[name])
    monkeypatch.setitem(sys.modules, "pyiqa", library)
    made, dense = pair
    up, down = (fitness_of(f"iqa:{name}") for name in metrics)
    assert torch.allclose(up.statistics(made, dense)[:, 0], -made.images.mean((1, 2, 3)).double())
    assert torch.allclose(
        down.statistics(made, dense)[:, 0], (made.images - dense.images).mean((1, 2, 3)).double(), atol=1e-6
    )
    assert up.name == "iqa:up" and up.floor is None and (up.paired, down.paired) == (False, True)
    with pytest.raises(SearchError, match=r"takes the name of a metric of pyiqa behind a colon.*got 'sideways'"):
        fitness_of("iqa:sideways")


def test_lpips(pair, monkeypatch):
    library = ModuleType("lpips")
    distance = SimpleNamespace(eval=lambda: lambda a, b, normalize: (a - b).abs().mean((1, 2, 3), keepdim=True))
    library.LPIPS = lambda net, verbose: distance
    monkeypatch.setitem(sys.modules, "lpips", library)
    made, dense = pair
    found = fitness_of("lpips").statistics(made, dense)
    assert torch.allclose(found[:, 0], (made.images - dense.images).abs().mean((1, 2, 3)).double())


def test_a_user_s_function_and_its_mistakes(pair):
    def darker(made, dense):
        return made.images.flatten(1).mean(1)

    fitness = fitness_of(darker)
    assert fitness.name.endswith("darker") and fitness.statistics(*pair).shape == (3, 1)
    assert fitness_of(fitness) is fitness
    for wrong in (lambda a, b: 0.5, lambda a, b: torch.zeros(2), lambda a, b: torch.zeros(3, 2, 2)):
        with pytest.raises(SearchError, match=r"must give a tensor with a value .* for each of 3 probes, got"):
            fitness_of(wrong).statistics(*pair)
    with pytest.raises(SearchError, match="must give a tensor"):
        Fitness("row", lambda a, b: torch.zeros(3, 2), floor=0.0).statistics(*pair)
    with pytest.raises(SearchError, match="'largest': a `floor` bounds means only"):
        Fitness("largest", darker, reduce=lambda values: float(values.max()), floor=0.0)


def test_a_bound_is_below_whatever_the_other_probes_give():
    ledger = Ledger(fitness_of("latent_mse"))
    assert ledger.bound((1,), 4) == -math.inf
    ledger.add((1,), torch.tensor([[3.0], [1.0]], dtype=torch.float64))
    assert (ledger.bound((1,), 4), ledger.bound((1,), 2), ledger.value((1,), 2)) == (1.0, 2.0, 2.0)
    ledger.add((1,), torch.tensor([[float("nan")]], dtype=torch.float64))
    assert ledger.bound((1,), 4) == ledger.value((1,), 3) == math.inf


@pytest.fixture(scope="module")
def host():
    return DiffusersHost(make_pipe())


@pytest.fixture(scope="module")
def bank(host):
    return prune(host, method="magnitude", levels=[0.3, 0.6], multiple=8)


@pytest.mark.parametrize("name", [*PAIRED, "frechet", "accuracy"])
def test_the_search_minimises_each(host, bank, judge, name):
    found = search(host, bank, **OPTIONS, fitness=name, judge=judge)
    assert found.fitness == name and math.isfinite(found.best.search) and math.isfinite(found.best.held_out)
    if name in PAIRED:
        assert found.dense <= found.best.search
    first, *_, last = found.history
    assert last.best <= first.best and found.best.search in last.fitness
    assert found.best.held_out == min(finalist.held_out for finalist in found.finalists)


@pytest.mark.parametrize("name", [*PAIRED, "frechet", "accuracy"])
def test_what_a_broken_model_made_is_never_the_best(judge, name):
    fitness = fitness_of(name, judge)
    dense = outcome(torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(0)))
    broken = outcome(torch.full_like(dense.latents, math.nan))
    ledger = Ledger(fitness, {(1,): fitness.statistics(broken, dense), (0,): fitness.statistics(dense, dense)})
    assert ledger.value((1,), 3) == (1.0 if name == "accuracy" else math.inf) >= ledger.value((0,), 3)


def test_a_registered_fitness_is_known_by_name(host, bank):
    register_fitness("saturation")(
        lambda request: Fitness("saturation", lambda made, dense: made.images.std(1).flatten(1).mean(1))
    )
    try:
        assert search(host, bank, **OPTIONS, fitness="saturation").fitness == "saturation"
    finally:
        del FITNESS["saturation"]


def test_a_wrong_function_is_refused_before_any_candidate(host, bank):
    calls = []

    def wrong(made, dense):
        calls.append(made is dense)
        return torch.zeros(7)

    with pytest.raises(SearchError, match="must give a tensor"):
        search(host, bank, **OPTIONS, fitness=wrong)
    assert calls == [True], "tried on the dense model's own images"
