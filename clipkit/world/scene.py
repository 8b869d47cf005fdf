"""Scenes: one to three objects with shape, colour, size and place on a background, and their checkable facts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clipkit.data.drawings import BACKGROUNDS, OBJECTS, PAIRS, held_out
from clipkit.errors import UsageError, did_you_mean

SHAPES = tuple(OBJECTS)
STYLES = ("flat", "outline", "hatched", "pixels", "inverted")
RELATIONS = ("left of", "above")
"""The two directions that are stored; "right of" and "below" are these with their objects exchanged."""
DIRECTIONS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPLITS = ("train", "val", "heldout", "relations")

APART = 0.15
"""Distance of two centres along an axis, as a share of the side, from which one is left of or above the other."""
_REACH = 1.2  # radii: how far the corners of an object reach
_MARGIN = 0.09  # between two objects: at 24 pixels two pixels, so that they do not touch
_BIG = 0.40
_MOVES = 0.25  # share of the side that a moving object crosses between time 0 and 1

Kind = Literal["object", "colour", "count", "size", "place", "relation", "background", "style", "direction"]


@dataclass(frozen=True)
class Object:
    """One object: its centre (x, y) and radius are shares of the picture's side, y points down.

    `motion` is "" or a key of DIRECTIONS.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    motion: str = ""

    def at(self, time: float) -> Object:
        """The object where it is at `time` in [0, 1]."""
        dx, dy = DIRECTIONS[self.motion] if self.motion else (0, 0)
        return replace(self, x=self.x + _MOVES * time * dx, y=self.y + _MOVES * time * dy)

    @property
    def size(self) -> str:
        """ "big" or "small"."""
        return "big" if self.radius >= _BIG else "small"

    @property
    def place(self) -> str:
        """The side of the image that clearly contains its centre; or ""."""
        dx, dy = self.x - 0.5, self.y - 0.5
        if max(abs(dx), abs(dy)) < 1 / 6 or abs(abs(dx) - abs(dy)) < 0.08:
            return ""
        return self.side

    @property
    def side(self) -> str:
        """Which side of the picture its centre is nearest to: left, right, top or bottom."""
        dx, dy = self.x - 0.5, self.y - 0.5
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `background` is a key of drawings.BACKGROUNDS, `style` one of STYLES."""

    objects: tuple[Object, ...]
    background: str
    style: str = "flat"

    def at(self, time: float) -> Scene:
        """The scene at `time` in [0, 1]."""
        return replace(self, objects=tuple(o.at(time) for o in self.objects))

    @property
    def groups(self) -> list[tuple[Object, ...]]:
        """Objects of the same shape and colour, in the order of their first."""
        found: dict[tuple[str, str], tuple[Object, ...]] = {}
        for o in self.objects:
            found[o.shape, o.colour] = (*found.get((o.shape, o.colour), ()), o)
        return list(found.values())


@dataclass(frozen=True)
class Fact:
    """One checkable fact. `of` names its objects as (shape, colour); it is empty for a fact about the whole image.

    kind and value: object (shape), colour, count (as a number), size (big, small), place (left, right, top, bottom),
    relation (left of, above; of two), background, style, direction.
    """

    kind: Kind
    of: tuple[tuple[str, str], ...]
    value: str

    def __str__(self) -> str:
        subject = " and ".join(f"{colour} {shape}" for shape, colour in self.of)
        return f"{self.kind} of {subject}: {self.value}" if subject else f"{self.kind}: {self.value}"


def related(first: Sequence[Object], second: Sequence[Object], relation: str, apart: float = APART) -> bool:
    """Whether each of `first` is left of (above) each of `second`, by more than `apart` of the side."""
    axis = "x" if relation == "left of" else "y"
    return bool(max(getattr(o, axis) for o in first) + apart < min(getattr(o, axis) for o in second))


def facts(scene: Scene) -> tuple[Fact, ...]:
    """Every fact that holds in a scene, in a fixed order."""
    found = []
    for group in scene.groups:
        one = group[0]
        of = ((one.shape, one.colour),)
        found += [Fact("object", of, one.shape), Fact("colour", of, one.colour), Fact("count", of, str(len(group)))]
        if len(scene.objects) == 1:
            found += [Fact("size", of, one.size)]
            found += [Fact("place", of, one.place)] if one.place else []
        if len({o.motion for o in group}) == 1 and one.motion:
            found.append(Fact("direction", of, one.motion))
    for first, second in itertools.permutations(scene.groups, 2):
        both = tuple((g[0].shape, g[0].colour) for g in (first, second))
        found += [Fact("relation", both, r) for r in RELATIONS if related(first, second, r)]
    return (*found, Fact("background", (), scene.background), Fact("style", (), scene.style))


def relation_held_out(first: str, relation: str, second: str) -> bool:
    """Whether this relation of two shapes is kept from training: one of eight."""
    i, j, r = SHAPES.index(first), SHAPES.index(second), RELATIONS.index(relation)
    return (i + 3 * j + 4 * r) % 8 == 0


def sample(split: str, seed: int, index: int, styles: Sequence[str] = ("flat",), moving: bool = False) -> Scene:
    """Scene `index` of a split, a function of (split, seed, index) and of `styles` it is drawn in.

    "train" and "val" have the (object, colour) pairs and relations that may be trained on; every scene of "heldout" has
    an object of a pair that may not, every scene of "relations" a relation that may not. Half of the scenes have one
    object. Raises UsageError for an unknown split or style.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; {did_you_mean(split, SPLITS)}")
    if unknown := [s for s in styles if s not in STYLES]:
        raise UsageError(f"unknown style {unknown[0]!r}; {did_you_mean(unknown[0], STYLES)}")
    rng = np.random.default_rng([SPLITS.index(split), 2, seed, index])
    while True:
        objects = tuple(_objects(split, rng))
        if objects and _belongs(objects, split):
            break
    if moving:
        objects = tuple(replace(o, motion=list(DIRECTIONS)[rng.integers(4)]) for o in objects)
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(objects, background, styles[int(rng.integers(len(styles)))])


_LAYOUTS: tuple[tuple[int, ...], ...] = ((1,), (1,), (1,), (2,), (3,), (1, 1), (1, 1), (1, 2), (1, 1, 1))
"""How many objects of each (shape, colour); a layout is drawn with equal chances."""


def _objects(split: str, rng: np.random.Generator) -> Iterator[Object]:
    """Objects of a random layout with a minimum distance; yields none if they do not fit."""
    layouts = [x for x in _LAYOUTS if len(x) > 1] if split == "relations" else _LAYOUTS
    layout = layouts[rng.integers(len(layouts))]
    known, unknown = ([p for p in PAIRS if held_out(*p) == kept] for kept in (False, True))
    kinds = [known[i] for i in rng.choice(len(known), len(layout), replace=False)]
    if split == "heldout":
        kinds[0] = unknown[rng.integers(len(unknown))]
    placed: list[tuple[float, float, float]] = []
    for _ in range(sum(layout)):
        spot = _place(sum(layout), placed, rng)
        if spot is None:
            return
        placed.append(spot)
    spots = iter(placed)
    for (shape, colour), count in zip(kinds, layout, strict=True):
        yield from (Object(shape, colour, *next(spots)) for _ in range(count))


def _place(
    total: int, placed: Sequence[tuple[float, float, float]], rng: np.random.Generator
) -> tuple[float, float, float] | None:
    """x, y and radius of one more of `total` objects; None where there is no room."""
    if total == 1:
        radius = float(rng.uniform(*((0.42, 0.45), (0.33, 0.36), (0.19, 0.22))[rng.integers(3)]))
    else:
        radius = float(rng.uniform(0.18, 0.22) if total == 2 else rng.uniform(0.165, 0.19))
    for _ in range(40):
        x, y = (float(v) for v in rng.uniform(radius + 0.02, 1 - radius - 0.02, 2))
        if all(np.hypot(x - a, y - b) >= _REACH * (radius + r) + _MARGIN for a, b, r in placed):
            return x, y, radius
    return None


def _belongs(objects: tuple[Object, ...], split: str) -> bool:
    """Whether a scene of these objects may be in a split, by the relations that hold in it."""
    groups = Scene(objects, "white").groups
    kept = any(
        related(a, b, r) and relation_held_out(a[0].shape, r, b[0].shape)
        for a, b in itertools.permutations(groups, 2)
        for r in RELATIONS
    )
    return kept == (split == "relations") or split == "heldout"
