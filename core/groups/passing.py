"""What a removed block returns: some of its arguments, as they came."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Place = tuple[str, int]
"""Name of an argument, and its position among those that may be given by position (without `self`)."""


def places_of(forward: Callable[..., Any], names: Sequence[str]) -> tuple[Place, ...]:
    """Where a bound forward takes these arguments; without names, its first one.

    Example:
        >>> places_of(block.forward, ("encoder_hidden_states", "hidden_states"))
        (('encoder_hidden_states', 1), ('hidden_states', 0))
    """
    parameters = list(inspect.signature(forward).parameters)
    return tuple((name, parameters.index(name)) for name in names or parameters[:1])


def passed(places: Sequence[Place], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The arguments at these places: one as it is, several as a tuple."""
    values = tuple([kwargs[name] if name in kwargs else args[position] for name, position in places])
    return values if len(values) > 1 else values[0]
