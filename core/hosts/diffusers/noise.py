"""Signal and noise of diffusers' schedulers: what the denoiser's input is made of at a tau."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import StagePruneError
from ...host import NoiseLevel


def noise_levels(scheduler: Any, taus: Sequence[float]) -> list[NoiseLevel]:
    """Signal and noise at each tau.

    Args:
        scheduler: a diffusers scheduler. Whether its timesteps are set does not matter.
        taus: noise levels; those beyond the last training timestep count as that.

    Raises:
        StagePruneError: the scheduler neither has a table of alpha_bar nor matches flows.
    """
    if is_flow_matching(scheduler):
        clipped = [min(max(tau, 0.0), 1.0) for tau in taus]
        return [NoiseLevel(1 - tau, tau) for tau in clipped]
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise StagePruneError(
            f"the noise schedule of {type(scheduler).__name__} is not known: it has no `alphas_cumprod`, and is no "
            "flow-matching scheduler. Give the pipeline a scheduler that has one, or name the boundaries of the stages."
        )
    times = torch.tensor(list(taus), dtype=torch.float64) * scheduler.config.num_train_timesteps
    alphas = _at(table.double().cpu(), times)
    return [NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5) for alpha in alphas.tolist()]


def target(scheduler: Any, samples: Tensor, noise: Tensor, tau: float) -> Tensor:
    """What a denoiser is trained to give, by the scheduler's `prediction_type`; for flow matching the velocity.

    Raises:
        StagePruneError: the type is not known.
    """
    if is_flow_matching(scheduler):
        return noise - samples
    kind, level = scheduler.config.prediction_type, noise_levels(scheduler, [tau])[0]
    targets = {"epsilon": noise, "sample": samples, "v_prediction": level.signal * noise - level.noise * samples}
    if kind not in targets:
        raise StagePruneError(f"the scheduler's `prediction_type` must be one of {', '.join(targets)}, got {kind!r}.")
    return targets[kind]


def is_flow_matching(scheduler: Any) -> bool:
    """Whether x_t = (1 - tau) x_0 + tau eps. Some schedulers can be configured either way."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def _at(table: Tensor, times: Tensor) -> Tensor:
    """alpha_bar at timesteps that need not be whole.

    Between two of them log(noise / signal) is linear, as in the schedulers that work on sigmas (Karras et al.,
    arXiv 2206.00364); beside a zero terminal SNR, where that is infinite, alpha_bar is.
    """
    times = (times * 1e6).round() / 1e6  # tau is a timestep over their number: 290 must not become 289.99999999999994
    times = times.clamp(0, len(table) - 1)
    low, part = times.floor().long(), times.frac()
    below, above = table[low], table[(low + 1).clamp(max=len(table) - 1)]
    logits = torch.lerp(torch.logit(below), torch.logit(above), part)
    plain = torch.lerp(below, above, part)
    return torch.where((part == 0) | (above <= 0) | (below >= 1), plain, torch.sigmoid(logits))
