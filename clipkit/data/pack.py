"""Packing: write a source to webdataset shards with a manifest.

Every image is decoded once while packing, so that unreadable ones are skipped and counted before training. Several
threads read images, which are written in the source's order: the same source gives the same bytes. A journal lists
finished shards; the same command resumes after the last one if the source is unchanged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
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

from clipkit.data.captions import clean_caption
from clipkit.data.files import counted
from clipkit.data.images import FORMATS, decode, format_of
from clipkit.data.manifest import index_shard, write_manifest
from clipkit.data.sources import RawSample, Source
from clipkit.errors import ClipkitError, DataError, SampleError, UsageError, shown
from clipkit.io import write_atomically
from clipkit.log import progress, remark

JOURNAL = "packing.json"
_NAMED = 3
"""Number of skipped files that are named, for each reason."""
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Encoding:
    """How images are stored: byte for byte, unless one of these is set.

    resize: the shorter side of larger images is reduced to this. encode: "jpeg", "png" or "webp". quality: of JPEG and
    WebP, 1 to 100.
    """

    resize: int = 0
    encode: str = ""
    quality: int = 90

    def __call__(self, data: bytes) -> bytes:
        """Check an image, and re-encode it if set. Raises SampleError as `images.decode` does."""
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
    """Progress of packing, written after each shard."""

    plan: str
    consumed: int = 0
    held: list[int] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, out: Path, plan: str) -> _Journal:
        """The journal of an interrupted run in `out`, or a new one. Raises UsageError if `out` holds something else."""
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
                f"{out} was started with another source or options, or files were added, removed or changed since; "
                "remove it and pack again"
            )
        return journal

    def save(self, out: Path) -> None:
        write_atomically(out / JOURNAL, json.dumps(dataclasses.asdict(self)))


def pack(
    source: Source, out: Path, shard_size: int = 10_000, holdout: int = 0, encoding: Encoding | None = None
) -> dict[str, Any]:
    """Write `source` to shards of `shard_size` samples in `out` -> the manifest.

    With `holdout`, that many samples, spread evenly over the source, go to `<out>-val` instead. Samples without a
    readable image or a caption are skipped and counted in the manifest. An interrupted call resumes after its last
    complete shard. Raises UsageError if `out` holds something else, DataError when nothing could be packed; then no new
    folder is left behind.
    """
    encoding = encoding or Encoding()
    val = holdout_of(out)
    plan = hashlib.sha256(repr((source.identity, shard_size, holdout, encoding)).encode()).hexdigest()
    if holdout and not (out / JOURNAL).is_file() and val.exists() and any(val.iterdir()):
        raise UsageError(f"{val} is not empty; choose another folder or remove it")
    total = source.count() if holdout else 0
    if holdout and holdout >= total:
        raise UsageError(f"holdout is {holdout}, which leaves nothing of {total} samples")
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
            write_manifest(val, [entry], {}, about)
    manifest = write_manifest(out, journal.shards, skipped, about)
    (out / JOURNAL).unlink()
    return manifest


def holdout_of(out: Path) -> Path:
    """The folder beside `out` for the held-out samples."""
    return Path(f"{os.path.abspath(out)}-val") if out.name in ("", "..") else out.with_name(f"{out.name}-val")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; on failure, those that were made are removed if they are empty."""
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
    """The held-out samples, spread evenly over the source; the next good one replaces a bad one."""

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
    """Number and sample of those still to be written."""
    done = journal.consumed

    def check(item: tuple[int, RawSample | SampleError]) -> RawSample | SampleError | None:
        i, sample = item
        if i < done and i not in kept.before:
            return None
        return _checked(sample, encoding)

    skipped = Counter(journal.skipped)
    files: dict[str, list[str]] = {}
    bar = progress(enumerate(source.samples), None, "packing")
    for i, result in enumerate(_in_order(check, bar)):
        if isinstance(result, SampleError):
            skipped[result.reason] += 1
            files.setdefault(result.reason, []).extend([result.detail] if result.detail else [])
        elif result is not None and not kept.takes(i, result):
            yield i, result
        journal.skipped = dict(skipped)
    for reason, names in files.items():
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            remark(f"clipkit: {reason}: {', '.join(map(shown, names[:_NAMED]))}{more}")


def _checked(sample: RawSample | SampleError, encoding: Encoding) -> RawSample | SampleError:
    if isinstance(sample, SampleError):
        return sample
    try:
        with warnings.catch_warnings():  # Pillow warns of odd metadata, and raises errors that matter
            warnings.simplefilter("ignore")
            image = encoding(sample.image)
    except SampleError as error:
        return SampleError(error.reason, sample.name)
    captions = tuple(filter(None, map(clean_caption, sample.captions)))
    return RawSample(image, captions, sample.label) if captions else SampleError("no caption", sample.name)


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
    """Write one shard, complete or not at all -> its manifest entry, and the last sample's number."""
    aside = path.with_name(f".{path.name}.part")
    last = -1
    try:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as archive:
            for key, (number, sample) in enumerate(samples, written):
                last = number
                for suffix, content in _members(sample):
                    archive.addfile(_header(f"{key:09d}.{suffix}", len(content)), io.BytesIO(content))
        os.replace(aside, path)
        return index_shard(path)[0], last
    except OSError as error:  # a full disk has no file's name
        for file in (path, path.with_suffix(".npy")):
            file.unlink(missing_ok=True)
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def _members(sample: RawSample) -> list[tuple[str, bytes]]:
    """Suffix and content of a sample's members, sorted by suffix."""
    record = {"captions": list(sample.captions), "label": sample.label}
    members = {
        _SUFFIX[format_of(sample.image)]: sample.image,
        "txt": sample.captions[0].encode(),
        "json": json.dumps(record, ensure_ascii=False).encode(),
    }
    return sorted(members.items())


def _header(name: str, size: int) -> tarfile.TarInfo:
    """The header that webdataset's TarWriter writes, without owner and time: the same samples give the same bytes."""
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = 0o444
    header.mtime = 0.0
    return header


_SUFFIX = {"jpeg": "jpg", "png": "png", "webp": "webp"}
assert set(_SUFFIX) == {name.lower() for name in FORMATS}
