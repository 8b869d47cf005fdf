"""Image-text retrieval: how often a right text is the nearest of all to an image, and the other way round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from clipkit.data.files import counted
from clipkit.data.images import decode, preprocessing
from clipkit.data.shards import Shards
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.log import progress
from clipkit.models.clip import CLIP
from clipkit.models.tokenizer import AnyTokenizer
from clipkit.zeroshot.heads import embed_texts

_CHUNK = 1024


def ranks(queries: Tensor, targets: Tensor, relevant: Sequence[Sequence[int]]) -> Tensor:
    """For each row of `queries` [N, D] the rank, from 0, of the best of its relevant rows of `targets` [M, D] -> [N].

    Ties count against it. In chunks: of the similarities there are never N x M in memory, but 1,024 x M.
    """
    found = []
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ targets.T  # [chunk, M]
        for row, own in zip(similarity, relevant[start : start + _CHUNK], strict=True):
            best = row[list(own)].max()
            row[list(own)] = -torch.inf  # the others of its own do not stand in its way
            found.append(int((row >= best).sum()))
    return torch.tensor(found)


def recall(rank: Tensor, k: int) -> float:
    """Share of ranks [N] below k."""
    return float((rank < k).double().mean())


def recalls(images: Tensor, texts: Tensor, owner: Sequence[int]) -> dict[str, float]:
    """Recall@1, 5 and 10 both ways, of image rows [N, D] and text rows [M, D], text j being of image `owner[j]`.

    An image is found right when any of its texts is among the k nearest. Raises UsageError for an image without text.
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


@torch.no_grad()
def evaluate(model: CLIP, tokenizer: AnyTokenizer, shards: Shards, batch_size: int = 256) -> dict[str, float]:
    """Recall over every image of a pack and all of its distinct captions.

    Samples that cannot be read are skipped and counted. Raises UsageError for an empty pack, DataError when none can.
    """
    device, preprocess = model.log_logit_scale.device, preprocessing(model.config)
    images, captions, owner = list[Tensor](), list[str](), list[int]()
    n, skipped = 0, Counter[str]()
    starts = range(0, len(shards), batch_size)
    for start in progress(starts, len(starts), "retrieval"):
        pixels = []
        for i in range(start, min(start + batch_size, len(shards))):
            try:
                sample = shards.read(i)
                pixels.append(preprocess(decode(sample.image)))
            except SampleError as error:
                skipped[error.reason] += 1
                continue
            distinct = list(dict.fromkeys(sample.captions))
            captions += distinct
            owner += [n] * len(distinct)
            n += 1
        if pixels:
            images.append(model.encode_image(torch.stack(pixels).to(device)))
    if not len(shards):
        raise UsageError(f"{shards.source} holds no sample")
    if not images:
        raise DataError(f"none of the {len(shards)} samples of {shards.source} can be read: {counted(skipped)}")
    found = recalls(torch.cat(images), embed_texts(model, tokenizer, captions), owner)
    return {"n": n, "texts": len(captions), "unread": skipped.total(), **found}
