"""Pictograms: drawings with transparency and a table of their names -> captioned pictures on any background.

A folder of pictograms has `captions.csv` with the columns image, caption, tags (separated by `; `), style, and the
images below it or in `images.tar.xz`. Each image gives several samples: laid on a background, at some size and place,
mirrored where that keeps its meaning, and with its main colour replaced by a named one in some of them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from clipkit.data.files import Files
from clipkit.data.images import FORMATS, decode
from clipkit.data.shards import Shards
from clipkit.data.sources import RawSample, Source, encode_png
from clipkit.data.tables import read_table
from clipkit.errors import DataError, SampleError, UsageError

STYLES = {"fluent": "flat", "noto": "shaded", "twemoji": "plain", "fxemoji": "soft"}
"""The sets, and the word by which captions name the way they draw; a set that is not here is named by its own name."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 46, 66),
    "orange": (244, 144, 12),
    "yellow": (255, 204, 77),
    "green": (92, 172, 72),
    "blue": (62, 124, 222),
    "purple": (146, 88, 196),
    "pink": (244, 134, 184),
}
"""Colours that a pictogram's main colour is replaced by."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (176, 180, 184),
    "light blue": (190, 222, 244),
    "light green": (204, 232, 190),
    "cream": (252, 240, 214),
    "lilac": (222, 208, 240),
}
TEMPLATES = ("a {}", "a drawing of a {}", "a picture of a {}", "{}")

_RECOLOURED, _MIRRORED, _WHITE = 0.35, 0.3, 0.5  # shares of the samples
_RECOLOURED_ON_PHOTOGRAPHS = 0.1
_LARGEST = 128
_HELD_OUT = 8  # one thing in so many keeps one of its styles for testing
_FIXED = ("symbols", "flags")  # groups that mean something else when mirrored
_COLOURED = ("animals-nature", "food-drink", "travel-places", "activities", "objects", "smileys-emotion")
_PHOTOGRAPHED = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
"""Groups that are composited on photographs."""
_MAIN = 0.3  # smallest share of the opaque area that a main colour has
_HUES = 24  # distance in hue, of 256, that belongs to a colour


@dataclass(frozen=True)
class Pictogram:
    """One row of the table."""

    image: str
    name: str
    tags: tuple[str, ...]
    group: str
    style: str

    @classmethod
    def of(cls, row: Mapping[str, str]) -> Pictogram:
        """From a row of the table."""
        tags = tuple(filter(None, (tag.strip() for tag in row["tags"].split(";"))))
        return cls(row["image"], plain_name(row["caption"]), tags, row["group"], row["style"])


def read(table: Path) -> dict[str, Pictogram]:
    """The table by image names. Raises DataError for one without the columns."""
    rows = read_table(table, ("image", "caption", "tags", "group", "style"))
    found = (Pictogram.of(row.values) for row in rows)
    return {one.image: one for one in found}


def plain_name(caption: str) -> str:
    """A Unicode name in the words of a caption: "flag: France" is "flag of France", "keycap: 7" "keycap 7"."""
    kind, colon, rest = caption.partition(": ")
    if not colon:
        return caption
    return f"flag of {rest}" if kind == "flag" else f"{kind} {rest}" if kind == "keycap" else f"{kind}, {rest}"


def held_out(pictogram: Pictogram, styles: frozenset[str]) -> bool:
    """Whether a picture is kept from training: one style of an eighth of the things that are drawn in three or more."""
    code = zlib.crc32(pictogram.name.encode())
    return (
        len(styles) > 2 and code % _HELD_OUT == 0 and pictogram.style == sorted(styles)[code // _HELD_OUT % len(styles)]
    )


def pictograms_source(
    source: Path, split: str, size: int, variants: int, seed: int, photographs: Shards | None = None
) -> Source:
    """`variants` samples of each pictogram of a split, "train" or "heldout", as PNG of `size` pixels.

    With `photographs`, pictograms of things are composited on crops of them, rotated, shaded and blurred, so that the
    rendering does not tell what an image shows. Classes are the names. Raises DataError for a folder without table or
    images, UsageError for a split, size or count that there is not.
    """
    if split not in ("train", "heldout"):
        raise UsageError(f"split is {split!r}; pictograms have train and heldout")
    if not 8 <= size <= _LARGEST or variants < 1:
        raise UsageError(f"size is {size} and variants is {variants}; a size is 8 to {_LARGEST}, variants at least 1")
    table = source / "captions.csv"
    if not table.is_file():
        raise DataError(f"{source} holds no captions.csv; pictograms are a folder with that table and images")
    files = Files(next((p for p in sorted(source.glob("images.tar*")) if p.is_file()), source))
    known = read(table)
    styles: dict[str, frozenset[str]] = {}
    for one in known.values():
        styles[one.name] = styles.get(one.name, frozenset()) | {one.style}
    of_split = {k: p for k, p in known.items() if held_out(p, styles[p.name]) == (split == "heldout")}
    chosen = {k: p for k, p in of_split.items() if photographs is None or p.group in _PHOTOGRAPHED}
    if not chosen:
        raise DataError(f"{table} has no pictogram of the split {split}")
    classes = {name: i for i, name in enumerate(sorted(styles))}

    def samples() -> Iterator[RawSample | SampleError]:
        missing = set(chosen)
        for file in files:
            if (one := chosen.get(file.name)) is None:
                continue
            missing.discard(file.name)
            for k in range(variants):
                rng = np.random.default_rng([seed, zlib.crc32(one.image.encode()), k])
                try:
                    image = _with_alpha(file.read(), one.image)
                    yield _sample(one, image, size, rng, classes[one.name], photographs)
                except SampleError as error:
                    yield error
        yield from (SampleError("image missing", name) for name in sorted(missing) for _ in range(variants))

    content = zlib.crc32(table.read_bytes())
    decided_by = (str(source.resolve()), files.fingerprint, content, split, size, variants, seed)
    over = () if photographs is None else ([entry["sha256"] for entry in photographs.entries],)
    identity = repr(("pictograms", *decided_by, *over))
    unlisted = {"not in the table": len(set(files.names) - known.keys())}
    return Source(
        samples(),
        lambda: len(chosen) * variants,
        identity,
        [[name] for name in classes],
        list(TEMPLATES),
        lambda: unlisted,
    )


def _sample(
    one: Pictogram,
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    label: int,
    photographs: Shards | None = None,
) -> RawSample:
    """One picture of a pictogram with its captions."""
    colour = ""
    share = _RECOLOURED if photographs is None else _RECOLOURED_ON_PHOTOGRAPHS
    if one.group in _COLOURED and rng.random() < share:
        wanted = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        if (other := recoloured(image, COLOURS[wanted])) is not None:
            image, colour = other, wanted
    if one.group not in _FIXED and rng.random() < _MIRRORED:
        image = ImageOps.mirror(image)
    if photographs is not None:
        return RawSample(encode_png(_collage(image, photographs, size, rng)), _captions(one, colour, "", rng), label)
    background = "white" if rng.random() < _WHITE else list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    side = max(1, round(size * rng.uniform(0.8, 1.0)))
    left, top = (int(rng.integers(size - side + 1)) for _ in range(2))
    canvas = Image.new("RGB", (size, size), BACKGROUNDS[background])
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    canvas.paste(image, (left, top), mask=image)
    return RawSample(encode_png(canvas), _captions(one, colour, background, rng), label)


def _collage(image: Image.Image, photographs: Shards, size: int, rng: np.random.Generator) -> Image.Image:
    """An RGBA image on a photograph: turned, stretched, paler, lit from one side, and blurred or grained with it."""
    image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    side = round(size * rng.uniform(0.6, 1.0))
    wide, high = (max(4, round(side * min(1.0, rng.uniform(0.75, 1.1)))) for _ in range(2))
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float64).copy()
    grey = pixels[..., :3].mean(axis=2, keepdims=True)
    pixels[..., :3] = grey + rng.uniform(0.3, 1.0) * (pixels[..., :3] - grey)
    pixels[..., :3] *= rng.uniform(0.75, 1.1, 3)
    (across, down), light = rng.uniform(-0.35, 0.35, 2), rng.uniform(0.7, 1.1)
    ys, xs = np.mgrid[-1 : 1 : high * 1j, -1 : 1 : wide * 1j]
    pixels[..., :3] *= (light + across * xs + down * ys)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8), "RGBA")
    behind = decode(photographs.read(int(rng.integers(len(photographs)))).image)
    part = round(min(behind.size) * rng.uniform(0.4, 1.0))
    x, y = (int(rng.integers(whole - part + 1)) for whole in behind.size)
    canvas = behind.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + part, y + part))
    canvas.paste(image, (int(rng.integers(size - wide + 1)), int(rng.integers(size - high + 1))), mask=image)
    canvas = canvas.filter(ImageFilter.GaussianBlur(size / 32 * rng.uniform(0, 0.7)))
    grained = np.asarray(canvas, np.float64) + rng.uniform(0, 8) * rng.standard_normal((size, size, 1))
    return Image.fromarray(grained.clip(0, 255).round().astype(np.uint8))


def _with_alpha(data: bytes, name: str) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        return image.convert("RGBA")
    except (OSError, ValueError) as error:
        raise SampleError("not an image", f"{name}: {error}") from None


def _captions(one: Pictogram, colour: str, background: str, rng: np.random.Generator) -> tuple[str, ...]:
    """All true: the plain one, one with the way of drawing, one with keywords, one with the background if named."""
    thing = f"{colour} {one.name}" if colour else one.name
    thing = thing if one.group in _FIXED else f"{_article(thing)} {thing}"
    way = STYLES.get(one.style, one.style)
    tags = [str(tag) for tag in rng.permutation(one.tags)[:2]] if one.tags else []
    return (
        thing,
        f"{_article(way)} {way} drawing of {thing}",
        ", ".join([thing, *tags]),
        f"{thing} on a {background} background" if background else f"a picture of {thing}",
    )


def _article(words: str) -> str:
    return "an" if words[0].lower() in "aeiou" else "a"


def recoloured(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image | None:
    """An RGBA image whose main colour is replaced by another, with light and shade kept; None if it has none.

    The main colour is the most frequent hue, if it covers at least three tenths of the opaque area.
    """
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("RGB").convert("HSV"), np.float64), 2, 0)
    alpha = np.asarray(image.getchannel("A"), np.float64) / 255
    vivid = alpha * (saturation > 60) * (value > 60)
    counts = np.bincount(hue.astype(int).ravel(), vivid.ravel(), 256)
    window = np.ones(_HUES + 1)
    around = np.convolve(np.concatenate([counts[-_HUES // 2 :], counts, counts[: _HUES // 2]]), window, "valid")
    main = int(around.argmax())
    near = np.abs((hue - main + 128) % 256 - 128) <= _HUES
    weight = vivid * near
    if weight.sum() < _MAIN * alpha.sum() or not weight.sum():
        return None
    target = np.asarray(Image.new("RGB", (1, 1), colour).convert("HSV"), np.float64)[0, 0]
    share = near * (saturation > 60)
    scale = [
        float(t / ((c * weight).sum() / weight.sum())) for t, c in zip(target[1:], (saturation, value), strict=True)
    ]
    changed = np.stack([np.full_like(hue, target[0]), saturation * scale[0], value * scale[1]], axis=2).clip(0, 255)
    pixels = (
        np.where(share[..., None] > 0, changed, np.stack([hue, saturation, value], axis=2)).round().astype(np.uint8)
    )
    result = Image.fromarray(pixels, "HSV").convert("RGB")
    result.putalpha(image.getchannel("A"))
    return result
