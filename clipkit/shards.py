"""Packs: webdataset shards with an index, read strictly and at random.

A pack is a folder of `shard-000000.tar` ... with an `index.json`. A sample is a group of members that share a key:
`<key>.jpg|png|webp`, `<key>.txt` (its first caption) and `<key>.json` ({"captions": [...], "label": int or null}).
The index holds each shard's size, sha256 and sample count, and beside each shard lies `shard-000000.npy`, the byte
ranges of its members: once the hash of a shard is known to be right, reading sample i is one `pread`.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import SampleError, ShardError
from clipkit.images import SUFFIXES

FORMAT = 1
MAX_CAPTION = 4096
_IMAGE, _TEXT, _META = 0, 1, 2
_BLOCK = 512


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
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictTarInfo:
        """Parse one 512-byte header block. Raises ShardError for anything but a header or the end block."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == _BLOCK and not any(buf):
                raise
            raise ShardError(f"damaged tar header ({error}) after {len(buf)} bytes read") from None


def scan(shard: Path) -> npt.NDArray[np.int64]:
    """Walk every header of a tar -> int64 [samples, 6]: offset and size of image, caption and metadata (-1: none).

    Raises ShardError naming the shard when it is cut, damaged, or holds what a shard must not.
    """
    rows: list[list[int]] = []
    size, last_key = shard.stat().st_size, None
    try:
        with tarfile.open(shard, "r:", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                if not member.isfile():
                    raise ShardError(f"member {member.name!r} is not a plain file")
                if member.offset_data + member.size > size:
                    raise ShardError(f"cut inside member {member.name!r}")
                key, suffix = os.path.splitext(member.name)
                if (column := _column(suffix)) is None:
                    continue
                if key != last_key:
                    rows.append([-1] * 6)
                    last_key = key
                rows[-1][2 * column : 2 * column + 2] = [member.offset_data, member.size]
    except (tarfile.TarError, ShardError, OSError) as error:
        raise ShardError(f"{shard} is damaged: {error}; pack it again or fetch it anew") from None
    return np.array(rows, dtype=np.int64).reshape(-1, 6)


def _column(suffix: str) -> int | None:
    if suffix.lower() in SUFFIXES:
        return _IMAGE
    return {".txt": _TEXT, ".json": _META}.get(suffix.lower())


def write_index(folder: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Scan every `*.tar` of `folder` and write offsets and `index.json`, with `extra` keys (classes, skips) in it."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"no .tar shards in {folder}; make some with `clipkit pack`")
    shards: list[dict[str, Any]] = []
    for tar in tars:
        offsets = scan(tar)
        np.save(tar.with_suffix(".npy"), offsets, allow_pickle=False)
        shards.append(
            {
                "name": tar.name,
                "bytes": tar.stat().st_size,
                "sha256": sha256(tar),
                "offsets_sha256": sha256(tar.with_suffix(".npy")),
                "samples": len(offsets),
            }
        )
    index = {"format": FORMAT, "samples": sum(int(s["samples"]) for s in shards), **(extra or {}), "shards": shards}
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
    return index


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Shards:
    """An opened pack: `len(shards)` samples, `shards.read(i)`.

    Opening checks that every shard is there with the size of the index, and, with `verify`, its sha256. A folder of
    shards made elsewhere gets its index on first opening.

    Raises ShardError naming the shard.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ShardError(f"no pack at {self.folder}; make one with `clipkit pack SOURCE {self.folder}`")
        self.index = self._load_index()
        self._shards = [self._check(entry, verify) for entry in self.index["shards"]]
        self._starts = [0, *accumulate(int(e["samples"]) for e in self.index["shards"])]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:  # file descriptors do not travel to worker processes
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
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

    def _load_index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.is_file():
            return write_index(self.folder)
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = index["format"] == FORMAT and all(e.keys() >= {"name", "bytes", "samples"} for e in index["shards"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} is not an index: {error}; delete it to have it made again") from None
        if not known:
            raise ShardError(f"{path} has format {index['format']!r}, this version reads {FORMAT}; pack again")
        return index

    def _check(self, entry: dict[str, Any], verify: bool) -> tuple[Path, npt.NDArray[np.int64]]:
        path = self.folder / entry["name"]
        if not path.is_file():
            raise ShardError(f"shard {path} is missing; the index lists it with {entry['samples']} samples")
        if path.stat().st_size != entry["bytes"]:
            raise ShardError(f"shard {path} is damaged: {path.stat().st_size} bytes found, {entry['bytes']} expected")
        if verify and sha256(path) != entry["sha256"]:
            raise ShardError(f"shard {path} is damaged: its sha256 is not that of the index; fetch or pack it again")
        try:
            offsets: npt.NDArray[np.int64] = np.load(path.with_suffix(".npy"), allow_pickle=False)
            intact = offsets.shape == (entry["samples"], 6) and (
                not verify or sha256(path.with_suffix(".npy")) == entry["offsets_sha256"]
            )
        except (OSError, ValueError):
            intact = False
        if not intact:
            offsets = scan(path)  # the shard itself is known to be right; what only points into it can be made again
        return path, offsets

    def read(self, i: int) -> Sample:
        """Sample i, undecoded. Raises SampleError ("no image", "no caption", "bad metadata")."""
        shard = bisect.bisect_right(self._starts, i) - 1
        path, offsets = self._shards[shard]
        local = i - self._starts[shard]
        row = offsets[local].tolist()
        if row[2 * _IMAGE] < 0:
            raise SampleError("no image", f"sample {local} of {path}")
        # The members of a sample lie together: one read fetches them all.
        present = [(row[c], row[c] + row[c + 1]) for c in (0, 2, 4) if row[c] >= 0]
        start, stop = min(p[0] for p in present), max(p[1] for p in present)
        block = os.pread(self._descriptor(shard), stop - start, start)
        image, text, meta = (
            block[row[c] - start : row[c] - start + row[c + 1]] if row[c] >= 0 else None for c in (0, 2, 4)
        )
        captions, label = _captions(text or b"", meta)
        if not captions:
            raise SampleError("no caption", f"sample {local} of {path}")
        return Sample(f"{path.stem}/{local}", image or b"", captions, label)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self._shards[shard][0], os.O_RDONLY)
        return self._files[shard]


def _captions(text: bytes, meta: bytes | None) -> tuple[tuple[str, ...], int | None]:
    captions, label = [text.decode("utf-8", errors="replace")], None
    if meta is not None:
        try:
            record = json.loads(meta)
            captions = list(record.get("captions", captions))
            label = record.get("label")
            well_formed = all(isinstance(c, str) for c in captions) and (label is None or isinstance(label, int))
        except (ValueError, AttributeError, TypeError):
            well_formed = False
        if not well_formed:
            raise SampleError("bad metadata", repr(meta[:60]))
    return tuple(c[:MAX_CAPTION] for c in captions if c and not c.isspace()), label
