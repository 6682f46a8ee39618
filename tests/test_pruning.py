"""Orders, kept counts, methods, and the bank they make."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stageprune import StageSchedule, methods, register_method
from stageprune.core.errors import BankError, CalibrationError, ScheduleError
from stageprune.core.groups import DenoiserCost, Group, measure_cost
from stageprune.core.hosts.diffusers import DiffusersHost
from stageprune.core.pruning import prune, realised_sparsity
from stageprune.core.pruning.compensate import compensate, damp, reconstruction_loss, with_bias
from stageprune.core.pruning.levels import Widths, check_sparsities, kept_counts
from stageprune.core.pruning.methods import _METHODS, ConsumerProblem, GroupProblem, _by_score, find_method
from stageprune.core.pruning.obs import obs_order
from support import LEVELS, make_pipe, state_of


@pytest.fixture
def plugged():
    """Methods that a test registers are gone after it."""
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


def random_problem(seed, units, width, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    size = units * width
    rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64) + 1
    data = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    weight = torch.randn(outputs, size + 1, generator=generator, dtype=torch.float64)
    return weight, damp(data.T @ data, 0.01)


def exact_loss(weight, hessian, columns, kept):
    """tr((W - W_k) H (W - W_k)^T) with the best W_k on the kept units, by plain solving."""
    stay = torch.cat([columns[sorted(kept)].reshape(-1), torch.tensor([len(hessian) - 1])]).long()
    best = torch.zeros_like(weight)
    best[:, stay] = torch.linalg.solve(hessian[stay][:, stay], (weight @ hessian[:, stay]).T).T
    return float(torch.einsum("oi,ij,oj->", weight - best, hessian, weight - best))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), units=st.integers(1, 6), width=st.integers(1, 3), consumers=st.integers(1, 2))
def test_obs_removes_the_unit_of_least_exact_loss(seed, units, width, consumers):
    """Brute force at every step: the summed increase of each consumer's least-squares residual."""
    problems = [random_problem(seed + i, units, width) for i in range(consumers)]
    columns = torch.arange(units * width).reshape(units, width)
    order = obs_order(problems, [columns] * consumers)
    assert sorted(order.units.tolist()) == list(range(units))
    kept, spent = set(range(units)), 0.0
    for unit, loss in zip(order.units.tolist()[::-1], order.losses.tolist()[::-1], strict=True):
        costs = {
            each: sum(exact_loss(w, h, columns, kept - {each}) - exact_loss(w, h, columns, kept) for w, h in problems)
            for each in kept
        }
        scale = max(costs.values())
        assert loss == pytest.approx(costs[unit], rel=1e-5, abs=1e-7 * scale)
        assert costs[unit] <= min(costs.values()) + 1e-7 * scale
        kept.remove(unit)
        spent += loss
        total = sum(exact_loss(w, h, columns, kept) for w, h in problems)
        assert spent == pytest.approx(total, rel=1e-5)


def test_cumulative_losses_are_the_reconstruction_loss():
    weight, hessian = random_problem(0, 12, 2)
    columns = torch.arange(24).reshape(12, 2)
    order = obs_order([(weight, hessian)], [columns])
    flat = columns[order.units].reshape(-1)
    energy = float(torch.einsum("oi,ij,oj->", weight, hessian, weight))
    for kept in range(1, 13):
        solution = compensate(weight, hessian, flat, [2 * kept])[0]
        lost = reconstruction_loss(weight, hessian, flat, solution) * energy
        assert lost == pytest.approx(float(order.losses[kept:].sum()), rel=1e-6, abs=1e-9 * energy)


def test_obs_does_not_change_its_inputs():
    weight, hessian = random_problem(1, 6, 2)
    before = weight.clone(), hessian.clone()
    obs_order([(weight, hessian)], [torch.arange(12).reshape(6, 2)])
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def group_problem(seed, units=24, rank=6):
    """Correlated inputs of unequal size: what OBS sees and magnitude does not."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, units, generator=generator, dtype=torch.float64)
    rows = torch.randn(800, rank, generator=generator, dtype=torch.float64) @ mixing
    rows += 0.3 * torch.randn(800, units, generator=generator, dtype=torch.float64)
    rows *= torch.rand(units, generator=generator, dtype=torch.float64) * 3
    data = torch.cat([rows, torch.ones(800, 1, dtype=torch.float64)], 1)
    weight = torch.randn(8, units, generator=generator)
    consumer = ConsumerProblem(weight, None, damp(data.T @ data, 0.01), torch.arange(units)[:, None])
    producer = torch.randn(units, 1, 10, generator=generator)
    return GroupProblem(Group("g", "neuron", units, 1), [consumer], [producer], seed)


def lost_share(problem, order, kept, compensated):
    consumer = problem.consumers[0]
    weight = with_bias(consumer.weight, None)
    solution = compensate(weight, consumer.hessian, order, [kept])[0]
    plain = (weight[:, order[:kept]], weight[:, -1])
    return reconstruction_loss(weight, consumer.hessian, order, solution if compensated else plain)


def test_obs_beats_magnitude_and_random_on_correlated_data():
    losses = {"obs": [], "magnitude": [], "random": []}
    for seed in range(8):
        problem = group_problem(seed)
        for name, values in losses.items():
            values.append(lost_share(problem, find_method(name).order(problem).units, 12, name == "obs"))
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    assert all(best < other for best, other in zip(losses["obs"], losses["magnitude"], strict=True))
    assert all(best < other for best, other in zip(losses["obs"], losses["random"], strict=True))
    assert means["obs"] < 0.2 * means["magnitude"]
    assert means["magnitude"] < 1.5 * means["random"], "magnitude must not be worse than chance by much"


def test_obs_order_matters_beyond_compensation():
    for seed in range(4):
        problem = group_problem(seed)
        best = lost_share(problem, find_method("obs").order(problem).units, 8, True)
        chance = [lost_share(problem, torch.randperm(24, generator=torch.Generator().manual_seed(i)), 8, True)
                  for i in range(20)]  # fmt: skip
        assert best < min(chance)


@settings(max_examples=200)
@given(
    heads=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 10_000)), max_size=3),
    neurons=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 500)), max_size=3),
    sparsities=st.lists(st.floats(0.001, 0.99), max_size=5, unique_by=lambda share: round(share, 6)),
    multiple=st.sampled_from([1, 3, 16, 64, 128]),
)
def test_kept_counts(heads, neurons, sparsities, multiple):
    groups = [Group(f"h{i}", "head", size, 8) for i, (size, _) in enumerate(heads)]
    groups += [Group(f"n{i}", "neuron", size, 1) for i, (size, _) in enumerate(neurons)]
    if not groups:
        return
    macs = dict(zip([g.name for g in groups], [cost for _, cost in (*heads, *neurons)], strict=True))
    sizes = {g.name: g.size for g in groups}
    dense = sum(macs[name] * size for name, size in sizes.items()) + 1000
    levels = check_sparsities(sparsities)
    kept = kept_counts(groups, DenoiserCost(dense, macs, sizes), levels, Widths(multiple))
    for group in groups:
        counts = kept[group.name]
        assert len(counts) == len(levels)
        assert counts[0] == group.size, "level 0 is dense, whatever the multiple"
        assert all(1 <= count <= group.size for count in counts)
        assert list(counts) == sorted(counts, reverse=True)
        if group.kind == "neuron":
            assert all(count % multiple == 0 or count in (group.size, min(multiple, group.size)) for count in counts)


@settings(max_examples=60)
@given(
    blocks=st.integers(1, 6),
    heads=st.integers(8, 24),
    neurons=st.integers(1000, 5000),
    sparsity=st.floats(0.05, 0.85),
    multiple=st.sampled_from([1, 16, 64]),
)
def test_realised_sparsity_is_close_to_the_asked_one(blocks, heads, neurons, sparsity, multiple):
    groups, units = [], {}
    for index in range(blocks):
        groups += [Group(f"h{index}", "head", heads, 64), Group(f"n{index}", "neuron", neurons, 1)]
        units |= {f"h{index}": 4 * neurons // heads * 64, f"n{index}": 8 * 64}
    cost = DenoiserCost(10**12, units, {group.name: group.size for group in groups})
    kept = kept_counts(groups, cost, (0.0, sparsity), Widths(multiple))
    assert realised_sparsity(kept, cost, 0) == 0
    grain = multiple * sum(units[g.name] for g in groups if g.kind == "neuron") / cost.prunable
    assert abs(realised_sparsity(kept, cost, 1) - sparsity) <= 0.51 * grain + 0.002


def test_widths_that_no_multiple_divides():
    """160 neurons in multiples of 64: 160, 128, 64; level 0 must still be dense."""
    host = DiffusersHost(make_pipe())
    bank = prune(host, method="magnitude", levels=[0, 0.05, 0.3, 0.7], multiple=64)
    assert bank.kept["blocks.0.ff"][0] == 160
    assert set(bank.kept["blocks.0.ff"][1:]) <= {160, 128, 64}


@pytest.mark.parametrize("levels", [[1.0], [-0.1], [float("nan")], [float("inf")], [0.2, 2]])
def test_levels_out_of_range(levels):
    with pytest.raises(BankError, match=r"`levels` must be sparsities in \[0, 1\)"):
        check_sparsities(levels)


def test_levels_are_sorted_and_hold_dense():
    assert check_sparsities([0.5, 0.2]) == (0, 0.2, 0.5)
    assert check_sparsities([]) == (0,)
    with pytest.raises(BankError, match="must differ from each other"):
        check_sparsities([0.2, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "`method` must be one of obs, wanda, activation, taylor, magnitude, random"),
        ({"order": "both"}, "`order` must be 'shared' or 'stage', got 'both'"),
        ({"consumers": "none"}, "`consumers` must be 'shared' or 'stage'"),
        ({"damping": 0.0}, r"`damping` must be in \(0, 1\)"),
        ({"damping": float("nan")}, r"`damping` must be in \(0, 1\)"),
        ({"method": "random", "order": "stage"}, "looks at no data"),
        ({"kinds": ["layer"]}, r"`kinds` must be some of \['head', 'neuron'\]"),
        ({"kinds": []}, "`kinds` must be some of"),
        ({"multiple": 0}, "`multiple` must be at least 1"),
        ({"levels": [0.5, 1.5]}, r"`levels` must be sparsities in \[0, 1\), got 1.5"),
    ],
)
def test_prune_refuses(host, calibration, arguments, message):
    with pytest.raises(BankError, match=message):
        prune(host, calibration, **arguments)


def test_prune_needs_a_fitting_calibration(host, calibration, pooled):
    with pytest.raises(BankError, match="method 'obs' needs a `calibration`"):
        prune(host)
    with pytest.raises(BankError, match="need a calibration with `stages` of at least 2"):
        prune(host, pooled, order="stage")
    with pytest.raises(CalibrationError, match="the calibration is of another model: the weights differ"):
        prune(DiffusersHost(make_pipe(seed=2)), calibration)
    thin = dataclasses.replace(calibration, rows={path: rows // 200 for path, rows in calibration.rows.items()})
    with pytest.raises(CalibrationError, match="too few calibration data"):
        prune(host, thin)


def test_prune_changes_nothing(host, calibration):
    before = state_of(host.denoiser)
    prune(host, calibration, levels=LEVELS, multiple=16, order="stage")
    after = state_of(host.denoiser)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shared_orders_equal_those_of_the_pooled_calibration(host, calibration, pooled):
    first, second = (prune(host, each, levels=LEVELS, multiple=16) for each in (calibration, pooled))
    assert all(torch.equal(first.orders[name], second.orders[name]) for name in first.orders)


def test_data_free_methods_slice_the_dense_consumer(host):
    for method in ("magnitude", "random"):
        bank = prune(host, method=method, levels=[0.5], multiple=16)
        path = "transformer_blocks.1.ff.net.2"
        linear = host.denoiser.get_submodule(path)
        kept = bank.order("blocks.1.ff", 0)[: bank.kept["blocks.1.ff"][1]]
        assert torch.equal(bank.consumer(path, 1, 0).weight, linear.weight[:, kept])
        assert torch.equal(bank.consumer(path, 1, 0).bias, linear.bias)
        assert bank.provenance["calibration"] is None


def test_magnitude_is_the_norm_of_rows_and_columns(host):
    up, down = host.denoiser.transformer_blocks[2].ff.net[0].proj, host.denoiser.transformer_blocks[2].ff.net[2]
    score = up.weight.double().square().sum(1) + down.weight.double().square().sum(0)
    bank = prune(host, method="magnitude", levels=[0.5], multiple=16)
    assert torch.equal(bank.order("blocks.2.ff", 0), score.argsort(descending=True))


def test_random_follows_its_seed(host):
    first, again, other = (prune(host, method="random", levels=[0.5], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.orders["blocks.0.ff"], again.orders["blocks.0.ff"])
    assert not torch.equal(first.orders["blocks.0.ff"], other.orders["blocks.0.ff"])
    assert not torch.equal(first.orders["blocks.0.ff"], first.orders["blocks.1.ff"])


def test_a_method_can_be_plugged_in(host, calibration, plugged):
    @register_method("last-first", compensates=True)
    def last_first(problem):
        """Keep the last units."""
        return _by_score(torch.arange(problem.group.size, dtype=torch.float64))

    assert methods()["last-first"] == "Keep the last units."
    bank = prune(host, calibration, method="last-first", levels=[0.5], multiple=16)
    assert bank.order("blocks.0.attn", 0).tolist() == [4, 3, 2, 1, 0]
    assert bank.method == "last-first" and "last-first" in str(bank)


def test_a_method_without_a_docstring_can_be_plugged_in(plugged):
    register_method("bare")(lambda problem: None)
    assert methods()["bare"] == ""


def test_what_a_method_needs(plugged):
    """(a calibration, compensated consumers): the second cannot be without the first."""
    register_method("plugged", compensates=True)(lambda problem: None)
    needs = {name: (find_method(name).needs_data, find_method(name).compensates) for name in methods()}
    assert needs["obs"] == needs["plugged"] == (True, True)
    assert needs["wanda"] == needs["activation"] == (True, False)
    assert needs["magnitude"] == needs["random"] == (False, False)


def test_bank_lookups(bank):
    assert [bank.level_of(sparsity) for sparsity in (0, 0.2, 0.5 + 1e-9, 0.7)] == [0, 1, 2, 3]
    with pytest.raises(ScheduleError, match=r"no level of sparsity 0.3; its levels are 0, 0.2, 0.5, 0.7"):
        bank.level_of(0.3)
    bound = bank.bind(StageSchedule.from_levels([0, 0.2, 0.5, 0.7, 0.5]))
    assert [level for level, _ in bound] == [0, 1, 2, 3, 2]
    assert [stage for _, stage in bound] == ([0, 1, 2, 3, 4] if bank.stages == 5 else [0] * 5)


def test_bank_macs_equal_the_cost_at_its_kept_counts(host, bank):
    cost = measure_cost(host.denoiser)
    macs = bank.macs(cost)
    assert macs[0.0] == cost.dense
    assert list(macs.values()) == sorted(macs.values(), reverse=True)
    assert bank.provenance["realised"][2] == pytest.approx((cost.dense - macs[0.5]) / cost.prunable, abs=1e-6)


def test_a_bank_of_the_dense_level_alone(host, calibration):
    bank = prune(host, calibration, levels=[0.0])
    assert not bank.consumers and bank.sparsities == (0.0,)
    assert bank.bind(StageSchedule.uniform(0)) == [(0, 0)]
