"""Looking into a pack before training on it: is every byte what the index says, and do the captions fit the images?"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from clipkit.data.images import decode
from clipkit.data.manifest import check_count, load_manifest, unlisted
from clipkit.data.remote import Cache, open_store
from clipkit.data.shards import Shards
from clipkit.data.tar_scan import scan
from clipkit.errors import SampleError, ShardError, UsageError
from clipkit.io import sha256
from clipkit.log import progress

_TILE, _MARGIN, _LINE, _LINES = 160, 8, 13, 4


@dataclass
class Report:
    """What `verify` found.

    damaged: shard -> what is wrong with it. incomplete: samples without image or caption, of all. bad: samples that
    cannot be used, of those that were decoded. skipped: what was not taken when the index was made.
    """

    source: str
    shards: int = 0
    samples: int = 0
    decoded: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def verify(source: str, per_shard: int = 16, cache: Cache | None = None) -> Report:
    """Check size, sha256 and structure of every shard, and decode `per_shard` samples of each, spread evenly.

    Goes on after damage, so that all of it is found. Raises ShardError only when there is no index to check against.
    """
    store = open_store(source, cache)
    manifest, _ = load_manifest(store, cache)
    report = Report(
        source, len(manifest["shards"]), int(manifest["samples"]), skipped=dict(manifest.get("skipped", {}))
    )
    whole: list[npt.NDArray[np.int64]] = []  # of each shard, the samples that can be read
    for entry in progress(manifest["shards"], len(manifest["shards"]), "verifying"):
        try:
            path = store.get(entry["name"], entry["bytes"], entry["sha256"])
            if sha256(path) != entry["sha256"]:
                raise ShardError("its sha256 is not that of the manifest")
            found = scan(path)
            check_count(path, len(found.offsets), entry)
            incomplete = found.incomplete()
            for reason, which in incomplete.items():
                if which.any():
                    report.incomplete[reason] = report.incomplete.get(reason, 0) + int(which.sum())
            whole.append(np.flatnonzero(~np.logical_or.reduce(list(incomplete.values()))))
        except (ShardError, OSError) as error:
            report.damaged[entry["name"]] = str(error)
    if not store.remote:
        report.damaged.update(dict.fromkeys(sorted(unlisted(Path(source), manifest)), "the manifest does not list it"))
    if not report.damaged:
        report.decoded, bad = _decode_some(Shards(source, verify=False, cache=cache), whole, per_shard)
        report.bad = dict(bad)
    return report


def _decode_some(shards: Shards, whole: Sequence[npt.NDArray[np.int64]], per_shard: int) -> tuple[int, Counter[str]]:
    bad: Counter[str] = Counter()
    chosen: list[int] = []
    for start, samples in zip(shards.starts, whole, strict=False):
        n = min(per_shard, len(samples))
        chosen += [start + int(samples[k * len(samples) // n]) for k in range(n)]
    for i in progress(chosen, len(chosen), "decoding"):
        try:
            decode(shards.read(i).image)
        except SampleError as error:
            bad[error.reason] += 1
    return len(chosen), bad


def sheet(shards: Shards, n: int, seed: int) -> Image.Image:
    """`n` random samples of a pack with their first captions under them, as one picture.

    Raises UsageError when none of them can be shown.
    """
    chosen = np.random.default_rng(seed).choice(len(shards), size=min(n, len(shards)), replace=False)
    shown: list[tuple[bytes | str, str]] = []
    for i in sorted(chosen):
        try:
            sample = shards.read(int(i))
            shown.append((sample.image, sample.captions[0]))
        except SampleError as error:
            shown.append((str(error), ""))
    if not shown:
        raise UsageError(f"{shards.source} holds no sample to show")
    return contact_sheet(shown)


def contact_sheet(shown: Sequence[tuple[bytes | str, str]]) -> Image.Image:
    """Images (their bytes, or what is wrong with them) with captions, as one picture; at least one."""
    tiles = [_tile(image, caption) for image, caption in shown]
    columns = int(np.ceil(np.sqrt(len(tiles))))
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    picture = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    for k, tile in enumerate(tiles):
        picture.paste(tile, (_MARGIN + k % columns * width, _MARGIN + k // columns * height))
    return picture


def _tile(content: bytes | str, caption: str) -> Image.Image:
    tile = Image.new("RGB", (_TILE + _MARGIN, _TILE + _LINES * _LINE + _MARGIN), "white")
    draw = ImageDraw.Draw(tile)
    try:
        if isinstance(content, str):
            raise SampleError(content)
        image = decode(content)
        enlarged = Image.Resampling.NEAREST if max(image.size) * 2 <= _TILE else Image.Resampling.BICUBIC
        scale = _TILE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, enlarged)
        tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    except SampleError as error:
        draw.rectangle((0, 0, _TILE - 1, _TILE - 1), outline="red")
        caption = str(error)
    lines = textwrap.wrap(caption, width=26, max_lines=_LINES, placeholder=" ...") or ["(empty)"]
    font = ImageFont.load_default(11)
    for k, line in enumerate(lines):
        draw.text((0, _TILE + 2 + k * _LINE), line, fill="black", font=font)
    return tile
