"""The built-in data set: procedural drawings with captions, which needs no download.

A drawing is one object in one colour on one background, at a random size and place, with captions that state all or
some of these. Some (object, colour) pairs are held out of training, to test composition. Drawing i of a split is a
function of (split, seed, i): the same seed gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from clipkit.errors import UsageError

Point = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 32, 36),
    "orange": (246, 140, 24),
    "yellow": (250, 222, 42),
    "green": (38, 158, 62),
    "blue": (36, 84, 210),
    "purple": (132, 44, 168),
    "pink": (250, 132, 186),
    "brown": (132, 78, 36),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (176, 180, 184),
    "black": (20, 20, 24),
}
TEMPLATES = ("a {}", "a drawing of a {}", "a picture of a {}", "one {}")
"""Prompt templates that fit this world; `pack` stores them with the data as the set's zero-shot templates."""

SIZE = 24
"""Side of a drawing in pixels: small enough that a CPU learns to draw them in minutes."""

_SUPERSAMPLE = 4
_DARK, _LIGHT = (48, 48, 56), (236, 240, 244)


class Pen:
    """Draws in object coordinates: x and y from -1 to 1, y down, scaled and shifted onto the canvas."""

    def __init__(self, image: Image.Image, centre: Point, radius: float, colour: tuple[int, int, int]) -> None:
        self._draw = ImageDraw.Draw(image)
        self._centre, self._radius, self.colour = centre, radius, colour

    def _at(self, points: Sequence[Point]) -> list[Point]:
        (cx, cy), r = self._centre, self._radius
        return [(cx + r * x, cy + r * y) for x, y in points]

    def polygon(self, *points: Point, fill: tuple[int, int, int] | None = None) -> None:
        """Fill a polygon."""
        self._draw.polygon(self._at(points), fill=fill or self.colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: tuple[int, int, int] | None = None) -> None:
        """Fill a rectangle."""
        self._draw.rectangle(self._at([(x0, y0), (x1, y1)]), fill=fill or self.colour)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: tuple[int, int, int] | None = None) -> None:
        """Fill an ellipse."""
        self._draw.ellipse(self._at([(x0, y0), (x1, y1)]), fill=fill or self.colour)

    def pie(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float) -> None:
        """Fill the sector of an ellipse between two angles in degrees."""
        self._draw.pieslice(self._at([(x0, y0), (x1, y1)]), start, end, fill=self.colour)

    def arc(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, width: float) -> None:
        """Draw part of an ellipse's outline; `width` in radii of the object."""
        self._draw.arc(self._at([(x0, y0), (x1, y1)]), start, end, fill=self.colour, width=round(width * self._radius))


def _rocket(p: Pen) -> None:
    p.polygon((0, -1), (0.34, -0.45), (0.34, 0.6), (-0.34, 0.6), (-0.34, -0.45))
    p.polygon((0.34, 0.1), (0.75, 0.8), (0.34, 0.6))
    p.polygon((-0.34, 0.1), (-0.75, 0.8), (-0.34, 0.6))
    p.ellipse(-0.17, -0.35, 0.17, -0.01, _LIGHT)
    p.polygon((-0.22, 0.62), (0.22, 0.62), (0, 1), fill=(255, 176, 32))


def _house(p: Pen) -> None:
    p.polygon((0, -0.95), (1, -0.1), (-1, -0.1))
    p.box(-0.75, -0.1, 0.75, 0.9)
    p.box(-0.18, 0.3, 0.2, 0.9, _DARK)
    p.box(-0.58, 0.1, -0.3, 0.4, _LIGHT)
    p.box(0.32, 0.1, 0.6, 0.4, _LIGHT)


def _tree(p: Pen) -> None:
    p.box(-0.14, 0.3, 0.14, 1, _DARK)
    p.ellipse(-0.8, -0.5, 0.15, 0.45)
    p.ellipse(-0.15, -0.5, 0.8, 0.45)
    p.ellipse(-0.5, -1, 0.5, 0.05)


def _car(p: Pen) -> None:
    p.polygon((-0.55, -0.05), (-0.3, -0.5), (0.35, -0.5), (0.62, -0.05))
    p.box(-1, -0.06, 1, 0.38)
    p.polygon((-0.36, -0.08), (-0.2, -0.38), (0, -0.38), (0, -0.08), fill=_LIGHT)
    p.polygon((0.1, -0.08), (0.1, -0.38), (0.28, -0.38), (0.44, -0.08), fill=_LIGHT)
    p.ellipse(-0.75, 0.15, -0.25, 0.65, _DARK)
    p.ellipse(0.25, 0.15, 0.75, 0.65, _DARK)


def _boat(p: Pen) -> None:
    p.polygon((-1, 0.35), (1, 0.35), (0.6, 0.9), (-0.6, 0.9))
    p.box(-0.05, -0.95, 0.05, 0.35, _DARK)
    p.polygon((0.1, -0.9), (0.85, 0.2), (0.1, 0.2))
    p.polygon((-0.1, -0.6), (-0.65, 0.2), (-0.1, 0.2))


def _fish(p: Pen) -> None:
    p.ellipse(-1, -0.5, 0.55, 0.5)
    p.polygon((0.35, 0), (1, -0.55), (1, 0.55))
    p.ellipse(-0.72, -0.24, -0.46, 0.02, _LIGHT)
    p.ellipse(-0.66, -0.17, -0.54, -0.05, _DARK)


def _bird(p: Pen) -> None:
    p.ellipse(-0.6, -0.3, 0.55, 0.55)
    p.ellipse(-0.85, -0.75, -0.2, -0.1)
    p.polygon((0.4, 0.05), (1, -0.3), (0.9, 0.25))
    p.polygon((-0.82, -0.52), (-1.1, -0.36), (-0.8, -0.28), fill=(255, 176, 32))
    p.ellipse(-0.68, -0.56, -0.5, -0.38, _LIGHT)
    p.box(-0.16, 0.5, -0.06, 0.9, _DARK)
    p.box(0.12, 0.5, 0.22, 0.9, _DARK)


def _cat(p: Pen) -> None:
    p.polygon((-0.8, -0.95), (-0.1, -0.5), (-0.75, 0))
    p.polygon((0.8, -0.95), (0.1, -0.5), (0.75, 0))
    p.ellipse(-0.85, -0.65, 0.85, 0.85)
    p.ellipse(-0.5, -0.2, -0.16, 0.14, _LIGHT)
    p.ellipse(0.16, -0.2, 0.5, 0.14, _LIGHT)
    p.ellipse(-0.38, -0.12, -0.24, 0.1, _DARK)
    p.ellipse(0.24, -0.12, 0.38, 0.1, _DARK)
    p.polygon((-0.14, 0.28), (0.14, 0.28), (0, 0.48), fill=_DARK)


def _flower(p: Pen) -> None:
    p.box(-0.07, 0.1, 0.07, 1, (60, 140, 70))
    for k in range(6):
        x, y = 0.42 * math.cos(k * math.pi / 3), -0.35 + 0.42 * math.sin(k * math.pi / 3)
        p.ellipse(x - 0.27, y - 0.27, x + 0.27, y + 0.27)
    p.ellipse(-0.24, -0.59, 0.24, -0.11, _LIGHT)


def _star(p: Pen) -> None:
    radii = [(1.0 if k % 2 == 0 else 0.42, math.pi * (k / 5 - 0.5)) for k in range(10)]
    p.polygon(*[(r * math.cos(t), r * math.sin(t)) for r, t in radii])


def _heart(p: Pen) -> None:
    p.ellipse(-0.95, -0.8, 0.03, 0.18)
    p.ellipse(-0.03, -0.8, 0.95, 0.18)
    p.polygon((-0.91, -0.1), (0, -0.32), (0.91, -0.1), (0, 0.95))


def _moon(p: Pen) -> None:
    # The crescent is drawn as its outline, so that the background shows through where the moon is not.
    outer = [(math.cos(t), math.sin(t)) for t in np.linspace(-2.2, 2.2, 40) + math.pi]
    inner = [(0.32 + 0.78 * math.cos(t), 0.78 * math.sin(t)) for t in np.linspace(math.pi - 2.0, math.pi + 2.0, 40)]
    p.polygon(*[(float(x) + 0.2, float(y)) for x, y in [*outer, *reversed(inner)]])


def _cup(p: Pen) -> None:
    p.arc(0.25, -0.35, 1, 0.45, -100, 100, 0.18)
    p.polygon((-0.85, -0.6), (0.6, -0.6), (0.45, 0.75), (-0.7, 0.75))
    p.ellipse(-0.85, -0.78, 0.6, -0.42, _LIGHT)


def _key(p: Pen) -> None:
    p.arc(-1, -0.5, -0.02, 0.48, 0, 360, 0.24)
    p.box(-0.06, -0.13, 1, 0.11)
    p.box(0.5, 0.1, 0.66, 0.5)
    p.box(0.82, 0.1, 0.98, 0.6)


def _umbrella(p: Pen) -> None:
    p.box(-0.05, -0.1, 0.05, 0.85, _DARK)
    p.box(-0.05, 0.76, 0.3, 0.86, _DARK)
    p.pie(-1, -0.95, 1, 0.95, 180, 360)


def _mushroom(p: Pen) -> None:
    p.box(-0.24, 0, 0.24, 0.9, _LIGHT)
    p.pie(-0.95, -0.9, 0.95, 0.9, 180, 360)
    p.ellipse(-0.55, -0.5, -0.25, -0.2, _LIGHT)
    p.ellipse(0.1, -0.72, 0.4, -0.42, _LIGHT)
    p.ellipse(0.4, -0.34, 0.66, -0.08, _LIGHT)


OBJECTS: dict[str, Callable[[Pen], None]] = {
    "rocket": _rocket,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "boat": _boat,
    "fish": _fish,
    "bird": _bird,
    "cat": _cat,
    "flower": _flower,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "cup": _cup,
    "key": _key,
    "umbrella": _umbrella,
    "mushroom": _mushroom,
}

ALIASES: dict[str, tuple[str, ...]] = {
    "rocket": ("spaceship", "rocket ship", "spacecraft"),
    "house": ("cottage", "building", "home"),
    "tree": ("leafy tree", "plant", "oak"),
    "car": ("sports car", "automobile", "vehicle"),
    "boat": ("ship", "sailing boat", "vessel"),
    "fish": ("sea creature", "goldfish", "animal"),
    "bird": ("songbird", "winged creature", "animal"),
    "cat": ("kitten", "pet", "animal"),
    "flower": ("blossom", "daisy", "plant"),
    "star": ("five-pointed star", "pentagram", "shape"),
    "heart": ("love heart", "valentine", "shape"),
    "moon": ("crescent", "crescent moon", "half moon"),
    "cup": ("mug", "coffee cup", "teacup"),
    "key": ("door key", "latchkey", "tool"),
    "umbrella": ("parasol", "brolly", "sunshade"),
    "mushroom": ("toadstool", "fungus", "fly agaric"),
}
"""What else people call the objects: synonyms, kinds, and what they are kinds of."""

PAIRS: tuple[tuple[str, str], ...] = tuple((o, c) for o in OBJECTS for c in COLOURS)
"""All (object, colour) pairs; the class of a drawing is the index of its pair."""


def held_out(object_: str, colour: str) -> bool:
    """Whether this pair is kept from training: one colour of each object, each colour twice."""
    return list(OBJECTS).index(object_) % len(COLOURS) == (list(COLOURS).index(colour) * 3) % len(COLOURS)


SPLITS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": tuple(p for p in PAIRS if not held_out(*p)),
    "val": tuple(p for p in PAIRS if not held_out(*p)),
    "heldout": tuple(p for p in PAIRS if held_out(*p)),
}


@dataclass(frozen=True)
class Drawing:
    """One drawing: `image` is RGB, `label` indexes PAIRS, `captions` are all true of the image."""

    image: Image.Image
    captions: tuple[str, ...]
    label: int


def draw(split: str, seed: int, index: int, size: int = SIZE) -> Drawing:
    """Drawing `index` of `split`, `size` pixels square.

    "train" and "val" draw the same pairs differently; "heldout" draws the others.
    Raises UsageError for an unknown split.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown drawings split {split!r}; known: {', '.join(SPLITS)}")
    rng = np.random.default_rng([list(SPLITS).index(split), seed, index])
    object_, colour = SPLITS[split][index % len(SPLITS[split])]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    big = rng.random() < 0.5
    radius = rng.uniform(0.42, 0.45) if big else rng.uniform(0.33, 0.36)
    x, y = rng.uniform(-1, 1, 2) * (0.47 - radius) / 2 + 0.5
    canvas = size * _SUPERSAMPLE
    image = Image.new("RGB", (canvas, canvas), BACKGROUNDS[background])
    OBJECTS[object_](Pen(image, (x * canvas, y * canvas), radius * canvas, COLOURS[colour]))
    image = image.resize((size, size), Image.Resampling.BOX)
    alias = ALIASES[object_][index // len(SPLITS[split]) % len(ALIASES[object_])]
    captions = _captions(object_, alias, colour, background, "big" if big else "small")
    return Drawing(image, captions, PAIRS.index((object_, colour)))


def _captions(object_: str, alias: str, colour: str, background: str, size: str) -> tuple[str, ...]:
    article = "an" if object_ == "umbrella" else "a"
    colour_article = "an" if colour == "orange" else "a"
    return (
        f"{colour_article} {colour} {object_}",
        f"a drawing of {colour_article} {colour} {object_}",
        f"{article} {object_}",
        f"a {size} {colour} {object_} on a {background} background",
        f"a picture of {article} {object_} in {colour}",
        f"{colour_article} {colour} {object_} on {background}",
        f"{colour_article} {colour} {alias}",
    )
