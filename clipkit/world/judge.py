"""Judge of rendered scenes without a network: template matching against the renderer.

An image is segmented into connected parts that differ from its background. Each part is compared with a rendering of
every shape, in the best-fitting colours, place and size. A part without sufficient overlap is no object. Large images
are downscaled first, so that the cost does not depend on their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit.data.drawings import BACKGROUNDS, COLOURS
from clipkit.errors import UsageError
from clipkit.world.render import PIXELS, SUPERSAMPLE, paint
from clipkit.world.scene import SHAPES, STYLES, Fact, Object, related

OVERLAP, AMBIGUITY = 0.65, 0.8
"""A part is an object if its overlap with a shape is at least OVERLAP, and (1 - overlap) is less than AMBIGUITY times
that of the next best shape. Renderings have overlaps of 0.83 to 1 and ratios of at most 0.5; blurred by an eighth of
the side, ratios of 0.86 and more."""

_SIDE = 32  # images are downscaled to this
_SEEN = 40.0  # distance from the background, in RGB, from which a pixel belongs to a part
_SMALLEST = 0.12  # of the side: smaller parts are specks

Pixels = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """An object found in a picture.

    overlap: in [0, 1], with the rendering of it. runner_up: that of the next best shape.
    """

    object: Object
    overlap: float
    runner_up: float = 0.0

    @property
    def certain(self) -> bool:
        """Whether it overlaps enough, and clearly more than any other shape."""
        return self.overlap >= OVERLAP and 1 - self.overlap < AMBIGUITY * (1 - self.runner_up)


def background_of(picture: Image.Image, style: str = "flat") -> str:
    """The background's name, by the median of the outermost pixels; "" for an unknown one."""
    name, _ = _background(_pixels(picture, style))
    return name


def find(picture: Image.Image, style: str = "flat") -> list[Found]:
    """Objects in a picture of a style, from left to right. Raises UsageError for an unknown style."""
    if style not in STYLES:
        raise UsageError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    pixels = _pixels(picture, style)
    name, colour = _background(pixels)
    if not name:
        return []
    found = [_identify(pixels, part, colour, style) for part in _parts(pixels, colour)]
    return sorted((f for f in found if f.certain), key=lambda f: f.object.x)


def check(
    pictures: Image.Image | Sequence[Image.Image], stated: Sequence[Fact], style: str = "flat"
) -> dict[Fact, bool]:
    """Each fact and whether the picture shows it.

    A fact about an object that is not there is false. Counts are of all objects of that shape, unless `stated` has the
    shape in two colours. Directions need frames in the order of time; the other facts are those of the first frame.
    Raises UsageError for a direction with a single picture.
    """
    frames = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    found = find(frames[0], style)
    later = find(frames[-1], style) if len(frames) > 1 else []
    colours = {of: {c for s, c in {o for f in stated for o in f.of} if s == of[0]} for f in stated for of in f.of}

    def matching(of: tuple[str, str], objects: list[Found], coloured: bool) -> list[Object]:
        return [f.object for f in objects if f.object.shape == of[0] and (not coloured or f.object.colour == of[1])]

    def holds(fact: Fact) -> bool:
        if fact.kind == "background":
            return background_of(frames[0], style) == fact.value
        if fact.kind == "style":
            return fact.value in styles_of(frames[0])
        if fact.kind == "direction" and len(frames) == 1:
            raise UsageError(f"{fact}: a direction needs frames of two times; one picture was given")
        coloured = fact.kind == "colour" or any(len(colours[of]) > 1 for of in fact.of)
        groups = [matching(of, found, coloured) for of in fact.of]
        if not all(groups):
            return False
        one = groups[0][0]
        if fact.kind in ("object", "colour"):
            return True
        if fact.kind == "count":
            return len(groups[0]) == int(fact.value)
        if fact.kind == "relation":
            return related(groups[0], groups[1], fact.value, apart=0.0)
        if fact.kind == "direction":
            after = matching(fact.of[0], later, coloured)
            return bool(after) and _direction(one, after[0]) == fact.value
        if fact.kind == "place":
            return fact.value == one.side and max(abs(one.x - 0.5), abs(one.y - 0.5)) > 0.1
        return fact.value == one.size

    return {fact: holds(fact) for fact in stated}


def styles_of(picture: Image.Image) -> set[str]:
    """The style in which the objects of a picture overlap best; small pictures may be of two, none where none is found.

    Pictures of up to 24 pixels cannot tell "flat" from "pixels".
    """
    overlaps = {s: [f.overlap for f in find(picture, s)] for s in STYLES if s != "pixels"}
    best = max(overlaps, key=lambda s: float(np.sum(overlaps[s])) if overlaps[s] else -1.0)
    if not overlaps[best]:
        return set()
    if best != "flat":
        return {best}
    if picture.width <= PIXELS:
        return {"flat", "pixels"}
    blocks = picture.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX)
    again = np.asarray(blocks.resize(picture.size, Image.Resampling.NEAREST), np.float64)
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    ink = np.abs(pixels - np.median(pixels, axis=(0, 1))).sum()
    return {"pixels"} if np.abs(again - pixels).sum() < 0.05 * ink else {"flat"}


def _direction(before: Object, after: Object) -> str:
    dx, dy = after.x - before.x, after.y - before.y
    if max(abs(dx), abs(dy)) < 0.05:
        return ""
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")


def _pixels(picture: Image.Image, style: str) -> Pixels:
    """[side, side, 3] in 0 to 255, not inverted, reduced."""
    side = min(picture.width, PIXELS if style == "pixels" else _SIDE)
    pixels = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float64)
    return 255 - pixels if style == "inverted" else pixels


def _background(pixels: Pixels) -> tuple[str, Pixels]:
    ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    middle = np.median(ring, axis=0)
    far = {name: float(np.linalg.norm(middle - colour)) for name, colour in BACKGROUNDS.items()}
    name = min(far, key=lambda n: far[n])
    return (name, np.array(BACKGROUNDS[name], np.float64)) if far[name] < _SEEN else ("", middle)


def _parts(pixels: Pixels, background: Pixels) -> Iterator[Bools]:
    """Masks [side, side] of connected parts that differ from the background, without specks."""
    seen = np.linalg.norm(pixels - background, axis=2) > _SEEN
    side = len(seen)
    near = _grown(seen, max(1, round(side / 24)))
    left = near.copy()
    while left.any():
        part = np.zeros_like(left)
        part.flat[int(left.argmax())] = True
        while True:
            more = _grown(part, 1) & left
            if (more == part).all():
                break
            part = more
        left &= ~part
        inside = part & seen
        rows, columns = (np.flatnonzero(inside.any(axis=a)) for a in (1, 0))
        if len(rows) and max(np.ptp(rows), np.ptp(columns)) + 1 >= _SMALLEST * side:
            yield inside


def _grown(mask: Bools, by: int) -> Bools:
    """A mask and its neighbours, diagonal ones too."""
    padded = np.pad(mask, by)
    n = len(mask)
    shifts = range(2 * by + 1)
    grown: Bools = np.any([padded[i : i + n, j : j + n] for i in shifts for j in shifts], axis=0)
    return grown


def _identify(pixels: Pixels, part: Bools, background: Pixels, style: str) -> Found:
    """The object that a part looks most like."""
    side, pad = len(pixels), max(1, round(len(pixels) / 24))
    rows, columns = (np.flatnonzero(part.any(axis=a)) for a in (1, 0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    # Work on a square around the part, padded with background.
    window = int(max(box[2] - box[0], box[3] - box[1])) + 4 * pad
    corner = np.array([box[0] + box[2] - window, box[1] + box[3] - window]) // 2
    alone = np.where(_grown(part, pad)[..., None], pixels, background)
    seen = np.full((window, window, 3), background)
    into, of = [], []
    for start in (int(corner[1]), int(corner[0])):
        low, high = max(0, start), min(side, start + window)
        into.append(slice(low - start, high - start))
        of.append(slice(low, high))
    seen[into[0], into[1]] = alone[of[0], of[1]]
    inner = box - np.tile(corner, 2)
    fits = []
    for colour in _likely_colours(pixels[part], background):
        for shape in SHAPES:
            # Small images lose faint parts: the visible extent may be smaller.
            for extent in {_extent(shape, colour, tuple(background), least) for least in (_SEEN, 2 * _SEEN)}:
                guess = _fitted(shape, colour, inner, window, extent)
                fits.append(Found(guess, _overlap(guess, seen, background, style)))
    fits.sort(key=lambda f: (-f.overlap, f.object.shape))
    refined: dict[str, Found] = {}
    for fit in fits:
        again = _refined(fit, seen, background, style)
        shape = fit.object.shape
        refined[shape] = max(refined.get(shape, again), again, key=lambda f: f.overlap)
        if len(refined) == 3:
            break
    best, second = sorted(refined.values(), key=lambda f: -f.overlap)[:2]
    o = best.object
    x, y = ((v * window + c) / side for v, c in ((o.x, corner[0]), (o.y, corner[1])))
    return Found(Object(o.shape, o.colour, float(x), float(y), o.radius * window / side), best.overlap, second.overlap)


def _fitted(
    shape: str, colour: str, box: npt.NDArray[np.int_], side: int, extent: tuple[float, float, float, float]
) -> Object:
    """A shape sized and placed so that its visible `extent` fills a box (left, top, right, bottom)."""
    left, top, right, bottom = extent
    radius = ((box[2] - box[0]) / (right - left) + (box[3] - box[1]) / (bottom - top)) / 2
    x, y = (box[0] + box[2] - radius * (left + right)) / 2, (box[1] + box[3] - radius * (top + bottom)) / 2
    return Object(shape, colour, float(x / side), float(y / side), float(radius / side))


def _likely_colours(inside: Pixels, background: Pixels) -> list[str]:
    """The two colours that most of the pixels [n, 3] are mixed of with the background."""
    votes = {}
    for name, colour in COLOURS.items():
        way = np.array(colour) - background
        share = np.clip((inside - background) @ way / (way @ way), 0, 1)
        rest = np.linalg.norm(inside - background - share[:, None] * way, axis=1)
        votes[name] = float((share * np.exp(-((rest / 30) ** 2))).sum())
    return sorted(votes, key=lambda n: -votes[n])[:2]


def _refined(start: Found, pixels: Pixels, background: Pixels, style: str) -> Found:
    """The best place and size near a guess, by coordinate descent."""
    best, side = start, len(pixels)
    for step in (1.0, 0.5, 0.25):
        improved = True
        while improved:
            improved = False
            o = best.object
            d, grow = step / side, 1 + 0.06 * step
            for x, y, r in ((-d, 0, 1), (d, 0, 1), (0, -d, 1), (0, d, 1), (0, 0, grow), (0, 0, 1 / grow)):
                moved = Object(o.shape, o.colour, o.x + x, o.y + y, o.radius * r)
                overlap = _overlap(moved, pixels, background, style)
                if overlap > best.overlap + 1e-4:
                    best, improved = Found(moved, overlap), True
    return best


def _overlap(guess: Object, pixels: Pixels, background: Pixels, style: str) -> float:
    """1 - |P - T| / (|P - B| + |T - B|): picture P, template T, background B, sums of absolute differences.

    1 for equal images, 0 for disjoint ones: the Dice coefficient of masks, with colours.
    """
    if guess.radius * len(pixels) < 1 or guess.radius > 0.75:
        return 0.0
    template = _template(guess, len(pixels), background, style)
    both = np.abs(pixels - background).sum() + np.abs(template - background).sum()
    return float(1 - np.abs(pixels - template).sum() / both) if both else 0.0


def _template(guess: Object, side: int, background: Sequence[float] | Pixels, style: str) -> Pixels:
    """The renderer's picture of one object, [side, side, 3]."""
    shade = tuple(int(v) for v in background)
    canvas = Image.new("RGB", (side * SUPERSAMPLE,) * 2, (shade[0], shade[1], shade[2]))
    paint(guess, style, canvas)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float64)


@cache
def _extent(shape: str, colour: str, background: tuple[float, ...], least: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of pixels that differ from the background by `least`, in radii from a shape's centre."""
    side, radius = 96, 40
    pixels = _template(Object(shape, colour, 0.5, 0.5, radius / side), side, background, "flat")
    seen = np.linalg.norm(pixels - background, axis=2) > least
    rows, columns = (np.flatnonzero(seen.any(axis=a)) for a in (1, 0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return tuple(float(v - side / 2) / radius for v in (left, top, right, bottom))  # type: ignore[return-value]
