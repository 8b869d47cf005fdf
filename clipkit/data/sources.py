"""Sources of samples to pack: a folder or tar of classes, a CSV table with images, drawings, scenes."""

from __future__ import annotations

import io
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipkit import world
from clipkit.data import drawings
from clipkit.data.classes import Layout, checked_templates, class_name, fill, layout, named_layout, say_alike
from clipkit.data.files import Files, counted, say_counts
from clipkit.data.manifest import is_pack
from clipkit.data.shards import Shards
from clipkit.data.tables import read_table
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.log import remark

CAPTIONS_PER_IMAGE = 4
DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "one {}.")


@dataclass(frozen=True)
class RawSample:
    """One sample of a source: encoded image bytes, its captions, the class index or None; its file, for messages."""

    image: bytes
    captions: tuple[str, ...]
    label: int | None
    name: str = ""


@dataclass(frozen=True)
class Source:
    """Samples to pack, in a reproducible order, with their classes and prompt templates.

    count: number of `samples`, bad ones included. identity: a description of source and options; interrupted packing
    resumes only if it is equal. aside: number of files that were no samples, by reason.
    """

    samples: Iterator[RawSample | SampleError]
    count: Callable[[], int]
    identity: str
    classes: list[list[str]]
    templates: list[str]
    aside: Callable[[], Mapping[str, int]] = dict


def pictures(source: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every image of a folder, of a tar, or of a pack (folder or URL). Raises DataError.

    Skipped files are counted in a line on stderr.
    """
    if is_pack(source):
        shards = Shards(source, verify=False)
        yield from ((shards.name(i), shards.read(i).image) for i in range(len(shards)))
        return
    if not Path(source).exists():
        raise DataError(f"no folder, tar or pack at {source}")
    files, unread = Files(Path(source)), Counter[str]()
    for file in files:
        try:
            data = file.read()
        except SampleError as error:
            unread[error.reason] += 1
            continue
        yield file.name, data
    say_counts(source, Counter(reason for _, reason in files.aside) + unread)


def class_layout(files: Files, known: Collection[str] = ()) -> Layout:
    """`classes.layout` of a folder or tar; folders without readable images are named on stderr."""
    if not files.names:
        aside = f"; not taken: {counted(files.counts())}" if files.counts() else ""
        raise DataError(f"{files.source} has no <class>/<image> layout: no JPEG, PNG or WebP image{aside}")
    found = layout(files.source, files.names, known)
    say_alike(files.source, found.classes)
    if barren := found.barren(name for name, reason in files.aside if reason != "not an image"):
        remark(f"clipkit: {files.source}: no JPEG, PNG or WebP image in {', '.join(barren)}; omitted from the classes")
    return found


def class_source(source: Path, classes: dict[str, list[str]] | None, templates: Sequence[str], seed: int) -> Source:
    """Images in `<class>/<image>`: captions are templates filled with names drawn from the class's list.

    `classes` maps a folder's name to its names; without it the folder's own name is the only one.
    Raises DataError as `classes.layout` does, UsageError as `checked_templates` does.
    """
    files, templates = Files(source), checked_templates(templates)
    if classes is not None:
        found = named_layout(source, files.names, classes)
        labels = [found.label_of(name) for name in files.names]
    else:
        found = class_layout(files)
        labels = [found.label_of(name) for name in files.names]
        classes = {name: [class_name(name)] for name in found.classes}
    names = list(classes.values())

    def samples() -> Iterator[RawSample | SampleError]:
        rng = np.random.default_rng(seed)
        for file, label in zip(files, labels, strict=True):
            if label is None:
                continue
            try:
                data = file.read()
            except SampleError as error:
                yield error
                continue
            yield RawSample(data, draw_captions(names[label], templates, rng), label, file.name)

    outside = labels.count(None)
    identity = repr((str(source.resolve()), files.fingerprint, classes, templates, seed))
    aside = files.counts() + Counter({"unknown class": outside})
    return Source(samples(), lambda: len(labels) - outside, identity, names, templates, lambda: aside)


def draw_captions(names: Sequence[str], templates: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """CAPTIONS_PER_IMAGE templates filled with names, half of them with the first, the others with any."""
    return tuple(_draw_caption(names, templates, rng) for _ in range(CAPTIONS_PER_IMAGE))


def _draw_caption(names: Sequence[str], templates: Sequence[str], rng: np.random.Generator) -> str:
    name = names[0] if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
    return fill(templates[int(rng.integers(len(templates)))], name)


def csv_source(table: Path, source: Path) -> Source:
    """A table with the columns `image` and `caption`, and a folder or tar of the images; no classes.

    Several rows of one image give it several captions. `image` is a path in the source, or the end of one if only one
    image has it. Raises DataError as `read_table` does.
    """
    files, rows = Files(source), read_table(table, ("image", "caption"))
    given: dict[str, list[str]] = {}
    for row in rows:
        given.setdefault(row.values["image"], []).append(row.values["caption"])
    aside = files.counts()
    # Empty captions of an image that has others; an image without any is a bad sample.
    for texts in given.values():
        aside["no caption"] += sum(not text for text in texts) if any(texts) else 0
    aside["no image"] += len(given.pop("", ()))
    captions: dict[str, list[str]] = {}
    places, seen = _places(files.names), {name for name, _ in files.aside}
    for image, texts in given.items():
        found = places(image)
        if len(found) == 1:
            captions.setdefault(found[0], []).extend(texts)
        elif found:
            aside["ambiguous name"] += 1
        elif image not in seen:  # else it is counted already
            aside["image missing"] += 1
    aside["not in the table"] += len(files.names) - len(captions)
    if any((source / name).exists() and (source / name).samefile(table) for name, _ in files.aside):
        aside["not an image"] -= 1  # the table itself

    def samples() -> Iterator[RawSample | SampleError]:
        for file in files:
            if file.name not in captions:
                continue
            try:
                yield RawSample(file.read(), tuple(captions[file.name]), None, file.name)
            except SampleError as error:
                yield error

    identity = repr((str(source.resolve()), files.fingerprint, given))
    return Source(samples(), lambda: len(captions), identity, [], [], lambda: +aside)


def _places(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Paths that match a table's `image`: the same path, or all that end with it."""
    exact, ending = set(names), defaultdict[str, list[str]](list)
    for name in names:
        ending[name.rpartition("/")[2]].append(name)

    def find(image: str) -> list[str]:
        for path in (image, posixpath.normpath(image.replace("\\", "/"))):
            if path in exact:
                return [path]
        return [name for name in ending[path.rpartition("/")[2]] if name.endswith(f"/{path}")]

    return find


def drawings_source(split: str, count: int, size: int, seed: int) -> Source:
    """`count` procedural drawings of a split, as PNG; classes are the (object, colour) pairs."""
    if count < 1:
        raise UsageError(f"count is {count}; it must be at least 1")
    classes = [[f"{colour} {object_}"] for object_, colour in drawings.PAIRS]

    def samples() -> Iterator[RawSample | SampleError]:
        for i in range(count):
            drawing = drawings.draw(split, seed, i, size)
            yield RawSample(encode_png(drawing.image), drawing.captions, drawing.label)

    identity = repr(("drawings", split, count, size, seed))
    return Source(samples(), lambda: count, identity, classes, list(drawings.TEMPLATES))


def scenes_source(split: str, count: int, size: int, seed: int) -> Source:
    """`count` scenes of a split of `clipkit.world`, as PNG: half of them flat, the others in all other styles.

    There are no classes. Each scene has its plainest caption and seven random others.
    Raises UsageError for an unknown split or size.
    """
    world.check_size(size)
    styles = (*(["flat"] * (len(world.STYLES) - 1)), *world.STYLES[1:])
    world.sample(split, seed, 0)  # an unknown split raises before anything is written

    def samples() -> Iterator[RawSample | SampleError]:
        for i in range(count):
            scene = world.sample(split, seed, i, styles)
            plain, *others = (caption.text for caption in world.captions(scene))
            chosen = np.random.default_rng([seed, i]).permutation(others)[:7]
            yield RawSample(encode_png(world.render(scene, size).image), (plain, *map(str, chosen)), None)

    return Source(samples(), lambda: count, repr(("scenes", split, count, size, seed)), [], [])


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
