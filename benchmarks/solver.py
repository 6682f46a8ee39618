"""Compensated consumers against exact least squares, and one Cholesky for all levels against one solve a level."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common import Subject, write_results
from stageprune.core.pruning.compensate import compensate, damp, with_bias


def main() -> None:
    """Run both parts and write `results/solver.json`."""
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
