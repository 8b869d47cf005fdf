"""Manifests of packs: `pack.json` lists the shards, their checksums, classes and what was skipped.

    {"format": 1, "samples": 12000, "classes": [["red circle"], ...], "templates": ["a {}.", ...],
     "skipped": {"not an image": 3}, "shards": [{"name": "shard-000000.tar", "bytes": 31457280, "sha256": "...",
     "offsets_sha256": "...", "samples": 10000}, ...]}

Version 0.1 called the file `index.json`, which is still read. Shards made elsewhere (webdataset, img2dataset) get a
manifest when they are first opened: beside them, or in the cache if their folder is read-only. It has "keys", the
number of the rule that groups members into samples, and no classes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.remote import Cache, NotFoundError, Store
from clipkit.data.tar_scan import is_hidden, scan
from clipkit.errors import ShardError, UsageError
from clipkit.inputs import check_writable
from clipkit.io import sha256, write_atomically
from clipkit.log import remark

MANIFEST = "pack.json"
FORMER = "index.json"
"""Name of the manifest in version 0.1, and of the description of an index of embeddings (zeroshot/index_files.py)."""
EMBEDDINGS = "embeddings.json"
"""Present name of that description."""
FORMAT = 1
KEYS = 2
"""Number of the rule that groups members of shards made elsewhere into samples (`tar_scan.split_key`)."""
_ENTRY = {"name", "bytes", "samples", "sha256"}


def write_manifest(
    folder: Path, entries: Sequence[Mapping[str, Any]], skipped: Mapping[str, int], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the manifest of some shards, with further keys `about`, such as classes -> its content."""
    samples = sum(int(entry["samples"]) for entry in entries)
    manifest = {"format": FORMAT, "samples": samples, **about, "skipped": dict(skipped), "shards": list(entries)}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


def index_shard(tar: Path, out: Path | None = None) -> tuple[dict[str, Any], Counter[str]]:
    """Scan a shard and write its offsets beside it, or to `out` -> its manifest entry, and refused members."""
    found = scan(tar)
    buffer = io.BytesIO()
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


def index_folder(folder: Path, about: Mapping[str, Any] | None = None, out: Path | None = None) -> dict[str, Any]:
    """Scan every shard of `folder`, made elsewhere, and write offsets and manifest beside them, or to `out`."""
    entries: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for tar in tars_of(folder):
        entry, refused = index_shard(tar, out)
        entries.append(entry)
        skipped += refused
    return write_manifest(out or folder, entries, skipped, {"keys": KEYS, **(about or {})})


def made_by_pack(manifest: Mapping[str, Any]) -> bool:
    """Whether `clipkit pack` made these shards; their captions are then clean."""
    return "classes" in manifest and "keys" not in manifest


def tar_files(folder: Path, pattern: str = "*.tar") -> list[Path]:
    """Tars in a folder, sorted, without hidden ones: macOS writes `._shard.tar` beside `shard.tar`."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def tars_of(folder: Path) -> list[Path]:
    """The shards in a folder, sorted. Raises ShardError when there is none."""
    tars = tar_files(folder)
    if not tars:
        if _has_embeddings(folder):
            raise ShardError(_no_pack(folder))
        what = f"no .tar shards in {folder}" if folder.is_dir() else f"there is no {folder}"
        raise ShardError(f"{what}; make a pack with `clipkit pack`")
    return tars


def is_pack(source: str | Path) -> bool:
    """Whether `source` is the URL of a pack, or a folder with a manifest.

    Raises ShardError for an index of embeddings.
    """
    if "://" in str(source) or _manifest_in(Path(source)) is not None:
        return True
    if _has_embeddings(Path(source)):
        raise ShardError(_no_pack(source))
    return False


def find_manifest(store: Store, cache: Cache) -> Path:
    """The manifest of a pack, a local file; for local shards made elsewhere it is made if need be.

    It lies beside them or, if their folder is read-only, in the cache, in a folder whose name is a hash of the shards'
    path, names, sizes and times. Raises ShardError when neither can be written to.
    """
    if store.remote:
        try:
            return store.get(MANIFEST)
        except NotFoundError as missing:
            with suppress(NotFoundError):
                return store.get(FORMER)
            raise missing
    folder = Path(store.source)
    beside = _manifest_in(folder)
    if beside is not None and not _is_outdated(beside):
        return beside
    cached = _place_in_cache(folder, cache)
    kept = _manifest_in(cached)
    if kept is not None and not _is_outdated(kept):
        return kept
    for old in filter(None, (beside, kept)):
        remark(f"clipkit: {old} was made by an older version with another rule for keys; it is made again")
    out = _writable(folder, cached)
    index_folder(folder, out=out)
    if out == cached:
        remark(f"clipkit: {folder} is read-only; the manifest of its shards is in {cached}")
    return out / MANIFEST


def load_manifest(store: Store, cache: Cache | None = None) -> tuple[dict[str, Any], Path]:
    """The manifest of a pack, and its file; for a folder of shards without one it is made.

    Raises ShardError when it is damaged or something else, and for shards that it does not list.
    """
    path = find_manifest(store, cache or Cache())
    manifest = _read(path, store.source)
    if not store.remote and "classes" not in manifest and (new := sorted(unlisted(Path(store.source), manifest))):
        raise ShardError(f"{path} does not list {new[0]}, which was added later; remove it to have it made again")
    return manifest, path


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"it holds a {type(manifest).__name__}")
        if _describes_embeddings(manifest):
            raise ShardError(_no_pack(source))
        known = manifest["format"] == FORMAT and all(entry.keys() >= _ENTRY for entry in manifest["shards"])
        names = [str(entry["name"]) for entry in manifest["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ShardError(
            f"{path} is not the manifest of a pack: {cause}; give the folder of a pack, or move this file away to have "
            "one made of the .tar shards beside it"
        ) from None
    if foreign := [name for name in names if "/" in name or not name.endswith(".tar")]:
        raise ShardError(f"{path} names the shard {foreign[0]!r}; a shard is a .tar beside its manifest")
    if not known:
        raise ShardError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}; pack again")
    return manifest


def unlisted(folder: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Names of the shards in a folder that its manifest does not list."""
    return {tar.name for tar in tar_files(folder)} - {str(entry["name"]) for entry in manifest["shards"]}


def check_count(shard: Path, found: int, entry: Mapping[str, Any]) -> None:
    """Check the number of samples in a shard against its manifest entry. Raises ShardError."""
    if found != entry["samples"]:
        raise ShardError(
            f"shard {shard} is damaged: {found} samples found, {entry['samples']} expected by the manifest"
        )


def _manifest_in(folder: Path) -> Path | None:
    """The manifest in a folder, under its present or former name."""
    if (folder / MANIFEST).is_file():
        return folder / MANIFEST
    former = folder / FORMER
    return former if former.is_file() and not _describes_embeddings(_peek(former)) else None


def _has_embeddings(folder: Path) -> bool:
    """Whether a folder is an index of embeddings, of this version or of 0.1."""
    return (folder / EMBEDDINGS).is_file() or _describes_embeddings(_peek(folder / FORMER))


def _describes_embeddings(content: Mapping[str, Any]) -> bool:
    return {"weights", "pictures"} <= content.keys() and "shards" not in content


def _no_pack(source: str | Path) -> str:
    return f"{source} is an index of embeddings, not a pack; `clipkit search` reads it"


def _peek(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is none. `_read` reports what is wrong with a manifest."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_outdated(path: Path) -> bool:
    """Whether an older version made this manifest of foreign shards, by another rule for keys."""
    content = _peek(path)
    foreign = "shards" in content and "classes" not in content
    return foreign and content.get("format") == FORMAT and content.get("keys") != KEYS


def _place_in_cache(folder: Path, cache: Cache) -> Path:
    tars = [(tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars_of(folder)]
    identity = hashlib.sha256(repr((str(folder.resolve()), tars)).encode("utf-8", "surrogateescape")).hexdigest()
    return cache.root / "indexes" / identity[:16]


def _writable(folder: Path, cached: Path) -> Path:
    """The first of these that can be written to. Raises ShardError when neither can."""
    try:
        check_writable(folder)
        return folder
    except UsageError as error:
        try:
            check_writable(cached)
        except UsageError as other:
            raise ShardError(
                f"the shards in {folder} have no manifest, and there is no place for one: {error}; {other}; set "
                "data.cache or XDG_CACHE_HOME to a writable folder"
            ) from None
    cached.mkdir(parents=True, exist_ok=True)
    return cached
