"""Packing: a source into webdataset shards with an index.

Every image is decoded once while packing, so that what cannot be read is skipped and counted here, not found in the
middle of a training run. Images are read by several threads and written in the source's order: the same source gives
the same bytes. A finished shard is noted in a journal; the same command resumes after the last one, if the source is
still the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from clipkit.data.files import counted
from clipkit.data.images import FORMATS, decode, format_of
from clipkit.data.shards import FORMAT, clean_caption, index_shard
from clipkit.data.sources import RawSample, Source
from clipkit.errors import ClipkitError, DataError, SampleError, UsageError
from clipkit.io import write_atomically
from clipkit.log import progress

JOURNAL = "packing.json"
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Encoding:
    """What becomes of the images: bytes are kept as they are unless one of these asks otherwise.

    resize: the shorter side of larger images is reduced to this. encode: "jpeg", "png" or "webp". quality: of JPEG and
    WebP, 1 to 100.
    """

    resize: int = 0
    encode: str = ""
    quality: int = 90

    def __call__(self, data: bytes) -> bytes:
        """Check an image, and encode it anew if asked. Raises SampleError as `images.decode` does."""
        image, kind = decode(data), format_of(data)
        shorter = min(image.size)
        if 0 < self.resize < shorter:
            size = tuple(max(1, round(side * self.resize / shorter)) for side in image.size)
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)
        elif not self.encode or self.encode == kind:
            return data
        buffer = io.BytesIO()
        kind = self.encode or kind
        image.save(buffer, kind, **({} if kind == "png" else {"quality": self.quality}))
        return buffer.getvalue()


@dataclass
class _Journal:
    """How far packing has come: written after each shard."""

    plan: str
    consumed: int = 0
    held: list[int] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, out: Path, plan: str) -> _Journal:
        """The journal of what was begun in `out`, or a new one. Raises UsageError if something else is there."""
        try:
            journal = cls(**json.loads((out / JOURNAL).read_text(encoding="utf-8")))
        except FileNotFoundError:
            if out.exists() and any(out.iterdir()):
                raise UsageError(f"{out} is not empty; choose another folder or remove it") from None
            journal = cls(plan)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{out / JOURNAL} is damaged ({error}); remove {out} and pack again") from None
        if journal.plan != plan:
            raise UsageError(
                f"{out} was begun with another source or options, or files were added, removed or changed since; "
                "remove it and pack again"
            )
        return journal

    def save(self, out: Path) -> None:
        write_atomically(out / JOURNAL, json.dumps(dataclasses.asdict(self)))


def pack(
    source: Source, out: Path, shard_size: int = 10_000, holdout: int = 0, encoding: Encoding | None = None
) -> dict[str, Any]:
    """Write `source` to shards of `shard_size` samples in `out` -> the index.

    With `holdout`, that many samples, spread evenly over the source, go to `<out>-val` instead. Samples without a
    readable image or a caption are skipped and counted in the index. What was interrupted resumes after its last whole
    shard. Raises UsageError if `out` holds something else, DataError when nothing could be packed; then no folder that
    was not there before stays behind.
    """
    encoding = encoding or Encoding()
    val = holdout_of(out)
    plan = hashlib.sha256(repr((source.identity, shard_size, holdout, encoding)).encode()).hexdigest()
    if holdout and not (out / JOURNAL).is_file() and val.exists() and any(val.iterdir()):
        raise UsageError(f"{val} is not empty; choose another folder or remove it")
    total = source.count() if holdout else 0
    if holdout and holdout >= total:
        raise UsageError(f"--holdout {holdout} leaves nothing of {total} samples")
    journal = _Journal.open(out, plan)
    kept = _Kept(holdout, total, journal)
    with _made(out):
        journal.save(out)
        try:
            _write_shards(_good(source, encoding, journal, kept), out, shard_size, journal)
            skipped = dict(Counter(journal.skipped) + Counter(source.aside()))
            if not journal.shards:
                raise DataError(f"nothing to pack: {counted(skipped) if skipped else 'no image was found'}")
        except (ClipkitError, OSError):
            if not journal.shards:
                (out / JOURNAL).unlink(missing_ok=True)
            raise
    about: dict[str, Any] = {"classes": source.classes, "templates": source.templates}
    if holdout:
        with _made(val):
            entry, _ = _write_shard(val / "shard-000000.tar", 0, enumerate(kept.samples))
            _write_index(val, [entry], {}, about)
    index = _write_index(out, journal.shards, skipped, about)
    (out / JOURNAL).unlink()
    return index


def holdout_of(out: Path) -> Path:
    """The folder beside `out` for what is held out."""
    return Path(f"{os.path.abspath(out)}-val") if out.name in ("", "..") else out.with_name(f"{out.name}-val")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, made with those above it; if something fails, those that were made are removed where they are empty."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


class _Kept:
    """Which samples are held out: evenly over the source; the next good one stands in for a bad one."""

    def __init__(self, holdout: int, total: int, journal: _Journal) -> None:
        self.holdout, self.total, self.journal = holdout, total, journal
        self.before = set(journal.held)
        self.samples: list[RawSample] = []

    def takes(self, i: int, sample: RawSample) -> bool:
        """Whether the good sample number i of the source is held out; keeps it if so."""
        due = bool(self.holdout) and (i + 1) * self.holdout // self.total > len(self.samples)
        if due:
            self.samples.append(sample)
            if i not in self.before:
                self.journal.held.append(i)
        return due


def _good(source: Source, encoding: Encoding, journal: _Journal, kept: _Kept) -> Iterator[tuple[int, RawSample]]:
    """Number and sample of what is to be written; what was written before is passed over."""
    done = journal.consumed

    def check(item: tuple[int, RawSample | SampleError]) -> RawSample | SampleError | None:
        i, sample = item
        if i < done and i not in kept.before:
            return None
        return _checked(sample, encoding)

    skipped = Counter(journal.skipped)
    bar = progress(enumerate(source.samples), None, "packing")
    for i, result in enumerate(_in_order(check, bar)):
        if isinstance(result, SampleError):
            skipped[result.reason] += 1
        elif result is not None and not kept.takes(i, result):
            yield i, result
        journal.skipped = dict(skipped)


def _checked(sample: RawSample | SampleError, encoding: Encoding) -> RawSample | SampleError:
    if isinstance(sample, SampleError):
        return sample
    try:
        with warnings.catch_warnings():  # Pillow warns of odd metadata; what matters, it raises
            warnings.simplefilter("ignore")
            image = encoding(sample.image)
    except SampleError as error:
        return error
    captions = tuple(filter(None, map(clean_caption, sample.captions)))
    return RawSample(image, captions, sample.label) if captions else SampleError("no caption")


def _in_order(function: Callable[[A], B], things: Iterable[A]) -> Iterator[B]:
    """`map` on several threads: results in order, a bounded number of things under way."""
    workers = os.cpu_count() or 1
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for thing in things:
            waiting.append(pool.submit(function, thing))
            if len(waiting) >= 16 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write_shards(samples: Iterator[tuple[int, RawSample]], out: Path, shard_size: int, journal: _Journal) -> None:
    written = sum(int(s["samples"]) for s in journal.shards)
    for first in samples:
        name = f"shard-{len(journal.shards):06d}.tar"
        entry, last = _write_shard(out / name, written, chain([first], islice(samples, shard_size - 1)))
        journal.shards.append(entry)
        journal.consumed, written = last + 1, written + int(entry["samples"])
        journal.save(out)


def _write_shard(path: Path, written: int, samples: Iterable[tuple[int, RawSample]]) -> tuple[dict[str, Any], int]:
    """One shard, there as a whole or not at all -> its entry of the index, and the last sample's number."""
    import webdataset

    aside, last = path.with_name(f".{path.name}.part"), -1
    try:
        # Fixed owner, mode and time: the same samples give the same bytes.
        with webdataset.TarWriter(str(aside), user="", group="", mtime=0.0) as writer:
            for key, (number, sample) in enumerate(samples, written):
                last = number
                record = {"captions": list(sample.captions), "label": sample.label}
                writer.write(
                    {
                        "__key__": f"{key:09d}",
                        _SUFFIX[format_of(sample.image)]: sample.image,
                        "txt": sample.captions[0].encode(),
                        "json": json.dumps(record, ensure_ascii=False).encode(),
                    }
                )
        os.replace(aside, path)
        return index_shard(path)[0], last
    except OSError as error:  # a full disk has no file's name
        for file in (path, path.with_suffix(".npy")):
            file.unlink(missing_ok=True)
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


_SUFFIX = {"jpeg": "jpg", "png": "png", "webp": "webp"}
assert set(_SUFFIX) == {name.lower() for name in FORMATS}


def _write_index(
    out: Path, shards: list[dict[str, Any]], skipped: dict[str, int], about: dict[str, Any]
) -> dict[str, Any]:
    total = sum(int(s["samples"]) for s in shards)
    index = {"format": FORMAT, "samples": total, **about, "skipped": skipped, "shards": shards}
    write_atomically(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False))
    return index
