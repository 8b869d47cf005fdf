"""Sources -> packs: a classed folder or tar, a CSV of `image,caption`, or the drawings, into shards with an index.

Every image is decoded once while packing, so that what cannot be read is skipped and counted here, not found in the
middle of a training run.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from clipkit import drawings
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.images import SUFFIXES, decode
from clipkit.shards import MAX_CAPTION, write_index

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
    """Samples to pack, and what belongs to all of them."""

    samples: Iterator[RawSample | SampleError]
    classes: list[list[str]]
    templates: list[str]


def image_files(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path inside, bytes) of every image of a folder or a tar of any compression, in a fixed order for a folder."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            yield PurePosixPath(path.relative_to(source).as_posix()), path.read_bytes()
        return
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isfile() and name.suffix.lower() in SUFFIXES:
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{source} is neither a folder nor a readable tar: {error}") from None


def class_source(source: Path, classes: dict[str, list[str]] | None, templates: Sequence[str], seed: int) -> Source:
    """Images in `<class>/<image>`: captions are templates filled with names drawn from the class's list.

    `classes` maps a directory's name to its names; without it the directory's own name is the only one. The class's
    main (first) name is in half of the captions, its synonyms share the others.
    """
    if classes is None:
        found = sorted({path.parent.name for path, _ in image_files(source)})
        classes = {name: [name.replace("_", " ")] for name in found}
    if not classes or "" in classes:
        raise DataError(f"{source} has no <class>/<image> layout; pack it with --csv, or sort it into class folders")
    label = {name: i for i, name in enumerate(classes)}

    def samples() -> Iterator[RawSample | SampleError]:
        rng = np.random.default_rng(seed)
        for path, data in image_files(source):
            if path.parent.name not in label:
                yield SampleError("unknown class", path.parent.name)
                continue
            names = classes[path.parent.name]
            chosen = [_draw_caption(names, templates, rng) for _ in range(CAPTIONS_PER_IMAGE)]
            yield RawSample(data, tuple(chosen), label[path.parent.name])

    return Source(samples(), list(classes.values()), list(templates))


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
            reader = csv.DictReader(file)
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

    return Source(samples(), [], [])


def drawings_source(split: str, count: int, size: int, seed: int) -> Source:
    """`count` procedural drawings of a split, as PNG; classes are the (object, colour) pairs."""
    if count < 1:
        raise UsageError(f"--count is {count}; it must be at least 1")
    classes = [[f"{colour} {object_}"] for object_, colour in drawings.PAIRS]

    def samples() -> Iterator[RawSample | SampleError]:
        for i in range(count):
            drawing = drawings.draw(split, seed, i, size)
            yield RawSample(encode_png(drawing.image), drawing.captions, drawing.label)

    return Source(samples(), classes, list(drawings.TEMPLATES))


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pack(source: Source, out: Path, shard_size: int = 10_000, holdout: int = 0) -> dict[str, Any]:
    """Write `source` to shards of `shard_size` samples in `out` -> the index.

    With `holdout`, that many samples, spread evenly over the source, go to `<out>-val` instead.
    Samples without a readable image or a caption are skipped and counted in the index. Raises UsageError if `out` is
    not empty, DataError when nothing could be packed.
    """
    folders = [out, out.with_name(out.name + "-val")] if holdout else [out]
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; choose another folder or remove it")
    skipped: Counter[str] = Counter()
    good = _readable(source.samples, skipped)
    kept: list[RawSample] = []
    if holdout:
        everything = list(good)
        if len(everything) <= holdout:
            raise UsageError(f"--holdout {holdout} leaves nothing of {len(everything)} samples")
        chosen = {i * len(everything) // holdout for i in range(holdout)}
        kept = [everything[i] for i in sorted(chosen)]
        good = iter([s for i, s in enumerate(everything) if i not in chosen])
    about: dict[str, Any] = {"classes": source.classes, "templates": source.templates}
    written = _write(good, out, shard_size)
    if not written:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common()) or "no image was found"
        raise DataError(f"nothing to pack: {reasons}")
    if holdout:
        _write(kept, folders[1], shard_size)
        write_index(folders[1], {**about, "skipped": {}})
    return write_index(out, {**about, "skipped": dict(skipped)})


def _readable(samples: Iterable[RawSample | SampleError], skipped: Counter[str]) -> Iterator[RawSample]:
    for sample in samples:
        try:
            if isinstance(sample, SampleError):
                raise sample
            decode(sample.image)
            captions = tuple(_clean(c) for c in sample.captions if c.strip())
            if not captions:
                raise SampleError("no caption")
            yield RawSample(sample.image, captions, sample.label)
        except SampleError as error:
            skipped[error.reason] += 1


def _clean(caption: str) -> str:
    return caption.replace("\x00", " ").encode("utf-8", errors="replace").decode("utf-8")[:MAX_CAPTION].strip()


def _write(samples: Iterable[RawSample], out: Path, shard_size: int) -> int:
    import webdataset

    out.mkdir(parents=True, exist_ok=True)
    count = 0
    # Fixed owner, mode and time: the same samples give the same bytes.
    writer = webdataset.ShardWriter(
        str(out / "shard-%06d.tar"), maxcount=shard_size, maxsize=1e12, verbose=0, user="", group="", mtime=0.0
    )
    with writer:
        for count, sample in enumerate(samples, 1):
            record = {"captions": list(sample.captions), "label": sample.label}
            writer.write(
                {
                    "__key__": f"{count - 1:09d}",
                    _suffix(sample.image): sample.image,
                    "txt": sample.captions[0].encode(),
                    "json": json.dumps(record, ensure_ascii=False).encode(),
                }
            )
    return count


def _suffix(data: bytes) -> str:
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    return "png" if data[:4] == b"\x89PNG" else "webp"
