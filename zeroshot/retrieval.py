"""Image-text retrieval: recall@k from images to texts and from texts to images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from clipkit.data.files import counted
from clipkit.data.images import decode
from clipkit.data.shards import Shards
from clipkit.errors import DataError, UsageError
from clipkit.models.clip import CLIP
from clipkit.models.tokenizer import AnyTokenizer
from clipkit.zeroshot.embedding import Encoder, embed
from clipkit.zeroshot.heads import embed_texts

_CHUNK = 1024


def ranks(queries: Tensor, targets: Tensor, relevant: Sequence[Sequence[int]]) -> Tensor:
    """For each row of `queries` [N, D] the rank, from 0, of the best of its relevant rows of `targets` [M, D] -> [N].

    Ties count against it. Computed in chunks: 1,024 x M similarities are in memory at a time, never N x M.
    """
    found = []
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ targets.T  # [chunk, M]
        for row, own in zip(similarity, relevant[start : start + _CHUNK], strict=True):
            best = row[list(own)].max()
            row[list(own)] = -torch.inf  # its other relevant targets do not count against it
            found.append(int((row >= best).sum()))
    return torch.tensor(found)


def recall(rank: Tensor, k: int) -> float:
    """Recall@k: the fraction of ranks [N] below k."""
    return float((rank < k).double().mean())


def recalls(images: Tensor, texts: Tensor, owner: Sequence[int]) -> dict[str, float]:
    """Recall@1, 5 and 10 both ways, of image rows [N, D] and text rows [M, D], text j being of image `owner[j]`.

    For an image it is enough that one of its texts is among the k nearest. Raises UsageError for an image without text.
    """
    own: list[list[int]] = [[] for _ in range(len(images))]
    for j, i in enumerate(owner):
        own[i].append(j)
    if not own or not all(own):
        raise UsageError("retrieval needs at least one image, and a text for each")
    to_text, to_image = ranks(images, texts, own), ranks(texts, images, [[i] for i in owner])
    return {
        **{f"image_to_text_recall@{k}": recall(to_text, k) for k in (1, 5, 10)},
        **{f"text_to_image_recall@{k}": recall(to_image, k) for k in (1, 5, 10)},
    }


@dataclass(frozen=True)
class Scores:
    """Recall over n images and their texts, and the counts of skipped samples, by reason."""

    n: int
    texts: int
    recalls: dict[str, float]
    skipped: Counter[str]


@torch.no_grad()
def evaluate(model: CLIP, tokenizer: AnyTokenizer, shards: Shards, batch_size: int = 256, workers: int = 0) -> Scores:
    """Recall over every image of a pack and all of its distinct captions; the ranks share the embedding.

    Samples that cannot be read are skipped and counted. Raises UsageError for an empty pack, DataError when none can.
    """
    if not len(shards):
        raise UsageError(f"{shards.source} holds no sample")
    read = partial(_captioned, shards)
    found = embed(Encoder.of(model), read, range(len(shards)), batch_size, workers, "retrieval")
    if not found.rows:
        raise DataError(f"none of the {len(shards)} samples of {shards.source} can be read: {counted(found.reasons)}")
    captions = [caption for own in found.notes for caption in own]
    owner = [image for image, own in enumerate(found.notes) for _ in own]
    texts = embed_texts(model, tokenizer, captions, shared=True)
    return Scores(len(found.rows), len(captions), recalls(found.features.to(texts), texts, owner), found.reasons)


def _captioned(shards: Shards, row: int) -> tuple[Image.Image, list[str]]:
    """A sample's image and its distinct captions."""
    sample = shards.read(row)
    return decode(sample.image), list(dict.fromkeys(sample.captions))
