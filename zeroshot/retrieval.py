"""Image-text retrieval: how often the right text is the nearest of all, and the other way round."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.model import CLIP
from clipkit.shards import Shards
from clipkit.tokenizer import AnyTokenizer
from clipkit.zeroshot.heads import embed_texts

_CHUNK = 1024


def recall(queries: Tensor, targets: Tensor, k: int) -> float:
    """Share of rows i of `queries` [N, D] whose own row of `targets` [N, D] is among the k nearest; ties count against.

    Computed in chunks, so that memory grows with N and not with its square.
    """
    hits = 0
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ targets.T  # [chunk, N]
        rows = torch.arange(len(similarity), device=similarity.device)
        own = similarity[rows, start + rows]
        better = (similarity >= own[:, None]).sum(dim=1) - 1  # everything at least as near, but not itself
        hits += int((better < k).sum())
    return hits / len(queries)


@torch.no_grad()
def evaluate(model: CLIP, tokenizer: AnyTokenizer, shards: Shards, batch_size: int = 256) -> dict[str, float]:
    """Recall@1 and @5, both ways, over every image of a pack and its first caption."""
    from clipkit.images import decode, preprocessing

    device, preprocess = model.log_logit_scale.device, preprocessing(model.config)
    images, captions = [], []
    for start in range(0, len(shards), batch_size):
        samples = [shards.read(i) for i in range(start, min(start + batch_size, len(shards)))]
        pixels = torch.stack([preprocess(decode(s.image)) for s in samples])
        images.append(model.encode_image(pixels.to(device)))
        captions += [s.captions[0] for s in samples]
    image, text = torch.cat(images), embed_texts(model, tokenizer, captions)
    return {
        "n": len(captions),
        "image_to_text_recall@1": recall(image, text, 1),
        "image_to_text_recall@5": recall(image, text, 5),
        "text_to_image_recall@1": recall(text, image, 1),
        "text_to_image_recall@5": recall(text, image, 5),
    }
