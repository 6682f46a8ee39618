"""A module whose class stage pruning has swapped, until it is swapped back."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..errors import StagePruneError
from ..groups.hooked import ALLOWED, HOOKS


class Swapped(nn.Module):
    """What staged layers and skippable blocks have in common: nobody may wrap their forward.

    A wrapped forward is kept in the instance and would outlive the swap; and accelerate takes an offloaded layer's
    weights from the state dictionary, which shows the dense ones in their dense order. So hooks are refused when they
    are set, before they have moved a weight.
    """

    stage_base: ClassVar[type[nn.Module]]  # what it was
    stage_path = ""  # where it is in its denoiser

    def __setattr__(self, name: str, value: Any) -> None:
        if name in HOOKS:
            raise StagePruneError(
                f"`{self.stage_path}` runs the levels of stage pruning, so it cannot be offloaded or hooked by itself; "
                f"`{name}` was not set on it. {ALLOWED} Remove what other modules were given already with "
                f"{HOOKS[name]}; to offload layer by layer call disable_stage_pruning() first."
            )
        super().__setattr__(name, value)

    def swap_back(self) -> None:
        """Become what this was; the subclass has removed what it added."""
        self.__dict__.pop("stage_path", None)
        self.__class__ = self.stage_base  # type: ignore[assignment]


def swap_class(module: nn.Module, swapped: type[nn.Module]) -> None:
    """Give `module` a class that runs levels. The old class's forward may linger in the instance from removed hooks."""
    module.__dict__.pop("forward", None)
    module.__class__ = swapped  # type: ignore[assignment]
