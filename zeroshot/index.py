"""Embedding indexes on disk, and nearest-neighbour search in them by text or by image.

An index is a folder: `part-00000.npy` (float16 unit vectors), `part-00000.json` (their keys and marks, and what was
skipped) and so on, each part written when it is complete, so that an interrupted run resumes and several ranks share
the work; and `embeddings.json` (`index.json` in version 0.1), which names the source and the model. When pictures have
changed, parts of another series (`part-1a2b3c4d-00000.npy`) are written beside them, with the vectors of unchanged
pictures; `embeddings.json` names the series in use, so that until it is written the former index stays in use.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit import distributed
from clipkit.errors import CheckpointError, SampleError, ShardError, UsageError
from clipkit.inputs import file_of
from clipkit.io import read_object, write_atomically
from clipkit.log import progress, say
from clipkit.models.pretrained import Pretrained, fingerprint, load
from clipkit.zeroshot import galleries
from clipkit.zeroshot.galleries import Gallery, Pack, open_gallery
from clipkit.zeroshot.heads import embed_texts
from clipkit.zeroshot.index_files import (
    FILE,
    FIRST,
    FORMAT,
    PART_FILE,
    Array,
    Labels,
    Places,
    description_file,
    description_of,
    is_pack,
    marks_of,
    part_file,
    places_of,
    read_array,
    write_array,
)
from clipkit.zeroshot.similarity import embed_images, read_images

_KEYS = ("source", "model", "weights", "dim", "count", "part_size")
PART = 10_000
"""Pictures in a part."""
FAISS_ABOVE = 1_000_000
"""Vectors beyond which approximate search is used (faiss, the [search] extra)."""
_CHUNK = 1024


@dataclass(frozen=True)
class Built:
    """Counts of an index, and of its changes since the run before (a new index had nothing)."""

    pictures: int
    skipped: Counter[str]
    added: int
    changed: int
    dropped: int
    kept: int

    @classmethod
    def between(cls, before: Mapping[str, str], index: Index) -> Built:
        """Compare marks by key with those of an index."""
        now = index.marks
        kept = sum(before.get(key) == mark for key, mark in now.items())
        changed = len(now.keys() & before.keys()) - kept
        dropped = len(before.keys() - now.keys())
        return cls(len(index), index.skipped, len(now) - kept - changed, changed, dropped, kept)


def build(
    clip: Pretrained,
    model: str,
    gallery: Gallery,
    out: Path,
    texts: bool = False,
    batch_size: int = 128,
    workers: int = 0,
    part_size: int = PART,
) -> Built:
    """Embed every picture of `gallery` into `out`, with `texts` also the first captions of a pack.

    The ranks share the parts; existing parts are kept. When pictures have changed, the vectors of unchanged ones are
    reused. Unreadable pictures are skipped and counted.
    Raises UsageError if `out` holds an index of another source or model, or `texts` is asked of a folder.
    """
    if texts and not isinstance(gallery, Pack):
        raise UsageError(f"{gallery.source} has no captions to embed; they come with packs (clipkit pack)")
    if _same_place(gallery.source, str(out)):
        raise UsageError(f"{out} is the folder of the pictures; give another for the index")
    about = {
        "format": FORMAT,
        "source": gallery.source,
        "pictures": gallery.identity(),
        "model": model,
        "weights": fingerprint(clip.model),
        "dim": clip.model.config.embed_dim,
        "count": len(gallery),
        "part_size": part_size,
        "texts": texts,
    }
    series, before = _begin(out, about)
    parts = range(-(-len(gallery) // part_size))
    mine = [p for p in parts if p % distributed.world_size() == distributed.rank()]
    todo = [p for p in mine if not part_file(out, series, p, "json").is_file()]
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {len(mine)} parts are there already")
    places = places_of(out) if todo else {}
    for p in progress(todo, len(todo), "parts"):
        rows = range(p * part_size, min((p + 1) * part_size, len(gallery)))
        _write_part(clip, gallery, part_file(out, series, p, "json"), rows, texts, batch_size, workers, places)
    distributed.barrier()
    if distributed.rank() == 0:
        _finish(out, series, about)
    distributed.barrier()
    return Built.between(before, Index(out))


def _begin(out: Path, about: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The series of parts to write, and the marks by key of the index in `out` before an update."""
    if description_of(out) is None and is_pack(out):
        raise UsageError(f"{out} is a pack; give another folder for the index")
    distributed.barrier()
    if distributed.rank() == 0 and description_of(out) is None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / FILE, json.dumps(about, indent=1))
    distributed.barrier()
    found = read_object(description_file(out))
    for k in about:
        same = found.get(k) == about[k] or (k == "source" and _same_place(str(found.get(k)), about[k]))
        if not same and k == "weights":
            raise UsageError(
                f"{out} holds features of {found.get('model')} (weights {found.get('weights')}), not of "
                f"{about['model']} ({about['weights']}); give the model that it is of, or another folder"
            )
        if not same and k not in ("model", "pictures", "count"):
            raise UsageError(
                f"{out} holds another index: {k} is {found.get(k)!r}, not {about[k]!r}; give another folder"
            )
    if (found.get("pictures"), found.get("count")) == (about["pictures"], about["count"]):
        return str(found.get("series", FIRST)), {}
    before = marks_of(out, str(found.get("series", FIRST)))
    if distributed.rank() == 0:
        if any(not mark for mark in before.values()):
            say(f"clipkit: {out} is of an older version, which did not record changes of pictures; embedding all")
        else:
            say(f"clipkit: {out}: its pictures have changed; updating")
    return f"{FIRST}-{about['pictures'][:8]}", before


def _same_place(one: str, other: str) -> bool:
    return "://" not in one + other and Path(one).resolve() == Path(other).resolve()


def _finish(out: Path, series: str, about: dict[str, Any]) -> None:
    """Put this series into use, remove the parts of others, and build faiss's index for a large one."""
    if str(read_object(description_file(out)).get("series", FIRST)) != series:
        write_atomically(description_file(out), json.dumps({**about, "series": series}, indent=1))
    index = Index(out)
    for path in out.iterdir():
        part = PART_FILE.fullmatch(path.name)
        faiss = path.name.startswith("index") and path.suffix == ".faiss" and path != index.approximate
        if (part and part[1] != series) or faiss or (path.name.startswith(".part-") and path.suffix == ".tmp"):
            path.unlink()
    if len(index) > FAISS_ABOVE and not index.approximate.is_file():
        index.make_approximate()


def _write_part(
    clip: Pretrained,
    gallery: Gallery,
    part: Path,
    rows: range,
    texts: bool,
    batch_size: int,
    workers: int,
    places: Places,
) -> None:
    """Write vectors and labels of some rows; vectors whose places are known are copied."""
    marked = {row: (gallery.key(row), gallery.mark(row)) for row in rows}
    known = {row: places[label] for row, label in marked.items() if label in places}
    found = galleries.embed_pictures(clip, gallery, [row for row in rows if row not in known], batch_size, workers)
    kept = sorted([*known, *found.rows])
    if texts:
        assert isinstance(gallery, Pack)
        captions = [gallery.shards.read(row).captions[0] for row in found.rows]
        text_features = embed_texts(clip.model, clip.tokenizer, captions) if captions else found.features
        write_array(part.with_suffix(".texts.npy"), _merged(kept, known, found.rows, text_features, ".texts.npy"))
    write_array(part.with_suffix(".npy"), _merged(kept, known, found.rows, found.features, ".npy"))
    about = {
        "rows": kept,
        "keys": [marked[row][0] for row in kept],
        "marks": [marked[row][1] for row in kept],
        "skipped": found.reasons,
        "unread": [marked[row] for row in found.skipped],
    }
    write_atomically(part, json.dumps(about))


def _merged(
    kept: Sequence[int], known: Mapping[int, tuple[Path, int]], rows: Sequence[int], vectors: Tensor, suffix: str
) -> Tensor:
    """Vectors of `kept` rows [len(kept), D], float16: from the parts where they are known, else from `vectors`."""
    new = dict(zip(rows, vectors.half().cpu(), strict=True))
    merged = torch.zeros(len(kept), vectors.shape[1], dtype=torch.half)
    opened = lru_cache(read_array)
    for i, row in enumerate(kept):
        part, place = known.get(row, (None, 0))
        merged[i] = new[row] if part is None else torch.from_numpy(opened(part.with_suffix(suffix))[place])
    return merged


@dataclass(frozen=True)
class Hit:
    """A nearest neighbour of a query: its key, its row in the gallery, and its cosine with the query."""

    key: str
    row: int
    score: float


class Index:
    """An embedding index on disk. Raises CheckpointError for any other folder, and for an incomplete index."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        description = description_file(self.folder)
        self.about = read_object(description)
        if missing := [key for key in _KEYS if key not in self.about]:
            raise CheckpointError(f"{description} is damaged: it has no {missing[0]}; `clipkit index` makes indexes")
        if self.about.get("format") != FORMAT:
            raise CheckpointError(f"{folder} is an index of format {self.about.get('format')!r}; {FORMAT} is known")
        series = str(self.about.get("series", FIRST))
        self.approximate = self.folder / f"index{series.removeprefix(FIRST)}.faiss"
        parts = [
            part_file(self.folder, series, p, "json")
            for p in range(-(-int(self.about["count"]) // int(self.about["part_size"])))
        ]
        if lacking := [p for p, part in enumerate(parts) if not part.is_file()]:
            raise CheckpointError(f"{folder} is incomplete: part {lacking[0]} is missing; run the same command again")
        self._labels = [Labels.read(part) for part in parts]
        self._vectors = [
            self._map(part.with_suffix(".npy"), len(labels.keys))
            for part, labels in zip(parts, self._labels, strict=True)
        ]

    def _map(self, path: Path, rows: int) -> Array:
        found = read_array(path)
        expected = (rows, self.about["dim"])
        if found.shape != expected or found.dtype != np.float16:
            raise CheckpointError(f"{path} is damaged: it is {found.dtype} {found.shape}, not float16 {expected}")
        return found

    def __len__(self) -> int:
        return sum(map(len, self._vectors))

    @cached_property
    def keys(self) -> list[str]:
        """The pictures' names."""
        return [key for labels in self._labels for key in labels.keys]

    @cached_property
    def rows(self) -> list[int]:
        """Their places in the gallery."""
        return [row for labels in self._labels for row in labels.rows]

    @cached_property
    def marks(self) -> dict[str, str]:
        """Marks by key; "" where an older version wrote the part."""
        pairs = (zip(labels.keys, labels.marks or [""] * len(labels.keys), strict=True) for labels in self._labels)
        return {key: mark for each in pairs for key, mark in each}

    @property
    def skipped(self) -> Counter[str]:
        """Pictures that could not be read, by reason."""
        return sum((labels.skipped for labels in self._labels), Counter[str]())

    def differences(self, gallery: Gallery) -> str:
        """Differences between the pictures in `gallery` and the embedded ones, in words; "" if there are none."""
        if gallery.identity() == self.about.get("pictures"):
            return ""
        before = self.marks | {key: mark for labels in self._labels for key, mark in labels.unread}
        now = {gallery.key(i): gallery.mark(i) for i in range(len(gallery))}
        counts = {
            "new": len(now.keys() - before.keys()),
            "changed": sum(before[key] not in ("", now[key]) for key in now.keys() & before.keys()),
            "gone": len(before.keys() - now.keys()),
        }
        return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "some changed"

    def search(self, queries: Tensor, k: int = 12) -> list[list[Hit]]:
        """Unit vectors [Q, D] -> the k nearest neighbours of each by cosine, best first.

        Exact; approximate beyond a million pictures (faiss). Raises UsageError for queries of another model's width.
        """
        if queries.ndim != 2 or queries.shape[1] != self.about["dim"]:
            raise UsageError(f"queries are {list(queries.shape)}; this index needs [Q, {self.about['dim']}]")
        queries, k = queries.float().cpu(), min(k, len(self))
        scores, places = self._approximate(queries, k) if self.approximate.is_file() else self._exact(queries, k)
        return [
            [Hit(self.keys[i], self.rows[i], s) for s, i in zip(row_scores, row_places, strict=True) if i >= 0]
            for row_scores, row_places in zip(scores.tolist(), places.tolist(), strict=True)
        ]

    def _exact(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = torch.empty(len(queries), len(self))
        start = 0
        for vectors in self._vectors:
            for i in range(0, len(vectors), _CHUNK):  # in chunks, whose float32 copy fits the processor's cache
                chunk = torch.from_numpy(vectors[i : i + _CHUNK]).float()
                scores[:, start : start + len(chunk)] = queries @ chunk.T
                start += len(chunk)
        best = scores.topk(k, dim=1)
        return best.values, best.indices

    def make_approximate(self) -> None:
        """Write faiss's inverted-file index for approximate search: cells of a coarse quantiser, 16-bit vectors."""
        faiss = _faiss()
        dim, cells = int(self.about["dim"]), max(1, int(4 * len(self) ** 0.5))
        quantiser = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFScalarQuantizer(
            quantiser, dim, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        chance = np.random.default_rng(0)
        everything = np.concatenate([np.asarray(v) for v in self._vectors])
        sample = chance.choice(len(self), size=min(len(self), 64 * cells), replace=False)
        index.train(everything[np.sort(sample)].astype(np.float32))
        for i in range(0, len(everything), 1 << 16):
            index.add(everything[i : i + (1 << 16)].astype(np.float32))
        index.nprobe = max(1, cells // 16)
        aside = self.approximate.with_suffix(".faiss.tmp")
        faiss.write_index(index, str(aside))
        aside.replace(self.approximate)

    @cached_property
    def _faiss_index(self) -> Any:
        return _faiss().read_index(str(self.approximate))

    def _approximate(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, places = self._faiss_index.search(queries.numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(places)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise UsageError('beyond a million vectors the search needs faiss: pip install "clipkit[search]"') from None
    return faiss


def load_model(index: Index, model: str | None = None, device: str = "auto") -> Pretrained:
    """Load the model of an index, or `model` instead. Raises CheckpointError when its weights are others."""
    name = model or str(index.about["model"])
    clip = load(name, device)
    if fingerprint(clip.model) != index.about["weights"]:
        raise CheckpointError(f"{index.folder} was made with other weights than those of {name}; give that model")
    return clip


def read_query(query: str) -> str | Image.Image:
    """The picture in the file that `query` names, or `query` itself, a description.

    Raises UsageError for an empty query and a missing file, DataError for a file that is no picture.
    """
    if not query.strip():
        raise UsageError("the query is empty; describe a picture, or give the file of one")
    file = file_of(query, "the query")
    return query if file is None else read_images([file])[0]


def embed_asked(clip: Pretrained, asked: str | Image.Image) -> Tensor:
    """A description or a picture -> a unit vector [1, D]."""
    return embed_texts(clip.model, clip.tokenizer, [asked]) if isinstance(asked, str) else embed_images(clip, [asked])


def embed_query(index: Index, query: str, model: str | None = None, device: str = "auto") -> Tensor:
    """A query, as `read_query` reads it -> a unit vector [1, D] of the index's model; raises what both raise."""
    asked = read_query(query)
    return embed_asked(load_model(index, model, device), asked)


def show(index: Index, hits: Sequence[Hit], gallery: Gallery | None = None) -> list[tuple[bytes | str, str]]:
    """For a contact sheet: each picture's bytes, or why it cannot be read now, and its key and score.

    Pictures are looked up by their keys, since their rows change when files are added to a folder.
    """
    gallery = gallery or open_gallery(index.about["source"], quietly=True)
    rows = {hit.key: hit.row for hit in hits}
    if gallery.identity() != index.about["pictures"]:
        rows = {key: i for i in range(len(gallery)) if (key := gallery.key(i)) in rows}
    found: list[tuple[bytes | str, str]] = []
    for hit in hits:
        try:
            image: bytes | str = gallery.image(rows[hit.key]) if hit.key in rows else "it is gone"
        except (SampleError, ShardError) as error:
            image = str(error)
        found.append((image, f"{hit.score:.3f} {hit.key}"))
    return found
