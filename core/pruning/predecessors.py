"""Asymmetric compensation: consumers for what a level's own predecessors deliver, not for what the dense ones do.

`compensate` fits a consumer to its dense inputs X, as if all before it were dense. Here a level runs beside the dense
denoiser on the same noisy latents, and its consumers are fitted to give the dense consumer's output from their own
inputs Y (k kept columns and the constant 1):

    min |W X - W_k Y_k|^2 + d |W_k - W[:, k]|^2   at   W_k = (W X Y_k^T + d W[:, k]) (Y_k Y_k^T + d)^-1

With Y = X that is `compensate`. As GPTAQ does for quantisation (arXiv 2504.02692, section 3). With packages of layers,
each sees what the packages before it have become.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import progress
from ..calibration import Calibration, step_weights
from ..calibration.hessian import design_rows
from ..calibration.packages import device_for, packages
from ..eager import eager
from ..errors import BankError, CalibrationError
from ..groups import Group, consumer_sites, input_sites
from ..groups.layer import inputs_of, layer_at, matrix_columns, matrix_of, taps_of
from ..host import Host, Prompt
from .bank import Consumer, ConsumerKey
from .compensate import DAMPING_RETRIES, finite, with_bias
from .methods import Method
from .replay import replaced
from .solver import Solver, nested_columns

Predecessors = Literal["dense", "pruned"]


@dataclass(frozen=True)
class Trajectories:
    """Dense trajectories along which a level runs beside the dense denoiser.

    Args:
        prompts: one a trajectory.
        seed: of the first; each has the next one.
        steps: sampling steps.
        guidance: guidance scale.
        weights: of the steps.
        batch_size: that run together.
    """

    prompts: Sequence[Prompt]
    seed: int
    steps: int
    guidance: float
    weights: Sequence[float]
    batch_size: int = 16


def trajectories_of(host: Host, calibration: Calibration, prompts: int) -> Trajectories:
    """Those of a calibration's first prompts, with its weights of steps."""
    made = calibration.provenance
    taus = host.taus(made["steps"])
    weights = made.get("alpha_weights") or step_weights(made["alpha"], taus)
    return Trajectories(made["prompts"][:prompts], made["seed"], made["steps"], made["guidance"], weights)


def check_predecessors(
    predecessors: Predecessors,
    prompts: int,
    budget: float | None,
    host: Host,
    groups: Sequence[Group],
    method: Method,
) -> list[list[str]]:
    """Consumers in packages, in the order in which they are compensated for pruned predecessors; none for dense ones.

    Raises:
        BankError: an argument is out of range, or the method does not compensate.
        CalibrationError: the budget is too small for a single layer.
    """
    if predecessors not in ("dense", "pruned"):
        raise BankError(f"`predecessors` must be 'dense' or 'pruned', got {predecessors!r}.")
    if prompts < 1:
        raise BankError(f"`predecessor_prompts` must be at least 1, got {prompts}.")
    if predecessors == "dense":
        return []
    if not method.compensates:
        raise BankError("`predecessors` 'pruned' is about compensation; this method does not compensate.")
    called = input_sites(host.denoiser, [*consumer_sites(groups)], host.input_size)  # in the order of the forward
    widths = {path: matrix_of(layer_at(host.denoiser, path)).shape[1] for path in called}
    return packages(widths, 2, budget)  # two sums a layer


class PairedMoments:
    """Sums Y Y^T and X Y^T of some layers while the denoiser runs: X their inputs in the dense denoiser, Y those when
    the very same call is made with other consumers. The constant-1 input comes last, as in `HessianRecorder`.

    Args:
        denoiser: the dense denoiser.
        paths: of the layers.
    """

    def __init__(self, denoiser: nn.Module, paths: Sequence[str]) -> None:
        self.denoiser = denoiser
        widths = {path: matrix_of(layer_at(denoiser, path)).shape[1] for path in paths}
        near = device_for(paths, widths, 2, next(denoiser.parameters()).device)
        self.own = {path: torch.zeros(width + 1, width + 1, device=near) for path, width in widths.items()}
        self.cross = {path: torch.zeros_like(table) for path, table in self.own.items()}
        self.weight = 1.0
        self._dense: dict[str, list[Tensor]] = {path: [] for path in paths}
        self._again = False

    @contextmanager
    def recording(self, consumers: Mapping[str, Consumer]) -> Iterator[None]:
        """Make every call of the denoiser within the block a second time, with `consumers`, and record both."""

        def repeat(denoiser: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            if self._again:
                return
            self._again = True
            try:
                with replaced(denoiser, consumers):
                    denoiser(*args, **kwargs)
            finally:
                self._again = False

        hooks = [self.denoiser.register_forward_hook(repeat, with_kwargs=True)]
        for path in self.own:
            layer = layer_at(self.denoiser, path)
            hooks.append(layer.register_forward_pre_hook(lambda _, args, path=path: self._see(path, args[0])))
        try:
            with eager():  # compiled graphs would not call these hooks
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for seen in self._dense.values():
                seen.clear()

    def _see(self, path: str, inputs: Tensor) -> None:
        if not self._again:
            self._dense[path].append(inputs.detach())
            return
        layer = layer_at(self.denoiser, path)
        dense = self._dense[path].pop(0)
        for before, after in zip(design_rows(layer, dense), design_rows(layer, inputs.detach()), strict=True):
            x, y = (torch.cat([rows.float(), rows.new_ones(len(rows), 1).float()], 1) for rows in (before, after))
            self.own[path].add_((y.T @ y).to(self.own[path].device), alpha=self.weight)
            self.cross[path].add_((x.T @ y).to(self.cross[path].device), alpha=self.weight)


def compensate_paired(
    weight: Tensor, own: Tensor, cross: Tensor, columns: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The consumer that best gives the dense output W X from the kept columns of Y.

    Args:
        weight: (out, d + 1), the last column the bias (see `with_bias`).
        own: Y Y^T, (d + 1, d + 1).
        cross: X Y^T, (d + 1, d + 1).
        columns: the kept ones, in the order that the result has.
        damping: relative to the mean of the kept columns' diagonal; raised tenfold, up to three times, if need be.

    Returns:
        Weight (out, kept) and bias (out,), float64.

    Raises:
        CalibrationError: the moments are not finite, or stay indefinite.
    """
    own, cross = finite(own), finite(cross)
    kept = torch.cat([columns, columns.new_tensor([len(own) - 1])])
    moment = own[kept][:, kept]
    ridge = own.diagonal()[:-1].mean() * damping * torch.ones(len(kept), dtype=own.dtype, device=own.device)
    ridge[-1] = 0  # the constant-1 input is not damped, as in `damp`
    for factor in DAMPING_RETRIES:
        root, problem = torch.linalg.cholesky_ex(moment + torch.diag(ridge * factor))
        if int(problem) == 0:
            break
    else:
        raise CalibrationError(
            f"the inputs of a pruned layer ({len(columns)} columns) have no Cholesky factor even with damping "
            f"{damping * DAMPING_RETRIES[-1]:g}: give more `predecessor_prompts`, or a larger `damping`."
        )
    wanted = weight @ cross[:, kept] + weight[:, kept] * ridge * factor
    solved = torch.cholesky_solve(wanted.T, root).T
    return solved[:, :-1].contiguous(), solved[:, -1].contiguous()


def compensate_for_predecessors(
    host: Host,
    solver: Solver,
    orders: Mapping[str, Tensor],
    counts: Mapping[str, tuple[int, ...]],
    consumers: Mapping[ConsumerKey, Consumer],
    packages: Sequence[Sequence[str]],
    trajectories: Trajectories,
) -> dict[ConsumerKey, Consumer]:
    """Fit the consumers of every level anew, package after package, to what their predecessors at that level deliver.

    Args:
        host: the pipeline, dense.
        solver: groups, damping.
        orders: group name -> its order, shared by all stages.
        counts: group name -> kept units at each level.
        consumers: of every level, compensated for dense inputs: what the levels run with until they are fitted.
        packages: consumers' paths, in the order in which they are fitted; each package takes one run a level.
        trajectories: to run.
    """
    sites = consumer_sites(solver.groups)
    levels = len(next(iter(counts.values())))
    fitted = dict(consumers)
    work = [(level, package) for level in range(1, levels) for package in packages]
    for level, package in progress.track(work, "compensating for predecessors"):
        wide = solver.widened_level(orders, counts, fitted, level)
        moments = _run(host, package, wide, trajectories)
        for path in package:
            layer = layer_at(host.denoiser, path)
            order, places = nested_columns(sites[path], orders, counts, inputs_of(layer))
            columns = matrix_columns(order[places[level]], taps_of(layer)).to(layer.weight.device)
            own, cross = (table[path].to(layer.weight.device) for table in (moments.own, moments.cross))
            dense = with_bias(matrix_of(layer), layer.bias)
            weight, bias = compensate_paired(dense, own, cross, columns, solver.damping)
            shaped = weight.to(layer.weight.dtype).view(len(weight), -1, *layer.weight.shape[2:])
            fitted[ConsumerKey(path, level, 0)] = Consumer(shaped.contiguous(), bias.to(layer.weight.dtype))
    return fitted


def _run(
    host: Host, package: Sequence[str], consumers: Mapping[str, Consumer], trajectories: Trajectories
) -> PairedMoments:
    moments = PairedMoments(host.denoiser, package)
    prompts, seed, guidance = trajectories.prompts, trajectories.seed, trajectories.guidance
    for begin in range(0, len(prompts), trajectories.batch_size):
        part = prompts[begin : begin + trajectories.batch_size]
        conditions = host.encode(part)
        state = host.start(range(seed + begin, seed + begin + len(part)), trajectories.steps)
        with moments.recording(consumers):
            for weight in trajectories.weights:
                moments.weight = weight
                state = host.advance(state, conditions, guidance, state.index + 1)
    return moments
