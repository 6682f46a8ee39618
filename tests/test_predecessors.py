"""Asymmetric compensation: exact, better where predecessors are pruned, and without a trace in the denoiser."""

from __future__ import annotations

import pytest
import torch

import zoo
from stageprune.core.api import host_for
from stageprune.core.calibration import calibrate
from stageprune.core.calibration.packages import GIB, hessian_bytes, packages
from stageprune.core.errors import BankError, CalibrationError
from stageprune.core.groups import consumer_sites, input_sites
from stageprune.core.groups.layer import inputs_of, layer_at, matrix_columns, matrix_of, taps_of
from stageprune.core.host import sample
from stageprune.core.pruning import prune
from stageprune.core.pruning.bank import ConsumerKey
from stageprune.core.pruning.compensate import compensate, damp, with_bias
from stageprune.core.pruning.predecessors import PairedMoments, compensate_paired
from stageprune.core.pruning.solver import nested_columns, widened
from stageprune.core.runtime import applied
from stageprune.core.schedule import StageSchedule
from support import COMPILED, compile_and_run, inside, make_pipe, raising, relative, same_state, state_of

LEVELS = (0.0, 0.3, 0.6)
CALL = {"steps": 5, "guidance": 2.0}


def problem(rows=60, columns=8, outputs=5, seed=0):
    """Inputs of a consumer in the dense and in the pruned denoiser, constant 1 last, and its weight and bias."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=random, dtype=torch.float64) + 0.5
    y = x + 0.3 * torch.randn(rows, columns, generator=random, dtype=torch.float64)
    ones = torch.ones(rows, 1, dtype=torch.float64)
    weight = torch.randn(outputs, columns + 1, generator=random, dtype=torch.float64)
    return torch.cat([x, ones], 1), torch.cat([y, ones], 1), weight


@pytest.mark.parametrize("kept", [[3, 0, 5], [7], [*range(8)], [1, 2, 4, 6, 0]])
def test_it_is_ridge_regression(kept):
    """Against least squares on the rows themselves, the damping as more rows."""
    x, y, weight = problem()
    columns, damping = torch.tensor(kept), 0.05
    got_weight, got_bias = compensate_paired(weight, y.T @ y, x.T @ y, columns, damping)
    ridge = (y.T @ y).diagonal()[:-1].mean() * damping
    extra = torch.cat([ridge.sqrt() * torch.eye(len(kept), dtype=y.dtype), torch.zeros(len(kept), 1, dtype=y.dtype)], 1)
    index = torch.tensor([*kept, 8])
    inputs = torch.cat([y[:, index], extra])
    wanted = torch.cat([x @ weight.T, ridge.sqrt() * weight[:, columns].T])
    exact = torch.linalg.lstsq(inputs, wanted).solution.T
    assert relative(torch.cat([got_weight, got_bias[:, None]], 1), exact) < 1e-10


def test_moments_that_stay_indefinite_are_refused():
    _, y, weight = problem()
    wrong = y.T @ y
    wrong[0, 0] = -wrong[1, 1] * 1e4
    with pytest.raises(CalibrationError, match=r"3 columns. have no Cholesky factor even with damping 10: give more"):
        compensate_paired(weight, wrong, wrong, torch.tensor([0, 1, 2]), 0.01)


def test_with_dense_predecessors_it_is_plain_compensation():
    x, _, weight = problem()
    moment, order = x.T @ x, torch.tensor([4, 1, 7, 0, 2, 3, 5, 6])
    for count, (kept, bias) in zip((3, 6, 8), compensate(weight, damp(moment, 0.01), order, (3, 6, 8)), strict=True):
        got = compensate_paired(weight, moment, moment, order[:count], 0.01)
        assert relative(got[0], kept) < 1e-10 and relative(got[1], bias) < 1e-10


@pytest.fixture(scope="module", params=("dit", "sd15", "sd3", "flux"))
def case(request):
    """Host, calibration and a bank compensated for dense predecessors."""
    pipe = zoo.make_pipeline(request.param)
    host = host_for(pipe)
    kinds = ("head", "neuron", "channel") if request.param == "sd15" else ("head", "neuron")
    prompts = (list(zoo.prompts_for(pipe)) * 4)[:6]
    calibration = calibrate(host, prompts, kinds=kinds, tokens=1.0, **CALL)  # as the paired moments are summed
    return host, calibration, prune(host, calibration, levels=LEVELS, multiple=8, layer_allocation="uniform")


def wide(host, bank, level):
    sites = consumer_sites(bank.groups)
    return {
        path: widened(
            bank.consumers[ConsumerKey(path, level, 0)], layer_at(host.denoiser, path), sites[path], bank.orders,
            bank.kept, level,
        )
        for path in sites
    }  # fmt: skip


def moments_of(host, bank, calibration, level):
    """Of every consumer on the calibration's own trajectories, at a level."""
    moments = PairedMoments(host.denoiser, [*consumer_sites(bank.groups)])
    made = calibration.provenance
    with moments.recording(wide(host, bank, level)), torch.no_grad():
        sample(host, host.encode(made["prompts"]), range(len(made["prompts"])), made["steps"], made["guidance"])
    return moments


def loss(host, bank, moments, path, level):
    """|W X - W_k Y_k|^2 of a consumer, from the moments; without |W X|^2, which no consumer changes."""
    layer = layer_at(host.denoiser, path)
    entries = consumer_sites(bank.groups)[path]
    order, places = nested_columns(entries, bank.orders, bank.kept, inputs_of(layer))
    columns = matrix_columns(order[places[level]], taps_of(layer))
    kept = torch.cat([columns, torch.tensor([matrix_of(layer).shape[1]])])
    consumer = bank.consumers[ConsumerKey(path, level, 0)]
    mine = with_bias(consumer.weight.flatten(1), consumer.bias)
    dense = with_bias(matrix_of(layer), layer.bias)
    own, cross = moments.own[path].double()[kept][:, kept], moments.cross[path].double()[:, kept]
    return float(torch.einsum("oi,ij,oj->", mine, own, mine) - 2 * torch.einsum("oi,ij,oj->", dense, cross, mine))


def test_each_consumer_errs_less_on_what_it_is_given(case):
    """All in one package: fitted to what the bank with dense predecessors delivers."""
    host, calibration, bank = case
    structure, before = inside(host.denoiser), state_of(host.denoiser)
    fitted = prune(
        host, calibration, levels=LEVELS, multiple=8, layer_allocation="uniform", predecessors="pruned", damping=1e-6
    )
    assert inside(host.denoiser) == structure and same_state(before, state_of(host.denoiser))
    assert fitted.provenance["predecessors"] == "pruned" and fitted.provenance["packages"] == 1
    symmetric = prune(host, calibration, levels=LEVELS, multiple=8, layer_allocation="uniform", damping=1e-6)
    assert fitted.kept == symmetric.kept
    for level in (1, 2):
        moments = moments_of(host, symmetric, calibration, level)
        for path in consumer_sites(bank.groups):
            old, new = (loss(host, each, moments, path, level) for each in (symmetric, fitted))
            assert new <= old + 1e-5 * abs(old)
        first = next(iter(input_sites(host.denoiser, [*consumer_sites(bank.groups)], host.input_size)))
        key = ConsumerKey(first, level, 0)
        assert relative(fitted.consumers[key].weight, symmetric.consumers[key].weight) < 1e-3, "nothing is before it"


def test_later_packages_see_what_earlier_ones_have_become(case):
    """The first layer of the last package is the best answer to all before it, as these are in the end."""
    host, calibration, _ = case
    widths = {path: table.shape[-1] - 1 for path, table in calibration.hessians.items()}
    budget = hessian_bytes(max(widths.values()), 2) / GIB
    options = {"levels": (0.0, 0.6), "multiple": 8, "layer_allocation": "uniform", "damping": 1e-6}
    fitted = prune(host, calibration, **options, predecessors="pruned", hessian_budget=budget)
    called = input_sites(host.denoiser, [*consumer_sites(fitted.groups)], host.input_size)
    parts = packages({path: widths[path] for path in called}, 2, budget)
    assert fitted.provenance["packages"] == len(parts) > 1
    last = parts[-1][0]
    again = moments_of(host, fitted, calibration, 1)
    layer = layer_at(host.denoiser, last)
    order, places = nested_columns(consumer_sites(fitted.groups)[last], fitted.orders, fitted.kept, inputs_of(layer))
    columns = matrix_columns(order[places[1]], taps_of(layer))
    weight, bias = compensate_paired(
        with_bias(matrix_of(layer), layer.bias), again.own[last], again.cross[last], columns, 1e-6
    )
    consumer = fitted.consumers[ConsumerKey(last, 1, 0)]
    assert relative(consumer.weight.flatten(1).double(), weight) < 2e-3
    assert relative(consumer.bias.double(), bias) < 2e-3


def test_the_runtime_takes_it():
    host = host_for(make_pipe())
    calibration = calibrate(host, [1, 2, 3, 4] * 4, **CALL)
    bank = prune(host, calibration, levels=LEVELS, multiple=8, predecessors="pruned", predecessor_prompts=4)
    with applied(host, bank) as pruner:
        pruner.schedule = StageSchedule.uniform(0.6)
        assert torch.isfinite(sample(host, host.encode([1, 2]), [0, 1], 5, 1.5)).all()


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_denoiser_gives_the_same_bank(how):
    """Its graphs are older than the hooks that make each call again."""
    options = {"levels": LEVELS, "multiple": 8, "layer_allocation": "uniform", "predecessors": "pruned"}
    host = host_for(make_pipe())
    calibration = calibrate(host, [1, 2, 3, 4] * 4, **CALL)
    expected = prune(host, calibration, **options)
    torch._dynamo.reset()
    pipe = make_pipe()
    graphs = compile_and_run(pipe, how, batch=16)
    count = len(graphs)
    found = prune(host_for(pipe), calibration, **options)
    assert len(graphs) == count, "no graph may run, and none be captured"
    torch._dynamo.reset()
    assert found.consumers.keys() == expected.consumers.keys()
    for key, consumer in expected.consumers.items():
        assert torch.equal(found.consumers[key].weight, consumer.weight)
        assert torch.equal(found.consumers[key].bias, consumer.bias)


def test_interrupted_it_leaves_no_trace():
    pipe = make_pipe()
    host = host_for(pipe)
    calibration = calibrate(host, [1, 2, 3, 4] * 4, **CALL)
    structure, before = inside(pipe.transformer), state_of(pipe.transformer)
    options = {"levels": LEVELS, "multiple": 8, "layer_allocation": "uniform", "predecessors": "pruned"}
    with pytest.raises(KeyboardInterrupt), raising(pipe.transformer.transformer_blocks[1], KeyboardInterrupt(), 4):
        prune(host, calibration, **options)
    assert inside(pipe.transformer) == structure and same_state(before, state_of(pipe.transformer))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"predecessors": "both"}, BankError, "`predecessors` must be 'dense' or 'pruned', got 'both'"),
        ({"predecessor_prompts": 0}, BankError, "`predecessor_prompts` must be at least 1, got 0"),
        ({"predecessors": "pruned", "method": "wanda"}, BankError, "this method does not compensate"),
        ({"predecessors": "pruned", "hessian_budget": 1e-9}, CalibrationError, "`hessian_budget` is too small"),
        ({"predecessors": "pruned", "order": "stage"}, BankError, "goes with `order` and `consumers` 'shared'"),
    ],
)
def test_bad_arguments(options, error, message, host, calibration):
    with pytest.raises(error, match=message):
        prune(host, calibration, **options)
