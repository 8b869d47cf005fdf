"""Embeddings of many pictures on disk, and search in them by text or by picture.

An index is a folder: `part-00000.npy` (float16 unit vectors), `part-00000.json` (their keys, and what was skipped) and
so on, each part written when it is whole, so that an interrupted run goes on and several ranks share the work; and
`index.json`, which says what the parts are of.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit import distributed
from clipkit.errors import CheckpointError, DataError, SampleError, ShardError, UsageError
from clipkit.images import decode, preprocessing
from clipkit.pretrained import Pretrained, fingerprint, load
from clipkit.records import progress, read_object, say, write_atomically
from clipkit.shards import Shards
from clipkit.sources import images_of
from clipkit.zeroshot.heads import embed_texts
from clipkit.zeroshot.similarity import embed_images, read_images

FORMAT = 1
PART = 10_000
"""Pictures in a part."""
FAISS_ABOVE = 1_000_000
"""Vectors beyond which an approximate index is made (the [search] extra)."""
_CHUNK = 1024

Array = np.ndarray[Any, np.dtype[np.float16]]


class Gallery(Protocol):
    """Pictures with names, in a fixed order."""

    @property
    def source(self) -> str:
        """The folder or URL as it was given."""

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """Hash of what decides keys and images; an index goes on only with the same."""

    def key(self, i: int) -> str:
        """What the picture is called."""

    def image(self, i: int) -> bytes:
        """Its bytes, encoded. Raises SampleError or ShardError."""


class _Folder:
    """Every image file below a folder; a key is its path in it."""

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self._folder, self._paths = folder, images_of(folder)

    def __len__(self) -> int:
        return len(self._paths)

    def identity(self) -> str:
        files = [(self.key(i), *_size_and_time(path)) for i, path in enumerate(self._paths)]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def key(self, i: int) -> str:
        return self._paths[i].relative_to(self._folder).as_posix()

    def image(self, i: int) -> bytes:
        try:
            return self._paths[i].read_bytes()
        except OSError as error:
            raise SampleError("unreadable file", str(error)) from None


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class _Pack:
    """The images of a pack; a key is shard and sample."""

    def __init__(self, source: str) -> None:
        self.source, self.shards = source, Shards(source, verify=False)

    def __len__(self) -> int:
        return len(self.shards)

    def identity(self) -> str:
        digests = [entry["sha256"] for entry in self.shards.entries]
        return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]

    def key(self, i: int) -> str:
        return self.shards.name(i)

    def image(self, i: int) -> bytes:
        return self.shards.read(i).image


def open_gallery(source: str) -> Gallery:
    """A folder of images, or a pack (folder or URL). Raises DataError for a folder without images."""
    if "://" in source or (Path(source) / "index.json").is_file():
        return _Pack(source)
    if not Path(source).is_dir():
        raise DataError(f"no folder at {source}")
    gallery = _Folder(Path(source))
    if not len(gallery):
        raise DataError(f"{source} holds no images (JPEG, PNG or WebP)")
    return gallery


class _Pixels(Dataset[tuple[int, Tensor, str]]):
    """Some rows of a gallery: row, pixels, and why there are none, if there are none."""

    def __init__(self, gallery: Gallery, rows: range, clip: Pretrained) -> None:
        self.gallery, self.rows, self.preprocess = gallery, rows, preprocessing(clip.model.config)
        self.size = clip.model.config.image_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, Tensor, str]:
        try:
            return self.rows[i], self.preprocess(decode(self.gallery.image(self.rows[i]))), ""
        except SampleError as error:
            return self.rows[i], torch.zeros(3, self.size, self.size, dtype=torch.uint8), error.reason


def build(
    clip: Pretrained,
    model: str,
    gallery: Gallery,
    out: Path,
    texts: bool = False,
    batch_size: int = 128,
    workers: int = 0,
    part_size: int = PART,
) -> Counter[str]:
    """Embed every picture of `gallery` into `out`, with `texts` also the first captions of a pack -> skipped by reason.

    All ranks share the parts; parts that are there are kept. Unreadable pictures are skipped and counted.
    Raises UsageError if `out` holds an index of something else (also of the same folder before it changed), or texts
    are wanted of a folder.
    """
    if texts and not isinstance(gallery, _Pack):
        raise UsageError(f"{gallery.source} has no captions to embed; they come with packs (clipkit pack)")
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
    _begin(out, about)
    parts = range(-(-len(gallery) // part_size))
    mine = [p for p in parts if p % distributed.world_size() == distributed.rank()]
    todo = [p for p in mine if not _part(out, p, "json").is_file()]
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {len(mine)} parts are there already")
    for p in progress(todo, len(todo), "parts"):
        rows = range(p * part_size, min((p + 1) * part_size, len(gallery)))
        _write_part(clip, gallery, out, p, rows, texts, batch_size, workers)
    distributed.barrier()
    index = Index(out)
    if distributed.rank() == 0 and len(index) > FAISS_ABOVE:
        index.make_approximate()
    distributed.barrier()
    return index.skipped


def _part(folder: Path, number: int, kind: str) -> Path:
    return folder / f"part-{number:05d}.{kind}"


def _begin(out: Path, about: dict[str, Any]) -> None:
    file = out / "index.json"
    if distributed.rank() == 0 and not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(about, indent=1))
    distributed.barrier()
    found = read_object(file)
    if differing := [k for k in about if found.get(k) != about[k] and k != "model"]:
        k = differing[0]
        raise UsageError(f"{out} holds another index: {k} is {found.get(k)!r}, not {about[k]!r}; give another folder")


@torch.no_grad()
def _write_part(
    clip: Pretrained, gallery: Gallery, out: Path, number: int, rows: range, texts: bool, batch_size: int, workers: int
) -> None:
    device, kept, skipped = clip.model.log_logit_scale.device, [], Counter[str]()
    vectors = []
    loader = DataLoader(_Pixels(gallery, rows, clip), batch_size=batch_size, num_workers=workers)
    for batch, pixels, reasons in progress(loader, len(loader), "pictures"):
        good = [i for i, reason in enumerate(reasons) if not reason]
        skipped.update(reason for reason in reasons if reason)
        if good:
            vectors.append(clip.model.encode_image(pixels[good].to(device)).half().cpu())
            kept += [int(batch[i]) for i in good]
    embedded = torch.cat(vectors) if vectors else torch.zeros(0, clip.model.config.embed_dim, dtype=torch.half)
    if texts:
        assert isinstance(gallery, _Pack)
        captions = [gallery.shards.read(row).captions[0] for row in kept]
        described = embed_texts(clip.model, clip.tokenizer, captions) if captions else embedded
        _write_array(_part(out, number, "texts.npy"), described.half().cpu())
    _write_array(_part(out, number, "npy"), embedded)
    about = {"rows": kept, "keys": [gallery.key(row) for row in kept], "skipped": dict(skipped)}
    write_atomically(_part(out, number, "json"), json.dumps(about))


def _write_array(path: Path, values: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values.numpy())
    write_atomically(path, buffer.getvalue())


@dataclass(frozen=True)
class Hit:
    """A picture that was found: its key, its row in the gallery, and its cosine with the query."""

    key: str
    row: int
    score: float


class Index:
    """An index on disk. Raises CheckpointError for a folder that is none, or is not whole."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise CheckpointError(f"{folder} is not an index; clipkit index makes one")
        self.about = read_object(self.folder / "index.json")
        if self.about.get("format") != FORMAT:
            raise CheckpointError(f"{folder} is an index of format {self.about.get('format')!r}; {FORMAT} is known")
        parts = range(-(-int(self.about["count"]) // int(self.about["part_size"])))
        if missing := [p for p in parts if not _part(self.folder, p, "json").is_file()]:
            raise CheckpointError(f"{folder} is not whole: part {missing[0]} is missing; run the same command again")
        self._labels = [read_object(_part(self.folder, p, "json")) for p in parts]
        self._vectors = [self._map(_part(self.folder, p, "npy"), len(a["keys"])) for p, a in enumerate(self._labels)]

    def _map(self, path: Path, rows: int) -> Array:
        try:
            found: Array = np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        due = (rows, self.about["dim"])
        if found.shape != due or found.dtype != np.float16:
            raise CheckpointError(f"{path} is damaged: {found.dtype} {found.shape}, float16 {due} due")
        return found

    def __len__(self) -> int:
        return sum(map(len, self._vectors))

    @cached_property
    def keys(self) -> list[str]:
        """The pictures' names."""
        return [key for labels in self._labels for key in labels["keys"]]

    @cached_property
    def rows(self) -> list[int]:
        """Their places in the gallery."""
        return [row for labels in self._labels for row in labels["rows"]]

    @property
    def skipped(self) -> Counter[str]:
        """Pictures that could not be read, by reason."""
        return Counter({k: n for labels in self._labels for k, n in labels["skipped"].items()})

    def search(self, queries: Tensor, k: int = 12) -> list[list[Hit]]:
        """Unit vectors [Q, D] -> for each the k pictures most like it, best first.

        Exact; beyond a million pictures through faiss's index. Raises UsageError for queries of another model's width.
        """
        if queries.ndim != 2 or queries.shape[1] != self.about["dim"]:
            raise UsageError(f"queries are {list(queries.shape)}; this index needs [Q, {self.about['dim']}]")
        queries, k = queries.float().cpu(), min(k, len(self))
        approximate = self.folder / "index.faiss"
        scores, places = self._approximate(queries, k) if approximate.is_file() else self._exact(queries, k)
        return [
            [Hit(self.keys[i], self.rows[i], s) for s, i in zip(row_scores, row_places, strict=True) if i >= 0]
            for row_scores, row_places in zip(scores.tolist(), places.tolist(), strict=True)
        ]

    def _exact(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = torch.empty(len(queries), len(self))
        start = 0
        for vectors in self._vectors:
            for i in range(0, len(vectors), _CHUNK):  # as float32 only as much as the cache holds
                chunk = torch.from_numpy(vectors[i : i + _CHUNK]).float()
                scores[:, start : start + len(chunk)] = queries @ chunk.T
                start += len(chunk)
        best = scores.topk(k, dim=1)
        return best.values, best.indices

    def make_approximate(self) -> None:
        """Write faiss's index beside the vectors: cells of a coarse quantiser, 16-bit vectors in them."""
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
        faiss.write_index(index, str(self.folder / "index.faiss.tmp"))
        (self.folder / "index.faiss.tmp").replace(self.folder / "index.faiss")

    @cached_property
    def _faiss_index(self) -> Any:
        return _faiss().read_index(str(self.folder / "index.faiss"))

    def _approximate(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, places = self._faiss_index.search(queries.numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(places)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise UsageError('beyond a million vectors the search uses faiss: pip install "clipkit[search]"') from None
    return faiss


def embed_query(index: Index, query: str, model: str | None = None, device: str = "auto") -> Tensor:
    """A description, or the path of a picture -> a unit vector [1, D] of the index's model.

    Raises CheckpointError when the model at hand is not the one that the index was made with.
    """
    if not query.strip():
        raise UsageError("the query is empty; describe a picture, or give the file of one")
    name = model or index.about["model"]
    clip = load(name, device)
    if fingerprint(clip.model) != index.about["weights"]:
        raise CheckpointError(f"{index.folder} was made with other weights than those of {name}")
    if Path(query).is_file():
        return embed_images(clip, read_images([query]))
    return embed_texts(clip.model, clip.tokenizer, [query])


def show(index: Index, hits: Sequence[Hit]) -> list[tuple[bytes | str, str]]:
    """For a contact sheet: each picture's bytes, or what is wrong with it now, and its key and score."""
    gallery = open_gallery(index.about["source"])
    found: list[tuple[bytes | str, str]] = []
    for hit in hits:
        try:
            image: bytes | str = gallery.image(hit.row)
        except (SampleError, ShardError, IndexError) as error:
            image = str(error)
        found.append((image, f"{hit.score:.3f} {hit.key}"))
    return found
