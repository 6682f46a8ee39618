"""The evaluation: a whole report on a tiny random pipeline."""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest
import torch

import stageprune
from stageprune.core.errors import StagePruneError
from stageprune.core.evaluation import ClassJudge, Report, evaluate, load_judge, mse, psnr
from stageprune.core.evaluation.benchmark import benchmark
from stageprune.core.evaluation.rows import COLUMNS
from stageprune.core.evaluation.verdict import comparisons
from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost
from support import broken as broken_bank
from support import make_pipe, same_state, state_of

STEPS = 6
COUNT = 6
SEED = 500
LEVELS = (0.0, 0.2, 0.4, 0.6)


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def host(pipe):
    return DiffusersHost(pipe)


@pytest.fixture(scope="module")
def bank(pipe):
    calibration = stageprune.calibrate(pipe, [1, 2, 3] * 8, steps=STEPS, guidance=1.5)
    return stageprune.prune(pipe, calibration, levels=LEVELS, multiple=8)


@pytest.fixture(scope="module")
def bundle(bank, allocation):
    return stageprune.Bundle(bank, allocation.schedule)


@pytest.fixture(scope="module")
def allocation(pipe, bank):
    return stageprune.allocate(pipe, bank, target=0.8, prompts=[1, 2, 3, 1], stages=3)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(1)
    return ClassJudge([1, 2, 3], held_out_accuracy=0.5, held_out_images=10)


@pytest.fixture(scope="module")
def before(pipe):
    return state_of(pipe.transformer)


@pytest.fixture(scope="module")
def report(host, bundle, judge, allocation, before) -> Report:
    return evaluate(
        host,
        bundle,
        prompts=[1, 2, 3],
        count=COUNT,
        seed=SEED,
        batch_size=4,
        judge=judge,
        grid=3,
        allocation=allocation,
        command="stageprune evaluate <tiny>",
    )


def test_every_variant_has_a_row(report):
    assert [row.name for row in report.rows] == ["dense", "schedule", "uniform", "magnitude", "fewer steps"]
    assert all(len(row.latent_errors) == COUNT for row in report.rows)
    assert all(row.seconds > 0 for row in report.rows)


def test_dense_has_no_paired_error(report):
    dense = report.row("dense")
    assert dense.latent_mse == dense.image_mse == 0
    assert dense.ssim == pytest.approx(1.0)
    assert dense.psnr == float("inf")
    assert dense.time_ratio == dense.macs_share == 1.0
    assert all(row.latent_mse > 0 for row in report.rows[1:])


def test_rivals_cost_what_they_say(report, host, bank):
    assert report.row("uniform").macs_share == report.row("magnitude").macs_share
    share = report.row("schedule").macs_share
    assert share == pytest.approx(report.summary.executed.share)
    fewer = report.row("fewer steps")
    assert fewer.steps == round(STEPS * share)
    assert fewer.macs_share == len(host.taus(fewer.steps)) / len(host.taus(STEPS))
    from stageprune.core.groups import measure_cost

    macs = bank.macs(measure_cost(host.denoiser))
    shares = [macs[level] / macs[0.0] for level in LEVELS[1:]]
    assert report.row("uniform").macs_share == min(shares, key=lambda other: abs(other - share))


def test_the_schedules_row_is_what_the_pipeline_does(report, pipe, bundle):
    prompts, seeds = [1, 2, 3, 1, 2, 3], list(range(SEED, SEED + COUNT))

    def latents():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        host = DiffusersHost(pipe)
        ran = sample(host, host.encode(prompts), seeds, STEPS, 1.5)
        images = pipe(prompts, num_inference_steps=STEPS, guidance_scale=1.5, generator=generators, output_type="pt")
        return ran, images.images

    dense, dense_images = latents()
    pipe.enable_stage_pruning(bundle)
    try:
        pruned, pruned_images = latents()
    finally:
        pipe.disable_stage_pruning()
    row = report.row("schedule")
    assert row.latent_errors == pytest.approx(mse(pruned, dense).tolist(), rel=1e-3)
    assert row.image_mse == pytest.approx(float(mse(pruned_images, dense_images).mean()), rel=1e-3)
    assert row.psnr == pytest.approx(float(psnr(pruned_images, dense_images).mean()), rel=1e-3)


def test_uniform_is_one_level_everywhere(report, pipe, bank):
    host, seeds = DiffusersHost(pipe), list(range(SEED, SEED + COUNT))
    conditions = host.encode([1, 2, 3] * 2)
    dense = sample(host, conditions, seeds, STEPS, 1.5)
    level = float(report.row("uniform").description.split()[1])
    pipe.enable_stage_pruning(stageprune.Bundle(bank, stageprune.StageSchedule.uniform(level)))
    try:
        pruned = sample(host, conditions, seeds, STEPS, 1.5)
    finally:
        pipe.disable_stage_pruning()
    assert report.row("uniform").latent_errors == pytest.approx(mse(pruned, dense).tolist(), rel=1e-3)


def test_worst_cases_are_the_samples_furthest_from_dense(report):
    errors = report.row("schedule").latent_errors
    order = sorted(range(COUNT), key=lambda i: -errors[i])[:4]
    assert [name.split("seed ")[1] for name in report.worst.columns] == [str(SEED + i) for i in order]
    assert report.grid.images.shape[:2] == (5, 3)


def test_curve_covers_levels_and_step_counts(report):
    kinds = [point.kind for point in report.curve]
    assert kinds.count("uniform") == len(LEVELS) - 1
    assert kinds.count("fewer steps") >= 2
    assert kinds.count("schedule") == kinds.count("magnitude") == 1
    assert len({point.description for point in report.curve}) == len(report.curve)
    shares = [point.macs_share for point in report.curve]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1
    schedule = next(point for point in report.curve if point.kind == "schedule")
    assert schedule.latent_mse == pytest.approx(report.row("schedule").latent_mse)  # 6 samples are all of them


def test_the_denoiser_is_left_bit_equal(report, pipe, before):
    assert same_state(before, state_of(pipe.transformer))
    assert not pipe.is_stage_pruning_enabled()


def test_verdict_names_the_winner_of_each_metric(report):
    for key in ("accuracy", "frechet", "latent_mse", "time_ratio"):
        column = next(column for column in COLUMNS if column.key == key)
        title = column.title[0].upper() + column.title[1:]
        sentence = next(line for line in report.verdict if line.startswith(f"{title}:"))
        winners = [row for row in report.rows if row.name in column.best(report.rows)]
        assert winners
        for row in winners:
            shown = "the schedule is best" if row.name == "schedule" and len(winners) == 1 else row.description
            assert shown in sentence
    assert all("dense" not in column.best(report.rows) for column in COLUMNS)  # which is no rival


class Page(HTMLParser):
    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_saved_page_is_whole_and_self_contained(report, tmp_path):
    path = report.save(tmp_path / "deep" / "folder")
    pictures = ["curve.png", "grid.png", "layers.png", "schedule.png", "table.png"]
    written = sorted(file.name for file in path.parent.iterdir())
    assert written == sorted(["report.html", "report.json", *pictures])
    page = Page()
    page.feed(path.read_text("utf-8"))
    page.close()
    assert page.open == []
    text = " ".join(" ".join(page.text).split())
    for row in report.rows:
        assert row.description in text
    for wanted in (*report.notes, *report.environment, "stageprune evaluate <tiny>"):
        assert wanted in text
    assert len(page.images) == 5  # grid, schedule, layers, curve, error table
    assert all(source.startswith("data:image/png;base64,") for source in page.images)


def test_saved_json_is_the_reports_data(report, tmp_path):
    report.save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert data == report.to_dict()
    assert data["rows"][0]["psnr"] is None  # infinite: JSON has no word for it
    assert data["environment"]["samples"] == COUNT and data["environment"]["steps"] == STEPS
    assert stageprune.StageSchedule.from_dict(data["schedule"]) == report.schedule
    assert data["allocation"]["candidates"]
    assert all(text in str(report) for text in (report.verdict[0], *(row.description for row in report.rows)))


def test_without_a_judge_set_metrics_are_absent_and_said_to_be(host, bundle, tmp_path):
    report = evaluate(host, bundle, prompts=[1], count=2, steps=2, batch_size=2, curve=False)
    assert all(row.accuracy is None and row.frechet is None for row in report.rows)
    assert any("No judge" in note for note in report.notes)
    assert report.curve == ()
    page = report.save(tmp_path).read_text("utf-8")
    assert "No judge" in page and "Allocation" not in page
    assert not any(line.startswith(("Class accuracy", "Fréchet")) for line in report.verdict)


def test_defaults_come_from_the_calibration(host, bundle):
    report = evaluate(host, bundle, count=2, batch_size=2, curve=False)
    assert report.environment["steps"] == STEPS and report.environment["guidance"] == 1.5
    assert [name.split("\n")[0] for name in report.grid.columns] == ["1", "2"]


def test_a_bank_per_stage_can_be_evaluated(pipe, host):
    calibration = stageprune.calibrate(pipe, [1, 2, 3] * 8, steps=STEPS, stages=2)
    bank = stageprune.prune(pipe, calibration, levels=[0, 0.4], multiple=8, order="stage")
    bundle = stageprune.Bundle(bank, stageprune.StageSchedule.from_levels([0.0, 0.4]))
    report = evaluate(host, bundle, prompts=[1, 2], count=2, batch_size=2, curve=False)
    assert report.row("uniform").latent_mse > 0
    assert report.row("uniform").macs_share == report.row("magnitude").macs_share


def test_a_trimmed_bundle_can_be_evaluated(host, bundle):
    report = evaluate(host, bundle.trimmed(), prompts=[1, 2], count=2, batch_size=2, curve=False)
    assert report.row("uniform").macs_share == report.row("magnitude").macs_share


def test_a_bundle_without_a_schedule_is_refused(host, bank):
    with pytest.raises(StagePruneError, match=r"no schedule.*stageprune\.allocate"):
        evaluate(host, stageprune.Bundle(bank))


def test_a_bank_without_levels_is_refused(host, bank):
    dense = stageprune.Bundle(bank, stageprune.StageSchedule.uniform(0.0)).trimmed()
    with pytest.raises(StagePruneError, match="no level but dense"):
        evaluate(host, dense)


@pytest.mark.parametrize(("name", "value"), [("count", 1), ("batch_size", 0), ("steps", 0)])
def test_numbers_out_of_range_are_refused(host, bundle, name, value):
    with pytest.raises(StagePruneError, match=f"`{name}` must be at least"):
        evaluate(host, bundle, **{name: value})


def test_an_allocation_of_another_schedule_is_refused(host, bundle, allocation):
    with pytest.raises(StagePruneError, match="another schedule"):
        evaluate(host, stageprune.Bundle(bundle.bank, bundle.schedule.with_levels([0.6] * 3)), allocation=allocation)


def test_classes_unknown_to_the_judge_are_refused(host, bundle, judge):
    with pytest.raises(StagePruneError, match="does not know class 7"):
        evaluate(host, bundle, prompts=[1, 7], count=2, judge=judge)


def test_an_enabled_pipeline_is_refused(pipe, host, bundle):
    pipe.enable_stage_pruning(bundle)
    try:
        with pytest.raises(StagePruneError, match="disable_stage_pruning"):
            evaluate(host, bundle, prompts=[1], count=2)
    finally:
        pipe.disable_stage_pruning()


def test_the_benchmark_times_banks_that_distinguish_stages(pipe, host, banks, before):
    """The consumers of all stages are resident, as they are when a schedule runs."""
    timed = {
        name: benchmark(pipe.transformer, each, host.tau_reader, sparsities=[0.5], batch=1, rounds=1, warmup=0)
        for name, each in banks.items()
    }
    for found in timed.values():
        assert [row.sparsity for row in found.levels] == [0.0, 0.5] and found.switch_milliseconds > 0
        assert found.levels[1].macs < found.levels[0].macs and found.levels[1].bytes < found.all_bytes
    shared, stage = timed["shared-shared"], timed["shared-stage"]
    added = [found.all_bytes - found.dense_bytes for found in (shared, stage)]
    assert added[1] == 5 * added[0], "of each of the five stages"
    assert same_state(before, state_of(pipe.transformer))


def test_a_missing_library_is_named_with_its_remedy(host, bundle, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StagePruneError, match=r"pip install 'stageprune\[report\]'"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_load_judge(tmp_path, judge):
    assert load_judge(tmp_path) is None
    judge.save(tmp_path / "judge")
    loaded = load_judge(tmp_path)
    assert loaded is not None and loaded.labels == [1, 2, 3] and not loaded.training
    (tmp_path / "judge" / "config.json").unlink()
    with pytest.raises(StagePruneError, match="missing"):
        load_judge(tmp_path)


def test_no_prompts_are_refused(host, bundle):
    with pytest.raises(StagePruneError, match="`prompts` is empty: give at least one"):
        evaluate(host, bundle, prompts=[], count=2)


@pytest.fixture(scope="module")
def broken_report(host, bundle, judge) -> Report:
    """Of a schedule whose levels overflow."""
    overflowing = stageprune.Bundle(broken_bank(bundle.bank), bundle.schedule)
    return evaluate(host, overflowing, prompts=[1, 2, 3], count=3, seed=SEED, batch_size=2, judge=judge, grid=2)


def test_what_is_not_finite_wins_nothing(broken_report):
    names = {row.name for row in broken_report.rows if row.broken}
    assert names == {"schedule", "uniform"} and broken_report.row("schedule").broken == 3
    assert math.isnan(broken_report.row("schedule").latent_mse)
    quality = [column for column in COLUMNS if column.better and column.key != "time_ratio"]
    for column in quality:
        best = column.best(broken_report.rows)
        assert column.key == "accuracy" or (best and not names & set(best))
    assert broken_report.row("schedule").accuracy == broken_report.row("uniform").accuracy == 0


def test_a_report_says_what_is_not_finite(broken_report, report, tmp_path):
    note = next(note for note in broken_report.notes if note.startswith("Samples that are not finite"))
    assert "schedule (obs): 3 of 3" in note and "magnitude" not in note and "break the model" in note
    assert "latent MSE not finite" in broken_report.verdict[0] and "nan" not in str(broken_report)
    page = broken_report.save(tmp_path).read_text("utf-8")
    assert note.split(":")[0] in page and "± nan" not in page
    assert not any(row.broken for row in report.rows) and not any("not finite" in note for note in report.notes)


def test_a_verdict_without_a_finite_rival(broken_report):
    dense, ours, other = broken_report.row("dense"), broken_report.row("schedule"), broken_report.row("uniform")
    assert "Latent MSE: no variant has a finite value." in comparisons([dense, ours, other])
    ours = dataclasses.replace(ours, latent_mse=0.5)
    only = "Latent MSE: the schedule is best with 5.00e-01; no other variant has a finite value."
    assert only in comparisons([dense, ours, other])
    overflowed = [dataclasses.replace(row, latent_mse=math.inf) for row in (ours, other)]
    assert "Latent MSE: no variant has a finite value." in comparisons([dense, *overflowed])
