"""Contrastive losses, exact across ranks and in memory linear in the batch.

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), symmetric over images and texts as in CLIP (Radford et al.
2021, figure 3); the sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343, eq. 1); and their extension to several
positives per row (UniCL, Yang et al. 2022, arXiv 2204.03610, eq. 3-5).

The logits of B images against B texts exist only in strips of a few rows, made once in the forward pass and again in
the backward pass. Every rank makes the strips of its own images; what it learns about all texts is summed over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed

_STRIP = 128
"""Images whose logits are held at a time: a strip of B = 2,048 takes 1 MiB, one of B = 32,768 16 MiB."""


@dataclass(frozen=True)
class LossConfig:
    """What pulls pairs together and pushes the others apart."""

    kind: Literal["info_nce", "sigmoid"] = "info_nce"
    """InfoNCE compares a pair with all others of the batch; the sigmoid loss of SigLIP judges each one by itself."""
    positives: Literal["pair", "group"] = "pair"
    """"pair": an image and its own caption (CLIP). "group": all captions of its class (UniCL), so that interchangeable
    captions are not pushed apart; of use when a batch holds many samples of few classes."""


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of this rank's pairs against the pairs of all ranks.

    image, text: unit vectors [b, D]; row i of both is a pair. logit_scale: scalar, or [b] with one scale per image (a
    noise-aware tower is less sure of noisy images). groups: int64 [b] or None; with it, all pairs of one group are
    positives of each other, each with an equal share of the target.

    Returns a scalar whose mean over ranks, and the mean of its gradients, are exactly those of one process holding the
    whole batch; DDP takes that mean. Nothing needs to be chosen for that.
    """
    return _contrast(_InfoNCE, image, text, logit_scale, torch.zeros_like(logit_scale), groups)


def sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, groups: Tensor | None = None
) -> Tensor:
    """Sigmoid loss of this rank's images with the texts of all ranks, summed over texts and averaged over images.

    As `info_nce`, with logit_bias a scalar or [b] beside logit_scale.
    """
    return _contrast(_Sigmoid, image, text, logit_scale, logit_bias, groups)


def _contrast(
    kind: type[_Objective], image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None
) -> Tensor:
    with torch.autocast(image.device.type, enabled=False):  # 8 bits of mantissa are too few for a softmax over a batch
        per_image = [x.to(image.dtype).expand(len(image)) for x in (scale, bias)]
        loss: Tensor = _Strips.apply(image, text.to(image.dtype), *per_image, groups, kind)
    return loss


class _Pairs:
    """Which of all texts are positives of this rank's images."""

    def __init__(self, rows: int, groups: Tensor | None, device: torch.device) -> None:
        self.sizes = distributed.batch_sizes(rows)
        start = sum(self.sizes[: distributed.rank()])
        if groups is None:  # each pair is a group of its own
            groups = torch.arange(start, start + rows, device=device)
        self.own, self.everyone = groups, distributed.gather_rows(groups, self.sizes)

    @property
    def total(self) -> int:
        """B: pairs on all ranks."""
        return sum(self.sizes)

    def same(self, rows: slice) -> Tensor:
        """bool [rows, B]."""
        return self.own[rows, None] == self.everyone[None, :]

    def targets(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """[rows, B]: an equal share for each positive; a group has as many images as texts, so columns share alike."""
        same = self.same(rows).to(dtype)
        return same.div_(same.sum(dim=1, keepdim=True))


class _Objective(ABC):
    """A loss over logits [b, B] that come in strips: what it must know of all of them first, its value, its slope."""

    def __init__(self, pairs: _Pairs) -> None:
        self.pairs = pairs

    @abstractmethod
    def value(self, strips: Iterator[tuple[slice, Tensor]]) -> Tensor:
        """The sum over this rank's rows; may keep what `slope` needs. Strips may be overwritten."""

    @abstractmethod
    def slope(self, rows: slice, logits: Tensor) -> Tensor:
        """Derivative of the sum over all ranks by these logits [rows, B]."""


class _InfoNCE(_Objective):
    row: Tensor  # [b]: log-sum-exp over texts
    column: Tensor  # [B]: log-sum-exp over the images of all ranks

    def value(self, strips: Iterator[tuple[slice, Tensor]]) -> Tensor:
        rows, positives, column = [], [], None
        for where, logits in strips:
            rows.append(logits.logsumexp(dim=1))
            inside = logits.logsumexp(dim=0)
            column = inside if column is None else torch.logaddexp(column, inside)
            positives.append((logits * self.pairs.targets(where, logits.dtype)).sum(dim=1))
        assert column is not None
        self.row, self.column = torch.cat(rows), distributed.logsumexp_over_ranks(column)
        start = sum(self.pairs.sizes[: distributed.rank()])
        own = self.column[start : start + len(self.row)]
        return (self.row + own).sum() / 2 - torch.cat(positives).sum()

    def slope(self, rows: slice, logits: Tensor) -> Tensor:
        slope = (logits - self.row[rows, None]).exp_()
        slope += (logits - self.column).exp_()
        return slope.div_(2).sub_(self.pairs.targets(rows, logits.dtype))


class _Sigmoid(_Objective):
    def value(self, strips: Iterator[tuple[slice, Tensor]]) -> Tensor:
        return torch.stack([F.softplus(-logits * self._sign(rows)).sum() for rows, logits in strips]).sum()

    def slope(self, rows: slice, logits: Tensor) -> Tensor:
        sign = self._sign(rows)
        return -sign * torch.sigmoid(-logits * sign)

    def _sign(self, rows: slice) -> Tensor:
        return self.pairs.same(rows).to(torch.int8).mul_(2).sub_(1)  # 1 for positives, -1 for the rest


class _Strips(torch.autograd.Function):
    """An objective of scale * image @ text.T + bias, without ever holding those logits."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        groups: Tensor | None,
        kind: type[_Objective],
    ) -> Tensor:
        pairs = _Pairs(len(image), groups, image.device)
        texts = distributed.gather_rows(text, pairs.sizes)  # [B, D]
        ctx.objective = kind(pairs)
        ctx.save_for_backward(image, texts, scale, bias)
        strips = (
            (rows, cosines.mul_(scale[rows, None]).add_(bias[rows, None])) for rows, cosines in _cosines(image, texts)
        )
        # Ranks may hold different numbers of rows: the mean over ranks of W / B * their sum is the mean over all rows.
        value: Tensor = ctx.objective.value(strips) * (len(pairs.sizes) / pairs.total)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias = ctx.saved_tensors
        pairs = ctx.objective.pairs
        weight = gradients[0] * (len(pairs.sizes) / pairs.total)
        d_image, d_texts = torch.empty_like(image), torch.zeros_like(texts)
        d_scale, d_bias = torch.empty_like(scale), torch.empty_like(bias)
        for rows, cosines in _cosines(image, texts):
            logits = cosines * scale[rows, None] + bias[rows, None]
            slope = ctx.objective.slope(rows, logits).mul_(weight)  # [rows, B]
            d_scale[rows], d_bias[rows] = (slope * cosines).sum(dim=1), slope.sum(dim=1)
            slope *= scale[rows, None]
            torch.mm(slope, texts, out=d_image[rows])
            d_texts.addmm_(slope.T, image[rows])
        return d_image, distributed.scatter_rows(d_texts, pairs.sizes), d_scale, d_bias, None, None


def _cosines(image: Tensor, texts: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """image @ texts.T, a strip of rows at a time."""
    for start in range(0, len(image), _STRIP):
        rows = slice(start, min(start + _STRIP, len(image)))
        yield rows, image[rows] @ texts.T
