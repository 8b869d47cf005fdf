"""Packs: webdataset shards with an index, read strictly and at random.

A pack is a folder of `shard-000000.tar` ... with an `index.json`. A sample is a group of members that share a key and
lie together: `<key>.jpg|png|webp`, `<key>.txt` (its first caption) and `<key>.json` ({"captions": [...], "label": int
or null}). The index holds each shard's size, sha256 and sample count, and beside each shard lies `shard-000000.npy`,
the byte ranges of its members: once the hash of a shard is known to be right, reading sample i is one `pread`.

A pack may lie in a folder or behind a URL; shards of the latter are fetched, whole, when they are first needed.
Shards made elsewhere (webdataset, img2dataset) get an index when they are first opened: beside them, or in the cache
where nothing can be written. Their .json has whatever fields its author chose; of these a list `captions` or a text
`caption` is used.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.data.images import SUFFIXES
from clipkit.data.remote import Cache, Store, open_store
from clipkit.errors import SampleError, ShardError, UsageError
from clipkit.inputs import check_writable
from clipkit.io import sha256, write_atomically
from clipkit.log import remark

FORMAT = 1
KEYS = 2
"""Number of the rule by which members of shards made elsewhere are put together to samples (`split_key`)."""
MAX_CAPTION = 4096
PICKLES = (".pkl", ".pickle", ".pyd", ".pt", ".pth", ".joblib")
_OPEN_FILES = 64
_IMAGE, _TEXT, _META = 0, 1, 2
_COLUMNS = ("image", "caption", "metadata")


@dataclass(frozen=True)
class Sample:
    """One raw sample: `image` are undecoded bytes, `label` indexes the pack's classes or is None."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: int | None


class StrictTarInfo(tarfile.TarInfo):
    """A header that only the end-of-archive block may end.

    Python's tarfile takes a damaged or missing header after the first member for the end of the archive and silently
    drops the rest; here each of these is a ShardError.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> StrictTarInfo:
        """Parse the next header, with those that extend it. Raises ShardError for anything else but the end block."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise ShardError(f"damaged tar header ({error}) at byte {archive.offset}") from None


def split_key(name: str) -> tuple[str, str]:
    """A member's sample and suffix: the key ends before the first dot of the base name, as webdataset has it.

    "a.b/000.seg.png" -> ("a.b/000", ".seg.png").
    """
    folder, slash, base = str(PurePosixPath(name)).rpartition("/")  # PurePosixPath drops "./"
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}"


@dataclass(frozen=True)
class Scan:
    """What a walk through a shard found.

    offsets: int64 [samples, 6], offset and size of image, caption and metadata (-1: none). refused: members that are
    not taken, by reason; they are never read.
    """

    offsets: npt.NDArray[np.int64]
    refused: Counter[str]

    def incomplete(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Which samples [samples] lack a member without which there is nothing to read, by reason."""
        image, text, meta = (self.offsets[:, 2 * column] < 0 for column in (_IMAGE, _TEXT, _META))
        return {"no image": image, "no caption": ~image & text & meta}


def scan(shard: Path) -> Scan:
    """Walk every header of a tar. Raises ShardError naming the shard when it is cut or damaged.

    Members of a key that do not lie together are samples of their own, as for webdataset, and counted.
    """
    rows: list[list[int]] = []
    refused: Counter[str] = Counter()
    last_key, keys = None, set[str]()
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                if member.offset_data + member.size > size:
                    raise ShardError(f"cut inside member {member.name!r}")
                if reason := _refusal(member):
                    refused[reason] += 1
                    continue
                if member.isdir() or is_hidden(member.name):
                    continue
                key, suffix = split_key(member.name)
                if key != last_key:
                    refused["members of a key apart"] += key in keys
                    rows.append([-1] * 6)
                    keys.add(key)
                    last_key = key
                if (column := _column(suffix)) is None:
                    continue
                if rows[-1][2 * column] >= 0:
                    refused[f"second {_COLUMNS[column]} of a key"] += 1
                    continue
                rows[-1][2 * column : 2 * column + 2] = [member.offset_data, member.size]
            check_end(archive)
    except (tarfile.TarError, ShardError, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise ShardError(f"shard {shard} cannot be read: {error.strerror}") from None
        raise ShardError(f"{shard} is damaged: {error}; pack it again or fetch it anew") from None
    return Scan(np.array(rows, dtype=np.int64).reshape(-1, 6), +refused)


def check_end(archive: tarfile.TarFile) -> None:
    """Check that nothing but zeros follows the end of an archive, all of whose headers have been read.

    Raises ShardError saying where: tars joined by `cat`, or zeros where a part was lost, would end at the first end.
    """
    assert archive.fileobj is not None
    while chunk := archive.fileobj.read(1 << 20):
        if chunk.count(0) < len(chunk):
            raise ShardError(
                f"data after the end of the archive (byte {archive.offset}); "
                "if it was joined by `cat`, keep the parts as shards of their own or join them by `tar --concatenate`"
            )


def is_hidden(name: str) -> bool:
    """What is no data: hidden files, and what macOS puts beside others (`._photo.jpg`, `__MACOSX/`)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _refusal(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\x00" in member.name:
        return "unsafe name"
    if member.isdir():
        return None
    if not member.isfile() or member.issparse():
        return "link or device"
    return "pickle" if path.suffix.lower() in PICKLES else None


def _column(suffix: str) -> int | None:
    if suffix.lower() in SUFFIXES:
        return _IMAGE
    return {".txt": _TEXT, ".json": _META}.get(suffix.lower())


def index_shard(tar: Path, out: Path | None = None) -> tuple[dict[str, Any], Counter[str]]:
    """Scan a shard and write its offsets beside it, or to `out` -> its entry of the index, and what was not taken."""
    found, buffer = scan(tar), io.BytesIO()
    np.save(buffer, found.offsets, allow_pickle=False)
    write_atomically((out or tar.parent) / f"{tar.stem}.npy", buffer.getvalue())
    entry = {
        "name": tar.name,
        "bytes": tar.stat().st_size,
        "sha256": sha256(tar),
        "offsets_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "samples": len(found.offsets),
    }
    return entry, found.refused


def tar_files(folder: Path, pattern: str = "*.tar") -> list[Path]:
    """Tars in a folder, sorted, without hidden ones: macOS lays `._shard.tar` beside `shard.tar`."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def tars_of(folder: Path) -> list[Path]:
    """The shards in a folder, sorted. Raises ShardError when there is none."""
    tars = tar_files(folder)
    if not tars:
        raise ShardError(f"no .tar shards in {folder}; make some with `clipkit pack`")
    return tars


def write_index(folder: Path, extra: dict[str, Any] | None = None, out: Path | None = None) -> dict[str, Any]:
    """Scan every `*.tar` of `folder` and write offsets and `index.json`, with `extra` keys (classes, skips) in it.

    They go beside the shards, or to `out`.
    """
    shards, extra = [], dict(extra or {})
    refused = Counter[str](extra.get("skipped", {}))
    for tar in tars_of(folder):
        entry, found = index_shard(tar, out)
        shards.append(entry)
        refused += found
    extra["skipped"] = dict(refused)
    index = {
        "format": FORMAT,
        "keys": KEYS,
        "samples": sum(int(s["samples"]) for s in shards),
        **extra,
        "shards": shards,
    }
    write_atomically((out or folder) / "index.json", json.dumps(index, indent=1, ensure_ascii=False))
    return index


def find_index(store: Store, cache: Cache) -> Path:
    """The index of a pack, a file; local shards made elsewhere get theirs now.

    It lies beside them or, where nothing can be written, in the cache, in a folder that is named after the shards'
    place, names, sizes and times. Raises ShardError when it can be written to neither.
    """
    if store.remote:
        return store.get("index.json")
    folder = Path(store.source)
    beside = folder / "index.json"
    if beside.is_file() and not _is_outdated(beside):
        return beside
    tars = [(tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars_of(folder)]
    identity = hashlib.sha256(repr((str(folder.resolve()), tars)).encode("utf-8", "surrogateescape")).hexdigest()
    cached = cache.root / "indexes" / identity[:16]
    kept = cached / "index.json"
    if kept.is_file() and not _is_outdated(kept):
        return kept
    for old in filter(Path.is_file, (beside, kept)):
        remark(f"clipkit: {old} is of an older version, which read keys otherwise; it is made again")
    try:
        check_writable(folder)
    except UsageError as error:
        try:
            check_writable(cached)
        except UsageError as other:
            raise ShardError(
                f"the shards in {folder} have no index, and there is no place for one: {error}; {other}; set "
                "data.cache or XDG_CACHE_HOME to a folder that can be written into"
            ) from None
        cached.mkdir(parents=True, exist_ok=True)
        write_index(folder, out=cached)
        remark(f"clipkit: {folder} cannot be written into; the index of its shards is in {cached}")
        return kept
    write_index(folder)
    return beside


def _is_outdated(path: Path) -> bool:
    """Whether an older version made this index of foreign shards, by another rule; those of `pack` have classes."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return "shards" in index and "classes" not in index and index["format"] == FORMAT and index.get("keys") != KEYS
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # what is wrong with it is said when it is used


def load_index(store: Store, cache: Cache | None = None) -> tuple[dict[str, Any], Path]:
    """The index of a pack, and its file; a folder of shards without one gets it.

    Raises ShardError when it is not one, and for shards made elsewhere that came after it.
    """
    path = find_index(store, cache or Cache())
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError(f"it holds a {type(index).__name__}")
        if {"weights", "pictures"} <= index.keys() and "shards" not in index:
            raise ShardError(f"{store.source} is an embedding index made by `clipkit index`, not a pack")
        whole = {"name", "bytes", "samples", "sha256"}
        known = index["format"] == FORMAT and all(e.keys() >= whole for e in index["shards"])
        foreign = [n for n in (str(e["name"]) for e in index["shards"]) if "/" in n or not n.endswith(".tar")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ShardError(
            f"{path} is not the index of a pack: {what}; give the folder of a pack, or move this file away to have one "
            "made of the .tar shards beside it"
        ) from None
    if foreign:
        raise ShardError(f"{path} names the shard {foreign[0]!r}; a shard is a .tar beside its index")
    if not known:
        raise ShardError(f"{path} has format {index['format']!r}, this version reads {FORMAT}; pack again")
    if not store.remote and "classes" not in index and (new := sorted(unlisted(Path(store.source), index))):
        raise ShardError(f"{path} does not list {new[0]}, which came later; remove it to have it made again")
    return index, path


def unlisted(folder: Path, index: dict[str, Any]) -> set[str]:
    """Names of the shards in a folder that its index does not know of."""
    return {tar.name for tar in tar_files(folder)} - {str(entry["name"]) for entry in index["shards"]}


def check_count(shard: Path, found: int, entry: dict[str, Any]) -> None:
    """Check that as many samples were found in a shard as its entry of the index says. Raises ShardError."""
    if found != entry["samples"]:
        raise ShardError(f"shard {shard} is damaged: {found} samples found, {entry['samples']} expected by its index")


class Shards:
    """An opened pack: `len(shards)` samples, `shards.read(i)`.

    `source` is a folder, or an http(s) or fsspec URL of one; what is fetched stays in `cache`. Opening a folder checks
    that every shard is there with the size of the index, and, with `verify`, its sha256; a fetched shard is always
    checked. A folder of shards made elsewhere gets its index on first opening, in `cache` where it cannot be written.

    Raises ShardError naming the shard.
    """

    def __init__(self, source: str | Path, verify: bool = True, cache: Cache | None = None) -> None:
        self.store = open_store(source, cache)
        if not self.store.remote and not Path(source).is_dir():
            raise ShardError(f"no pack at {source}; make one with `clipkit pack SOURCE {source}`")
        self.source = self.store.source
        self.index, path = load_index(self.store, cache)
        self._offsets_folder = None if self.store.remote else path.parent
        self._classes = len(self.index.get("classes", []))
        self.entries: list[dict[str, Any]] = self.index["shards"]
        self.starts = [0, *accumulate(int(e["samples"]) for e in self.entries)]
        self._opened: OrderedDict[int, tuple[int, npt.NDArray[np.int64]]] = OrderedDict()
        if not self.store.remote:
            for entry in self.entries:
                self.store.get(entry["name"], entry["bytes"])
        if verify:
            self.verify()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:  # file descriptors do not travel to worker processes
        return {**self.__dict__, "_opened": OrderedDict()}

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_opened", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    @property
    def classes(self) -> list[list[str]]:
        """Names of each class, the first being the main one; empty for a pack without classes."""
        return [list(names) for names in self.index.get("classes", [])]

    @property
    def templates(self) -> list[str]:
        """Prompt templates stored with the pack, or none."""
        return list(self.index.get("templates", []))

    @property
    def skipped(self) -> dict[str, int]:
        """What was not taken when the pack, or the index of shards made elsewhere, was made, by reason."""
        return dict(self.index.get("skipped", {}))

    def verify(self, proceed: Callable[[], bool] = lambda: True) -> None:
        """Check the sha256 of every shard that is on this machine, as long as `proceed` says so.

        Raises ShardError naming the first that is damaged.
        """
        for entry in self.entries:
            if not proceed():
                return
            path = self._fetch(entry)
            if sha256(path) != entry["sha256"]:
                raise ShardError(
                    f"shard {path} is damaged: its sha256 is not that of the index; fetch or pack it again"
                )

    def _fetch(self, entry: dict[str, Any]) -> Path:
        return self.store.get(entry["name"], entry["bytes"], entry["sha256"])

    def prefetch(self, shards: Iterable[int]) -> None:
        """Have some shards on this machine; what goes wrong will be said when they are read."""
        for shard in shards:
            with contextlib.suppress(ShardError):
                self._fetch(self.entries[shard])

    def _open(self, shard: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Descriptor and offsets of a shard; the least recently used one is closed when there are many."""
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        entry = self.entries[shard]
        path = self._fetch(entry)
        offsets = self._offsets(path, entry)
        if len(self._opened) >= _OPEN_FILES:
            os.close(self._opened.popitem(last=False)[1][0])
        try:
            self._opened[shard] = os.open(path, os.O_RDONLY), offsets
        except OSError as error:
            raise ShardError(f"shard {path} cannot be read: {error.strerror}") from None
        return self._opened[shard]

    def _offsets(self, path: Path, entry: dict[str, Any]) -> npt.NDArray[np.int64]:
        beside = (self._offsets_folder or path.parent) / f"{path.stem}.npy"
        try:
            if sha256(beside) == entry["offsets_sha256"]:
                offsets: npt.NDArray[np.int64] = np.load(beside, allow_pickle=False)
                return offsets
        except (OSError, ValueError, KeyError):
            pass
        found = scan(path).offsets  # the shard itself is right; what only points into it can be made again
        check_count(path, len(found), entry)
        return found

    def locate(self, i: int) -> tuple[int, int]:
        """Shard of sample i, and its number therein."""
        shard = bisect.bisect_right(self.starts, i) - 1
        return shard, i - self.starts[shard]

    def name(self, i: int) -> str:
        """How sample i is called in messages: its shard and its number therein."""
        shard, local = self.locate(i)
        return f"{self.source}/{self.entries[shard]['name']}, sample {local}"

    def read(self, i: int) -> Sample:
        """Sample i, undecoded. Raises SampleError ("no image", "no caption", "bad metadata")."""
        shard, local = self.locate(i)
        descriptor, offsets = self._open(shard)
        row = offsets[local].tolist()
        if row[2 * _IMAGE] < 0:
            raise SampleError("no image", self.name(i))
        # The members of a sample lie together: one read fetches them all.
        present = [(row[c], row[c] + row[c + 1]) for c in (0, 2, 4) if row[c] >= 0]
        start, stop = min(p[0] for p in present), max(p[1] for p in present)
        try:
            block = os.pread(descriptor, stop - start, start)
        except OSError as error:
            raise ShardError(f"{self.name(i)} cannot be read: {error.strerror}") from None
        image, text, meta = (
            block[row[c] - start : row[c] - start + row[c + 1]] if row[c] >= 0 else None for c in (0, 2, 4)
        )
        captions, label = _captions(text or b"", meta, self._classes)
        if not captions:
            raise SampleError("no caption", self.name(i))
        return Sample(f"{Path(self.entries[shard]['name']).stem}/{local}", image or b"", captions, label)

    def captions(self, limit: int) -> list[str]:
        """Every caption of `limit` samples, or fewer, spread evenly; of a pack behind a URL, of its first shard."""
        last = self.starts[1] if self.store.remote else len(self)
        found: list[str] = []
        for i in range(0, last, max(1, -(-last // limit))):
            with contextlib.suppress(SampleError):
                found.extend(self.read(i).captions)
        return found


def clean_caption(text: str) -> str:
    """A caption that every tokenizer can take: no NUL, no lone surrogates, at most `MAX_CAPTION` characters."""
    return text[: 2 * MAX_CAPTION].replace("\x00", " ").encode("utf-8", "replace").decode("utf-8").strip()[:MAX_CAPTION]


def _captions(text: bytes, meta: bytes | None, classes: int) -> tuple[tuple[str, ...], int | None]:
    """Captions and label of a sample: those that `pack` wrote; in shards made elsewhere, where there are no classes, of
    the .json what can be a caption, and no label.

    Raises SampleError ("bad metadata") for a .json that cannot be read though it is needed.
    """
    written = [text[: 8 * MAX_CAPTION].decode("utf-8", errors="replace")]
    record = {} if meta is None else _record(meta)
    if record is None and (classes or not clean_caption(written[0])):
        raise SampleError("bad metadata", repr((meta or b"")[:60]))
    record = record or {}
    listed, label = record.get("captions"), record.get("label") if classes else None
    if label is not None and not (type(label) is int and 0 <= label < classes):
        raise SampleError("bad metadata", f"label {label!r:.40} of {classes} classes")
    listed = listed if isinstance(listed, list) and all(isinstance(c, str) for c in listed) else []
    single = record.get("caption")
    # The caption alone in a .json counts only where there is no .txt.
    for found in (listed, written, [single] if isinstance(single, str) else []):
        if captions := tuple(filter(None, map(clean_caption, found))):
            return captions, label
    return (), label


def _record(meta: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(meta)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
