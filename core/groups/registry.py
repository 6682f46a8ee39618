"""The families that can be pruned. A family is found by the class name of the denoiser, so no host is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torch import nn

from ..errors import GroupError
from ..host import InputSize
from .group import Group, check_groups
from .hooked import refuse_hooked_layers


class Family(Protocol):
    """What a family adapter declares about its denoisers. Add one file in `families/` and decorate the class."""

    name: str
    denoisers: tuple[str, ...]

    def groups(self, denoiser: nn.Module) -> list[Group]:
        """All groups: heads and neurons block by block, whole blocks last."""

    def tokens(self, denoiser: nn.Module, size: InputSize | None = None) -> Mapping[str, int]:
        """Tokens per stream in a call of `size`; the model's own size by default, or that of its pipeline."""

    def example_inputs(
        self, denoiser: nn.Module, batch: int = 1, seed: int = 0, size: InputSize | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of one forward on random input, on the denoiser's device and in its dtype.

        They have as many tokens as `tokens` says for the same `size`. Models of one size refuse others with GroupError.
        """


_FAMILIES: dict[str, Family] = {}

F = TypeVar("F")


def register_family(cls: type[F]) -> type[F]:
    """Class decorator: make the family known under each denoiser class name that it lists."""
    family: Any = cls()
    for denoiser in family.denoisers:
        _FAMILIES[denoiser] = family
    return cls


def families() -> dict[str, str]:
    """Denoiser class name -> family name, for messages and `stageprune env`."""
    return {denoiser: family.name for denoiser, family in sorted(_FAMILIES.items())}


def family_of(denoiser: nn.Module) -> Family:
    """The family of `denoiser`, searched along its class's bases. GroupError if it is not supported."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    raise GroupError(
        f"no family is registered for {type(denoiser).__name__}; supported denoisers: {', '.join(families())}. "
        "Register your own with stageprune.register_family."
    )


def find_groups(denoiser: nn.Module) -> list[Group]:
    """Groups of `denoiser` as its family declares them, checked against the modules' shapes.

    Layers that are offloaded one by one are refused: whoever asks for the groups will read or swap their weights.

    Example:
        >>> for group in find_groups(pipe.transformer):
        ...     print(group)
    """
    groups = family_of(denoiser).groups(denoiser)
    check_groups(denoiser, groups)
    refuse_hooked_layers(denoiser, groups)
    return groups
