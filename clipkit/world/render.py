"""Renderer: scene -> image at any size, with exact masks, edges and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipkit.data.drawings import BACKGROUNDS, COLOURS, OBJECTS, Pen
from clipkit.errors import UsageError
from clipkit.world.scene import Object, Scene

SMALLEST, LARGEST = 8, 1024
PIXELS = 24
"""Blocks along a side in the style "pixels"."""

SUPERSAMPLE = 4
_KEY = (1, 2, 3)  # a colour of no object, for unpainted pixels

Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rendered:
    """A picture of `size` pixels and its truth.

    masks: float32 [objects, size, size], the share of each pixel that an object covers, in the scene's order. edges:
    float32 [size, size], 1 on the outlines of objects and of their parts. boxes: (left, top, right, bottom) of each
    object in pixels.
    """

    image: Image.Image
    masks: npt.NDArray[np.float32]
    edges: npt.NDArray[np.float32]
    boxes: tuple[tuple[float, float, float, float], ...]


def render(scene: Scene, size: int, time: float = 0.0) -> Rendered:
    """The scene at `time` in [0, 1], `size` pixels square. Raises UsageError for a size beyond 8 to 1024."""
    check_size(size)
    scene = scene.at(time)
    side = size * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    masks, boxes, edges = [], [], np.zeros((side, side), bool)
    for thing in scene.objects:
        paint(thing, scene.style, canvas)
        colours = _layer(thing, side)
        covered = (colours != _KEY).any(axis=2)
        edges |= _outlines(colours, SUPERSAMPLE)
        masks.append(_share(covered, size))
        boxes.append(_box(covered))
    image = canvas.resize((size, size), Image.Resampling.BOX)
    if scene.style == "pixels" and size > PIXELS:
        blocks = image.resize((PIXELS, PIXELS), Image.Resampling.BOX)
        image = blocks.resize((size, size), Image.Resampling.NEAREST)
    if scene.style == "inverted":
        image = Image.fromarray(255 - np.asarray(image))
    return Rendered(image, np.stack(masks), _share(edges, size), tuple(boxes))


def check_size(size: int) -> None:
    """Raises UsageError for a size at which no scene is drawn."""
    if not SMALLEST <= size <= LARGEST:
        raise UsageError(f"a scene is drawn at {SMALLEST} to {LARGEST} pixels; {size} were asked for")


def paint(thing: Object, style: str, canvas: Image.Image) -> None:
    """Draw one object on a square canvas, which is SUPERSAMPLE times as large as the picture will be."""
    side, colour = canvas.width, COLOURS[thing.colour]
    if style not in ("outline", "hatched"):
        _draw(thing, canvas)
        return
    colours = _layer(thing, side)
    outline = _outlines(colours, max(SUPERSAMPLE, round(0.09 * thing.radius * side)))
    shown = outline
    if style == "hatched":
        body = (colours == colour).all(axis=2)
        y, x = np.indices((side, side))
        start = round((thing.x + thing.y) * side)  # stripes move with the object
        stripe = max(SUPERSAMPLE, round(0.16 * thing.radius * side))
        gaps = body & ((x + y - start) // stripe % 2 == 1) & ~outline
        shown = (colours != _KEY).any(axis=2) & ~gaps
    colours[outline] = colour
    canvas.paste(Image.fromarray(colours), mask=Image.fromarray(shown))


def _draw(thing: Object, canvas: Image.Image) -> None:
    side = canvas.width
    OBJECTS[thing.shape](Pen(canvas, (thing.x * side, thing.y * side), thing.radius * side, COLOURS[thing.colour]))


def _layer(thing: Object, side: int) -> Bytes:
    """One object alone, [side, side, 3]; _KEY where it is not."""
    layer = Image.new("RGB", (side, side), _KEY)
    _draw(thing, layer)
    return np.array(layer)


def _outlines(colours: Bytes, width: int) -> Bools:
    """Pixels of an object with a pixel of another part (or none) within `width` along an axis."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), 2, 0)
    low = high = red << 16 | green << 8 | blue
    for axis in (0, 1):
        low, high = _window(low, width, axis, np.minimum), _window(high, width, axis, np.maximum)
    found: Bools = (colours != _KEY).any(axis=2) & (low != high)
    return found


def _window(values: npt.NDArray[np.int32], width: int, axis: int, smaller: np.ufunc) -> npt.NDArray[np.int32]:
    """Running minimum (maximum) over `width` to both sides along an axis, in steps that double."""
    for sign in (1, -1):
        done = 0
        while done < width:
            step = min(done + 1, width - done)
            shifted = np.roll(values, sign * step, axis)
            edge = [slice(None)] * 2
            edge[axis] = slice(0, step) if sign > 0 else slice(-step, None)
            shifted[tuple(edge)] = values[tuple(edge)]
            values, done = smaller(values, shifted), done + step
    return values


def _share(mask: Bools, size: int) -> npt.NDArray[np.float32]:
    """How much of each pixel of a picture of `size` a mask on the canvas covers."""
    parts = mask.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE)
    share: npt.NDArray[np.float32] = parts.mean(axis=(1, 3), dtype=np.float32)
    return share


def _box(covered: Bools) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero(covered.any(axis=a)) for a in (1, 0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return tuple(float(v) / SUPERSAMPLE for v in (left, top, right, bottom))  # type: ignore[return-value]
