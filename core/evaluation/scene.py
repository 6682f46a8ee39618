"""The language of the shapes demos: what a caption asks for, so that a picture can be checked against it.

    a small red circle above a large blue square
    a yellow cross

One or two objects, each with a colour, a shape and maybe a size; two objects with the relation of the first to the
second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from ..errors import StagePruneError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "white")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")

_THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?")


@dataclass(frozen=True)
class Thing:
    """One object; `size` None leaves it open."""

    shape: str
    colour: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """One or two objects; `relation` says where the first stands seen from the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @classmethod
    def parse(cls, caption: str) -> Self:
        """The scene that a caption asks for.

        Raises:
            StagePruneError: the caption is not of this language.

        Example:
            >>> Scene.parse("a small red circle above a blue square").relation
            'above'
        """
        match = _CAPTION.fullmatch(caption.strip().lower())
        if match is None:
            raise StagePruneError(
                f"caption {caption!r} cannot be checked: write 'a [size] colour shape', or two of them with a relation "
                f"between. Sizes: {', '.join(SIZES)}; colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
                f"relations: {', '.join(RELATIONS)}."
            )
        size, colour, shape, relation, other_size, other_colour, other_shape = match.groups()
        first = Thing(shape, colour, size)
        return cls((first,) if relation is None else (first, Thing(other_shape, other_colour, other_size)), relation)

    def __str__(self) -> str:
        return f" {self.relation} ".join(str(thing) for thing in self.things)
