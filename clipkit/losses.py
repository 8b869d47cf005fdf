"""The contrastive loss, exact across ranks.

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), symmetric over images and texts as in CLIP (Radford et al.
2021, figure 3), and its extension to several positives per row (UniCL, Yang et al. 2022, arXiv 2204.03610, eq. 3-5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipkit import distributed


@dataclass(frozen=True)
class LossConfig:
    """Which pairs of a batch belong together."""

    positives: Literal["pair", "group"] = "pair"
    """"pair": an image and its own caption (CLIP). "group": all captions of its class (UniCL), so that interchangeable
    captions are not pushed apart; of use when a batch holds many samples of few classes."""


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of this rank's pairs against the pairs of all ranks.

    image, text: unit vectors [b, D]; row i of both is a pair. logit_scale: scalar, or [b] with one scale per image (a
    noise-aware tower is less sure of noisy images). groups: int64 [b] or None; with it, all pairs of one group are
    positives of each other, each with an equal share of the target, so that interchangeable captions are not pushed
    apart.

    Returns a scalar whose mean over ranks, and the mean of its gradients, are exactly those of one process holding the
    whole batch; DDP takes that mean. Nothing needs to be chosen for that.
    """
    sizes = distributed.batch_sizes(len(image), image.device)
    start = sum(sizes[: distributed.rank()])
    all_images, all_texts = distributed.gather(image, sizes), distributed.gather(text, sizes)
    scale = logit_scale.expand(len(image))  # [b]
    all_scales = distributed.gather(scale.contiguous(), sizes)  # [B]
    all_groups = None if groups is None else distributed.gather(groups, sizes)
    by_image = scale[:, None] * (image @ all_texts.T)  # [b, B]
    by_text = (text @ all_images.T) * all_scales  # [b, B]
    targets = _targets(len(image), start, groups, all_groups, by_image)
    rows = -(targets * (by_image.log_softmax(dim=1) + by_text.log_softmax(dim=1))).sum(dim=1) / 2  # [b]
    # Ranks may hold different numbers of rows; the mean over ranks of W / B * (their sum) is the mean over all rows.
    return rows.sum() * (len(sizes) / sum(sizes))


def _targets(rows: int, start: int, groups: Tensor | None, all_groups: Tensor | None, like: Tensor) -> Tensor:
    """[b, B]: which columns are positives of each row, each row summing to 1."""
    if groups is None or all_groups is None:
        targets = torch.zeros_like(like)
        index = torch.arange(rows, device=like.device)
        targets[index, start + index] = 1
        return targets
    same = (groups[:, None] == all_groups[None, :]).to(like.dtype)
    return same / same.sum(dim=1, keepdim=True)
