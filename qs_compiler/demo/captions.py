"""The captions of the demo: a closed grammar, small enough to learn in minutes and to check from pixels.

    a SIZE COLOUR SHAPE moves DIRECTION over GROUND PATTERN [with a COLOUR SHAPE [and a COLOUR SHAPE]]

The first object is the main one: the only one with a size and a direction, and always the largest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from ..errors import QuantSparseError

COLOURS = {
    "red": (0.95, 0.12, 0.12),
    "green": (0.12, 0.85, 0.20),
    "blue": (0.20, 0.32, 1.00),
    "yellow": (0.98, 0.90, 0.12),
    "magenta": (0.95, 0.18, 0.90),
    "cyan": (0.10, 0.90, 0.95),
}
"""RGB in [0, 1]. Bright and saturated, which no ground is: that is how pixels of objects are told from the rest."""

SHAPES = ("circle", "square", "triangle", "cross")

SIZES = {"small": (0.125, 0.145), "large": (0.175, 0.20)}
"""Least and greatest radius, as a fraction of the frame's side."""

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Unit vectors (x, y), y downwards as in an image."""

GROUNDS = {
    "grey": (0.28, 0.28, 0.28),
    "brown": (0.33, 0.21, 0.12),
    "navy": (0.10, 0.13, 0.33),
    "olive": (0.26, 0.28, 0.10),
    "purple": (0.25, 0.12, 0.32),
    "teal": (0.07, 0.28, 0.30),
}

PATTERNS = ("waves", "stripes", "checks", "dots")

MAX_EXTRAS = 2


class CaptionError(QuantSparseError):
    """A caption that the demo's model was not trained to understand."""


@dataclasses.dataclass(frozen=True)
class Caption:
    """One caption, taken apart. `str()` gives the sentence, `Caption.parse` the way back.

    `extras` holds up to MAX_EXTRAS further objects as (colour, shape).
    """

    size: str
    colour: str
    shape: str
    direction: str
    ground: str
    pattern: str
    extras: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        others = " and ".join(f"a {colour} {shape}" for colour, shape in self.extras)
        return f"a {self.size} {self.colour} {self.shape} moves {self.direction} over {self.ground} {self.pattern}" + (
            f" with {others}" if others else ""
        )

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Read a sentence of the grammar. Raises CaptionError with the grammar and its words."""
        match = _SENTENCE.fullmatch(" ".join(text.lower().split()))
        if match is None:
            raise CaptionError(f"the demo cannot read {text!r}.\n{grammar()}")
        extras = tuple(
            (match[f"colour{i}"], match[f"shape{i}"]) for i in range(1, MAX_EXTRAS + 1) if match[f"colour{i}"]
        )
        names = ("size", "colour", "shape", "direction", "ground", "pattern")
        return cls(*(match[name] for name in names), extras)

    @property
    def held_out(self) -> bool:
        """True for a (colour, shape, direction) of the main object that training never shows, one in six."""
        return is_held_out(
            tuple(COLOURS).index(self.colour), SHAPES.index(self.shape), tuple(DIRECTIONS).index(self.direction)
        )


def is_held_out(colour: int, shape: int, direction: int) -> bool:
    """The split by index: a Latin square, so every colour, shape and direction is seen in other company."""
    return (colour + shape + 2 * direction) % len(COLOURS) == 0


def grammar() -> str:
    """The caption grammar and its words, to show to a user."""
    sizes, colours, shapes = "|".join(SIZES), "|".join(COLOURS), "|".join(SHAPES)
    return (
        f"A caption reads: a {sizes} COLOUR SHAPE moves {'|'.join(DIRECTIONS)} over {'|'.join(GROUNDS)} "
        f"{'|'.join(PATTERNS)} [with a COLOUR SHAPE [and a COLOUR SHAPE]]\n"
        f"COLOUR: {colours}; SHAPE: {shapes}. For instance: {EXAMPLE}"
    )


def _one_of(name: str, words: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


def _extra(i: int) -> str:
    return f"a {_one_of(f'colour{i}', COLOURS)} {_one_of(f'shape{i}', SHAPES)}"


_SENTENCE = re.compile(
    f"a {_one_of('size', SIZES)} {_one_of('colour', COLOURS)} {_one_of('shape', SHAPES)} "
    f"moves {_one_of('direction', DIRECTIONS)} over {_one_of('ground', GROUNDS)} {_one_of('pattern', PATTERNS)}"
    f"(?: with {_extra(1)}(?: and {_extra(2)})?)?"
)

EXAMPLE = Caption("large", "red", "circle", "right", "navy", "waves", (("yellow", "square"),))
