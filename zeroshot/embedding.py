"""Image embeddings: the one loop that decodes images, runs an image encoder on batches, and counts what it skips.

Zero-shot classification, linear probes, image-text retrieval, embedding indexes and similarity all read images here:
with worker processes, in batches, with a progress bar, and sharded over the ranks of torchrun.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit import distributed
from clipkit.data.images import preprocessing
from clipkit.errors import SampleError
from clipkit.log import progress
from clipkit.models.clip import CLIP
from clipkit.models.pretrained import fingerprint
from clipkit.zeroshot.heads import remembered

Read = Callable[[int], tuple[Image.Image, Any]]
"""Row -> an RGB image, and a note on it that JSON can hold (labels, captions, None). Raises SampleError."""
_PADDING = -1


@dataclass(frozen=True)
class Encoder:
    """An image encoder: `preprocess` gives uint8 [3, S, S], `encode` a batch of them -> float [B, width] on the CPU."""

    preprocess: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor], Tensor]
    width: int

    @classmethod
    def of(cls, model: CLIP, cache: Path | None = None) -> Encoder:
        """A CLIP's image encoder; with `cache` (a folder) a batch is encoded once for the same weights and pixels."""
        folder = cache / fingerprint(model) if cache is not None else None

        def encode(pixels: Tensor) -> Tensor:
            return model.encode_image(pixels.to(model.logit_scale.device)).float().cpu()

        def cached(pixels: Tensor) -> Tensor:
            assert folder is not None
            key = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
            return remembered(folder / f"{key}.safetensors", lambda: encode(pixels))

        return cls(preprocessing(model.config), encode if folder is None else cached, model.config.embed_dim)


@dataclass(frozen=True)
class Embedded:
    """Embeddings [len(rows), D] of the images that could be read, on the CPU, in the order of their rows."""

    features: Tensor
    rows: list[int]
    notes: list[Any]
    """The note of each of these images."""
    skipped: dict[int, str]
    """Why other rows were skipped."""

    @property
    def reasons(self) -> Counter[str]:
        """How many images were skipped, by reason."""
        return Counter(self.skipped.values())


class _Pixels(Dataset[tuple[int, Tensor, Any, str]]):
    """Row, pixels, note, and why the image is skipped; the pixels of padding and of skipped images are blank."""

    def __init__(self, read: Read, rows: Sequence[int], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.read = read
        self.rows = rows
        self.preprocess = preprocess
        self.blank = torch.zeros_like(preprocess(Image.new("RGB", (1, 1))))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Any, str]:
        row = self.rows[i]
        if row == _PADDING:
            return row, self.blank, None, ""
        try:
            image, note = self.read(row)
        except SampleError as error:
            return row, self.blank, None, error.reason
        return row, self.preprocess(image), note, ""


def _collate(samples: Sequence[tuple[int, Tensor, Any, str]]) -> tuple[tuple[int, ...], Tensor, tuple[Any, ...], Any]:
    rows, pixels, notes, reasons = zip(*samples, strict=True)
    return rows, torch.stack(pixels), notes, reasons


@torch.no_grad()
def embed(
    encoder: Encoder,
    read: Read,
    rows: Sequence[int],
    batch_size: int = 256,
    workers: int = 0,
    what: str = "images",
    shared: bool = True,
) -> Embedded:
    """Read and embed these rows, holding one batch of pixels at a time; `what` names them in the progress bar.

    The ranks share the rows, and each gets all embeddings; without `shared` each embeds the rows that it asks for.
    Rows whose image raises SampleError are skipped and reported. Other errors of `read` end the loop.
    """
    own = _of_this_rank(rows) if shared else rows
    loader = DataLoader(
        _Pixels(read, own, encoder.preprocess),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # the default draws from the global generator
    )
    features = [torch.zeros(0, encoder.width)] if not rows else []
    kept, noted, skipped = list[int](), list[Any](), dict[int, str]()
    for batch, pixels, notes, reasons in progress(loader, len(loader), what) if len(loader) > 1 else loader:
        good = [i for i, row in enumerate(batch) if row != _PADDING and not reasons[i]]
        features.append(encoder.encode(pixels)[good])  # blank ones too: an FSDP model needs all ranks each time
        kept += [batch[i] for i in good]
        noted += [notes[i] for i in good]
        skipped |= {row: reason for row, reason in zip(batch, reasons, strict=True) if reason}
    found = Embedded(torch.cat(features), kept, noted, skipped)
    return _gathered(found) if shared and distributed.active() else found


def _of_this_rank(rows: Sequence[int]) -> list[int]:
    """Every n-th row on n ranks, padded to the same number on all of them."""
    rank, ranks = distributed.rank(), distributed.world_size()
    own = list(rows[rank::ranks])
    return own + [_PADDING] * (-(-len(rows) // ranks) - len(own))


def _gathered(own: Embedded) -> Embedded:
    """The embeddings of all ranks, on every rank, in the order of the rows."""
    features = distributed.gather_rows(own.features, distributed.batch_sizes(len(own.rows)))
    parts = distributed.gather_json([own.rows, own.notes, list(own.skipped.items())])
    rows = [row for part in parts for row in part[0]]
    notes = [note for part in parts for note in part[1]]
    skipped = dict(sorted((int(row), str(reason)) for part in parts for row, reason in part[2]))
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return Embedded(features[order], [rows[i] for i in order], [notes[i] for i in order], skipped)
