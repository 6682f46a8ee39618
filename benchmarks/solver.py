"""The solvers: are they exact, how fast are they?

python benchmarks/solver.py                           # consumers against exact least squares; into results/solver.json
python benchmarks/solver.py order                     # the greedy order, blocked against plain; into solver-order.json
python benchmarks/solver.py order --sizes 1280 5120   # with fewer sizes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common import ROOT, Subject, with_peak, write_results
from stageprune.core.pruning.compensate import compensate, damp, with_bias
from stageprune.core.pruning.obs import obs_order

OUTPUTS = {1280: 320, 5120: 1280, 12288: 3072}
"""Neurons of an FFN -> outputs of its consumer: the smallest of SD 1.5, the largest of SD 1.5 and SDXL, FLUX's."""


def main() -> None:
    """Run one part and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("consumers", "order"), default="consumers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[*OUTPUTS], help="order: neurons")
    parser.add_argument("--widths", type=int, nargs="+", default=[1], help="order: columns of a unit (1 is a neuron)")
    parser.add_argument("--removals", type=int, default=20, help="order: units that the plain loop removes when timed")
    arguments = parser.parse_args()
    if arguments.part == "consumers":
        consumers()
        return
    torch.set_num_threads(1)
    rows = [time_order(size, width, arguments.removals) for size in arguments.sizes for width in arguments.widths]
    write_results("solver-order", {"rows": rows})


def consumers() -> None:
    """Compensated consumers against exact least squares, one Cholesky for all levels against one solve a level."""
    demo = Subject("dit-digits")
    levels = demo.recipe.levels
    calibration = demo.calibrate(40)
    bank = demo.prune(calibration)
    rows = []
    for group in bank.groups:
        path = group.consumers[0].path
        linear = demo.host.denoiser.get_submodule(path)
        weight = with_bias(linear.weight, linear.bias)
        hessian = damp(calibration.hessian(path), 0.01)
        columns = group.columns(bank.orders[group.name])
        counts = [kept * group.width for kept in bank.kept[group.name]]
        rows.append({"consumer": path, **compare(weight, hessian, columns, counts)})
    for width in (192, 768, 1536):
        weight, hessian = random_problem(width)
        columns = torch.randperm(width)
        counts = [round(width * (1 - level)) for level in levels]
        rows.append({"consumer": f"random, {width} columns", **compare(weight, hessian, columns, counts)})
    for row in rows:
        print(
            f"{row['consumer']:<36} worst difference {row['worst']:.1e}; one Cholesky {row['once_ms']:.1f} ms, "
            f"one solve a level {row['each_ms']:.1f} ms ({row['each_ms'] / row['once_ms']:.1f} x)"
        )
    print("worst of all:", f"{max(row['worst'] for row in rows):.1e}")
    write_results("solver", {"levels": levels, "rows": rows})


def time_order(size: int, width: int, removals: int) -> dict[str, Any]:
    """The greedy order of one consumer, on one thread. The plain loop is timed on its first removals only: each of them
    costs the same, but what it would take for all is not measured.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from plain import plain_order

    outputs, units = OUTPUTS.get(size, size // 4), size // width
    removals = min(removals, units)
    consumer, columns = expected_problem(size, outputs), torch.arange(units * width).view(units, width)
    started = time.process_time()
    order, _, peak = with_peak(lambda: obs_order([consumer], [columns]))
    blocked = time.process_time() - started
    inverse = cpu_seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(consumer[1])))
    started = time.process_time()
    first = plain_order([consumer], [columns], removals)
    plain = max(time.process_time() - started - inverse, 0.0) / removals
    row = {
        "neurons": size,
        "outputs": outputs,
        "width": width,
        "units": units,
        "blocked_cpu_seconds": blocked,
        "inverse_cpu_seconds": inverse,
        "peak_gib": peak / 2**30,
        "hessian_gib": consumer[1].numel() * 8 / 2**30,
        "plain_removals": removals,
        "plain_cpu_seconds_a_removal": plain,
        "first_removals_equal": order.units[-removals:].tolist() == first.units.tolist(),
        "largest_loss_difference": float((order.losses[-removals:] / first.losses - 1).abs().max()),
    }
    print(
        f"{size} -> {outputs}, width {width}: all {units} units in {blocked:.2f} s, the inverse alone {inverse:.2f} s, "
        f"at most {row['peak_gib']:.2f} GiB beside the {row['hessian_gib']:.2f} GiB of H; "
        f"plain loop {plain * 1e3:.1f} ms a removal, the mean of its first {removals}, without the inverse; the same "
        f"units: {row['first_removals_equal']}, losses within {row['largest_loss_difference']:.0e}",
        flush=True,
    )
    return row


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of one call, which other work on the machine hardly changes."""
    started = time.process_time()
    run()
    return time.process_time() - started


def compare(weight: Tensor, hessian: Tensor, columns: Tensor, counts: Sequence[int]) -> dict[str, float]:
    """Worst relative difference to float64 least squares over the levels, and both times."""
    solutions = compensate(weight, hessian, columns, counts)
    worst = 0.0
    for count, (kept, bias) in zip(counts, solutions, strict=True):
        got = torch.cat([kept, bias[:, None]], dim=1)
        exact = least_squares(weight, hessian, columns[:count])
        worst = max(worst, float((got - exact).norm() / exact.norm()))
    once = median_ms(lambda: compensate(weight, hessian, columns, counts))
    each = median_ms(lambda: [solve_level(weight, hessian, columns[:count]) for count in counts])
    return {"worst": worst, "once_ms": once, "each_ms": each}


def least_squares(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The exact minimiser from the rows themselves: any R with R^T R = H stands for the (damped) inputs."""
    inputs = torch.linalg.cholesky(hessian).T
    index = torch.cat([kept, torch.tensor([len(hessian) - 1])])
    return torch.linalg.lstsq(inputs[:, index], inputs @ weight.T).solution.T


def solve_level(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """One level on its own by normal equations."""
    index = torch.cat([kept, torch.tensor([len(hessian) - 1])])
    factor = torch.linalg.cholesky(hessian[index][:, index])
    return torch.cholesky_solve((weight @ hessian[:, index]).T, factor).T


def random_problem(width: int, outputs: int = 192) -> tuple[Tensor, Tensor]:
    """Correlated random inputs with a mean, as real layers have."""
    torch.manual_seed(0)
    rows = torch.randn(4 * width, width // 3, dtype=torch.float64) @ torch.randn(width // 3, width, dtype=torch.float64)
    rows += 0.3 * torch.randn(4 * width, width, dtype=torch.float64) + torch.randn(width, dtype=torch.float64)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    return torch.randn(outputs, width + 1, dtype=torch.float64), damp(rows.T @ rows, 0.01)


def expected_problem(width: int, outputs: int) -> tuple[Tensor, Tensor]:
    """What `random_problem` tends to with endless rows, without making them: for widths where they would not fit."""
    torch.manual_seed(0)
    mixing, mean = torch.randn(width // 3, width, dtype=torch.float64), torch.randn(width + 1, dtype=torch.float64)
    mean[-1] = 1  # the constant-1 input
    hessian = torch.outer(mean, mean)
    hessian[:-1, :-1].addmm_(mixing.T, mixing)
    hessian.diagonal()[:-1] += 0.09
    return torch.randn(outputs, width + 1, dtype=torch.float64), damp(hessian, 0.01)


def median_ms(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
