"""What can be packed: a folder or tar of classes, a CSV of `image,caption` beside images, or the embedded drawings."""

from __future__ import annotations

import csv
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
from PIL import Image

from clipkit import drawings
from clipkit.errors import DataError, SampleError, ShardError, UsageError
from clipkit.images import SUFFIXES
from clipkit.shards import Shards, StrictTarInfo

CAPTIONS_PER_IMAGE = 4
DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "one {}.")


@dataclass(frozen=True)
class RawSample:
    """What a source yields: encoded image bytes, every caption that is true of it, the class index or None."""

    image: bytes
    captions: tuple[str, ...]
    label: int | None


@dataclass(frozen=True)
class Source:
    """Samples to pack, in an order that is the same each time, and what belongs to all of them.

    count: how many `samples` yields, the bad ones too. identity: what decides them, compared when packing goes on.
    """

    samples: Iterator[RawSample | SampleError]
    count: Callable[[], int]
    identity: str
    classes: list[list[str]]
    templates: list[str]


def image_names(source: Path) -> Iterator[PurePosixPath]:
    """Paths inside a folder or tar of every image, in the order of `image_files`."""
    if source.is_dir():
        yield from (PurePosixPath(p.relative_to(source).as_posix()) for p in images_of(source))
    else:
        yield from (PurePosixPath(member.name) for _, member in _members(source))


def image_files(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path inside, bytes) of every image of a folder or a tar of any compression, in a fixed order for a folder."""
    if source.is_dir():
        for path in images_of(source):
            yield PurePosixPath(path.relative_to(source).as_posix()), path.read_bytes()
        return
    for archive, member in _members(source):
        file = archive.extractfile(member)
        assert file is not None
        yield PurePosixPath(member.name), file.read()


def pictures(source: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every image of a folder, of a tar, or of a pack (folder or URL). Raises DataError."""
    if "://" in source or (Path(source) / "index.json").is_file():
        shards = Shards(source, verify=False)
        yield from ((shards.name(i), shards.read(i).image) for i in range(len(shards)))
        return
    if not Path(source).exists():
        raise DataError(f"no folder, tar or pack at {source}")
    yield from ((str(name), data) for name, data in image_files(Path(source)))


def images_of(folder: Path) -> list[Path]:
    """Every image file below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if _is_image(p.relative_to(folder)) and p.is_file())


def _is_image(path: PurePath) -> bool:
    """By its name. What is hidden is none, nor what macOS puts beside files: `._photo.jpg`, and all in `__MACOSX`."""
    return path.suffix.lower() in SUFFIXES and not any(p.startswith(".") or p == "__MACOSX" for p in path.parts)


def class_name(directory: str) -> str:
    """A class's name out of a directory's: no underscores or slashes, single spaces."""
    return " ".join(directory.replace("_", " ").replace("/", " ").split())


def _members(source: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    try:
        with tarfile.open(source, "r|*", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                if member.isfile() and _is_image(PurePosixPath(member.name)):
                    yield archive, member
    except (tarfile.TarError, ShardError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{source} is neither a folder nor a readable tar: {error}") from None


def class_source(source: Path, classes: dict[str, list[str]] | None, templates: Sequence[str], seed: int) -> Source:
    """Images in `<class>/<image>`: captions are templates filled with names drawn from the class's list.

    `classes` maps a directory's name to its names; without it the directory's own name is the only one.
    """
    if classes is None:
        found = sorted({path.parent.name for path in image_names(source)})
        classes = {name: [class_name(name)] for name in found}
    if not classes or "" in classes:
        raise DataError(f"{source} has no <class>/<image> layout; pack it with --csv, or sort it into class folders")
    label = {name: i for i, name in enumerate(classes)}

    def samples() -> Iterator[RawSample | SampleError]:
        rng = np.random.default_rng(seed)
        for path, data in image_files(source):
            if path.parent.name not in label:
                yield SampleError("unknown class", path.parent.name)
                continue
            chosen = draw_captions(classes[path.parent.name], templates, rng)
            yield RawSample(data, chosen, label[path.parent.name])

    identity = repr((str(source.resolve()), classes, list(templates), seed))
    return Source(samples(), partial(_count, source), identity, list(classes.values()), list(templates))


def _count(source: Path) -> int:
    return sum(1 for _ in image_names(source))


def draw_captions(names: Sequence[str], templates: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """CAPTIONS_PER_IMAGE templates filled with names: half of them with the first, its synonyms share the others."""
    return tuple(_draw_caption(names, templates, rng) for _ in range(CAPTIONS_PER_IMAGE))


def _draw_caption(names: Sequence[str], templates: Sequence[str], rng: np.random.Generator) -> str:
    name = names[0] if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
    return templates[int(rng.integers(len(templates)))].format(name)


def csv_source(table: Path, source: Path) -> Source:
    """A CSV with the columns `image` and `caption`, the images in a folder or tar beside it; no classes.

    Several rows of one image give it several captions. Raises DataError for a table without these columns.
    """
    captions: dict[str, list[str]] = {}
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(line.replace("\0", " ") for line in file)  # Python 3.10 reads no NUL
            if reader.fieldnames is None or not {"image", "caption"} <= set(reader.fieldnames):
                raise DataError(f"{table} has the columns {reader.fieldnames}; it needs image,caption")
            for row in reader:
                captions.setdefault(row["image"] or "", []).append(row["caption"] or "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not a readable CSV: {error}") from None

    def samples() -> Iterator[RawSample | SampleError]:
        missing = dict(captions)
        for path, data in image_files(source):
            key = str(path) if str(path) in captions else path.name
            if key in captions:
                missing.pop(key, None)
                yield RawSample(data, tuple(captions[key]), None)
            else:
                yield SampleError("not in the table", str(path))
        for name in missing:
            yield SampleError("image missing", name)

    def count() -> int:
        names = list(image_names(source))
        found = {str(n) if str(n) in captions else n.name for n in names}
        return len(names) + len(captions.keys() - found)

    return Source(samples(), count, repr((str(source.resolve()), captions)), [], [])


def drawings_source(split: str, count: int, size: int, seed: int) -> Source:
    """`count` procedural drawings of a split, as PNG; classes are the (object, colour) pairs."""
    if count < 1:
        raise UsageError(f"--count is {count}; it must be at least 1")
    classes = [[f"{colour} {object_}"] for object_, colour in drawings.PAIRS]

    def samples() -> Iterator[RawSample | SampleError]:
        for i in range(count):
            drawing = drawings.draw(split, seed, i, size)
            yield RawSample(encode_png(drawing.image), drawing.captions, drawing.label)

    identity = repr(("drawings", split, count, size, seed))
    return Source(samples(), lambda: count, identity, classes, list(drawings.TEMPLATES))


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
