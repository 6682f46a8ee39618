"""Counting what others run."""

from __future__ import annotations

from typing import Any, cast

from ...host import Conditions, Host, SamplerState


class MeteredHost:
    """A host that counts denoiser steps: calls, times the probes of each.

    Args:
        host: what it hands everything on to.
    """

    def __init__(self, host: Host) -> None:
        self.steps = 0
        self._host = host

    @property
    def host(self) -> Host:
        """Itself, as what it stands for."""
        return cast(Host, self)

    def advance(self, state: SamplerState, conditions: Conditions, guidance: float, until: int) -> SamplerState:
        """The host's own, counted."""
        self.steps += (until - state.index) * len(state.latents)
        return self._host.advance(state, conditions, guidance, until)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)
