"""Packs: webdataset shards with a manifest, verified by checksum and read at random.

A pack is a folder of `shard-000000.tar` ... with a manifest `pack.json` (manifest.py). A sample is a group of adjacent
members that share a key: `<key>.jpg|png|webp`, `<key>.txt` (its first caption) and `<key>.json` ({"captions": [...],
"label": int or null}). Beside each shard lies `shard-000000.npy`, the byte ranges of its members: reading sample i is
one `pread`.

A pack lies in a folder or behind a URL, from which whole shards are fetched when they are first needed. In shards made
elsewhere (webdataset, img2dataset) captions are taken from the .txt, or from `captions` or `caption` in the .json.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.data import captions
from clipkit.data.manifest import check_count, load_manifest, made_by_pack
from clipkit.data.remote import Cache, open_store
from clipkit.data.tar_scan import IMAGE, scan
from clipkit.errors import SampleError, ShardError
from clipkit.io import sha256

_OPEN_FILES = 64


@dataclass(frozen=True)
class Sample:
    """One raw sample: `image` are undecoded bytes, `label` indexes the pack's classes or is None."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: int | None


class Shards:
    """An opened pack: `len(shards)` samples, `shards.read(i)`.

    `source` is a folder, or an http(s) or fsspec URL of one; fetched files stay in `cache`. Opening a folder checks
    that every shard is there with the size in the manifest, and, with `verify`, its sha256; a shard is always checked
    when it is fetched. A folder of shards made elsewhere gets its manifest on first opening, in `cache` if it is
    read-only.

    Raises ShardError naming the shard.
    """

    def __init__(self, source: str | Path, verify: bool = True, cache: Cache | None = None) -> None:
        self.store = open_store(source, cache)
        if not self.store.remote and not Path(source).is_dir():
            raise ShardError(f"no pack at {source}; make one with `clipkit pack SOURCE {source}`")
        self.source = self.store.source
        self.index, path = load_manifest(self.store, cache)
        self._offsets_folder = None if self.store.remote else path.parent
        self._classes = len(self.index.get("classes", []))
        self._cleaned = made_by_pack(self.index)
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
        """Number of files skipped when the pack, or the manifest of shards made elsewhere, was made, by reason."""
        return dict(self.index.get("skipped", {}))

    def verify(self, proceed: Callable[[], bool] = lambda: True) -> None:
        """Check the sha256 of every shard, until `proceed` returns False.

        Raises ShardError naming the first that is damaged.
        """
        for entry in self.entries:
            if not proceed():
                return
            path = self._fetch(entry)
            if sha256(path) != entry["sha256"]:
                raise ShardError(
                    f"shard {path} is damaged: its sha256 is not that of the manifest; fetch or pack it again"
                )

    def _fetch(self, entry: dict[str, Any]) -> Path:
        return self.store.get(entry["name"], entry["bytes"], entry["sha256"])

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch some shards; errors are raised when the shards are read."""
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
        """The byte ranges of a shard's members, from beside it; scanned from the shard if those are lost or damaged."""
        beside = (self._offsets_folder or path.parent) / f"{path.stem}.npy"
        with contextlib.suppress(OSError, ValueError, KeyError):
            content = beside.read_bytes()
            if hashlib.sha256(content).hexdigest() == entry["offsets_sha256"]:
                offsets: npt.NDArray[np.int64] = np.load(io.BytesIO(content), allow_pickle=False)
                return offsets
        found = scan(path).offsets
        check_count(path, len(found), entry)
        return found

    def locate(self, i: int) -> tuple[int, int]:
        """Shard of sample i, and its number in that shard."""
        shard = bisect.bisect_right(self.starts, i) - 1
        return shard, i - self.starts[shard]

    def name(self, i: int) -> str:
        """Sample i in messages: its shard and its number in that shard."""
        shard, local = self.locate(i)
        return f"{self.source}/{self.entries[shard]['name']}, sample {local}"

    def read(self, i: int) -> Sample:
        """Sample i, undecoded. Raises SampleError ("no image", "no caption", "bad metadata")."""
        shard, local = self.locate(i)
        descriptor, offsets = self._open(shard)
        row = offsets[local].tolist()
        if row[2 * IMAGE] < 0:
            raise SampleError("no image", self.name(i))
        ranges = [(row[c], row[c] + row[c + 1]) if row[c] >= 0 else None for c in (0, 2, 4)]
        present = [there for there in ranges if there is not None]
        start = min(first for first, _ in present)
        stop = max(last for _, last in present)
        try:
            block = os.pread(descriptor, stop - start, start)  # the members of a sample are adjacent: one read
        except OSError as error:
            raise ShardError(f"{self.name(i)} cannot be read: {error.strerror}") from None
        image, text, meta = (None if there is None else block[there[0] - start : there[1] - start] for there in ranges)
        found, label = captions.parse(text or b"", meta, self._classes, self._cleaned)
        if not found:
            raise SampleError("no caption", self.name(i))
        return Sample(f"{Path(self.entries[shard]['name']).stem}/{local}", image or b"", found, label)

    def captions(self, limit: int) -> list[str]:
        """Every caption of `limit` samples, or fewer, spread evenly; of a pack behind a URL, of its first shard."""
        last = self.starts[1] if self.store.remote else len(self)
        found: list[str] = []
        for i in range(0, last, max(1, -(-last // limit))):
            with contextlib.suppress(SampleError):
                found.extend(self.read(i).captions)
        return found
