"""Contrastive losses, exact across ranks and in memory linear in the batch.

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), symmetric over images and texts as in CLIP (Radford et al.
2021, figure 3); the sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343, eq. 1); and their extension to several
positives per row (UniCL, Yang et al. 2022, arXiv 2204.03610, eq. 3-5).

The B x B logits are computed in chunks ("strips") of a few rows, in the forward pass and once more in the backward
pass. Every rank computes the strips of the images it holds against the texts of all ranks, which are all-gathered while
they are small, and else passed around a ring. Gradients of the texts are summed over ranks.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import distributed
from clipkit.config import require
from clipkit.errors import RecipeError
from clipkit.registry import LOSSES

_STRIP = 128
"""Rows of a strip: for B = 2,048 it takes 1 MiB, for B = 32,768 16 MiB."""

GATHERED = 64 * 2**20
"""Bytes up to which the text features of all ranks are all-gathered; beyond, a rank holds its own and two others'."""


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss."""

    kind: Annotated[str, LOSSES] = "info_nce"
    """"info_nce": a softmax over the batch (CLIP). "sigmoid": each image and text by themselves (SigLIP)."""
    positives: Literal["pair", "group"] = "pair"
    """"pair": an image and its own caption (CLIP). "group": all captions of its class (UniCL), so that interchangeable
    captions are not pushed apart; of use when a batch holds many samples of few classes."""
    label_smoothing: float = 0.0
    """Label smoothing: fraction of the target that is spread over the batch, against overfitting to few samples
    (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""

    def __post_init__(self) -> None:
        require("in [0, 1)", "loss", self, "label_smoothing")
        if self.label_smoothing and not self.takes("label_smoothing"):
            raise RecipeError(f"loss.kind={self.kind} has no label smoothing; omit loss.label_smoothing")
        if self.positives == "group" and not self.takes("groups"):
            raise RecipeError(f"loss.kind={self.kind} has one positive per image; omit loss.positives")

    def takes(self, option: str) -> bool:
        """Whether the loss has this parameter: "logit_bias", "groups" or "label_smoothing"."""
        return option in inspect.signature(LOSSES[self.kind]).parameters


def contrastive_loss(
    config: LossConfig, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, groups: Tensor | None
) -> Tensor:
    """The loss that a recipe names, of this rank's pairs: unit vectors [b, D]; scale, bias and groups are [b].

    Returns a scalar whose mean over ranks is minimised.
    """
    options = {"logit_bias": logit_bias, "groups": groups, "label_smoothing": config.label_smoothing}
    return LOSSES[config.kind](image, text, logit_scale, **{n: v for n, v in options.items() if config.takes(n)})


def info_nce(
    image: Tensor, text: Tensor, logit_scale: Tensor, groups: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Symmetric InfoNCE of this rank's pairs against the pairs of all ranks.

    image, text: unit vectors [b, D]; row i of both is a pair. logit_scale: scalar, or [b] with one scale per image (a
    noise-aware tower is less sure of noisy images). groups: int64 [b] or None; with it, all pairs of one group are
    positives of each other, each with an equal share of the target. label_smoothing: share of it that all B pairs have
    alike.

    Returns a scalar whose mean over ranks, and the mean of its gradients, are exactly those of one process holding the
    whole batch; DDP takes that mean. There is no option for that.
    """
    kind = partial(_InfoNCE, label_smoothing)
    return _contrast(kind, image, text, logit_scale, torch.zeros_like(logit_scale), groups)


def sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, groups: Tensor | None = None
) -> Tensor:
    """Sigmoid loss of this rank's images with the texts of all ranks, summed over texts and averaged over images.

    As `info_nce`, with logit_bias a scalar or [b] beside logit_scale.
    """
    return _contrast(_Sigmoid, image, text, logit_scale, logit_bias, groups)


def _contrast(
    kind: Callable[[_Pairs], _Objective],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: Tensor | None,
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
        if groups is None:  # each pair is its own group
            groups = torch.arange(start, start + rows, device=device)
        self.own = groups
        self.everyone = distributed.gather_rows(groups, self.sizes)
        self.mine = slice(start, start + rows)

    @property
    def total(self) -> int:
        """B: pairs on all ranks."""
        return sum(self.sizes)

    @property
    def weight(self) -> float:
        """Of a sum over this rank's rows, so that the mean over ranks is the mean over all rows."""
        return distributed.mean_weight(self.sizes)

    @cached_property
    def positives(self) -> Tensor:
        """int64 [b]: how many of all texts are positives of each image."""
        in_order = self.everyone.sort().values
        first, last = (torch.searchsorted(in_order, self.own, right=right) for right in (False, True))
        return last - first

    def same(self, rows: slice, columns: slice) -> Tensor:
        """bool [rows, columns]."""
        return self.own[rows, None] == self.everyone[None, columns]


_Strip = tuple[slice, slice, Tensor]
"""Rows, columns, and the logits [rows, columns]."""


class _Objective(ABC):
    """A loss over logits [b, B] that are computed in strips: its value, and its derivative by the logits."""

    def __init__(self, pairs: _Pairs) -> None:
        self.pairs = pairs

    @abstractmethod
    def value(self, strips: Iterator[_Strip], like: Tensor) -> Tensor:
        """The sum over this rank's rows, in the kind of numbers that `like` is; may keep what `slope` needs."""

    @abstractmethod
    def slope(self, rows: slice, columns: slice, logits: Tensor) -> Tensor:
        """Derivative of the sum over all ranks by these logits."""


class _InfoNCE(_Objective):
    row: Tensor  # [b]: log-sum-exp over texts
    column: Tensor  # [B]: log-sum-exp over the images of all ranks

    def __init__(self, label_smoothing: float, pairs: _Pairs) -> None:
        super().__init__(pairs)
        self.smoothing = label_smoothing

    def value(self, strips: Iterator[_Strip], like: Tensor) -> Tensor:
        self.row = like.new_full((len(self.pairs.own),), -torch.inf)
        column, positives = like.new_full((self.pairs.total,), -torch.inf), like.new_zeros(())
        for rows, columns, logits in strips:
            self.row[rows] = torch.logaddexp(self.row[rows], logits.logsumexp(dim=1))
            column[columns] = torch.logaddexp(column[columns], logits.logsumexp(dim=0))
            positives += logits.mul_(self._targets(rows, columns, logits.dtype)).sum()
        self.column = distributed.logsumexp_over_ranks(column)
        return (self.row + self.column[self.pairs.mine]).sum() / 2 - positives

    def slope(self, rows: slice, columns: slice, logits: Tensor) -> Tensor:
        slope = (logits - self.row[rows, None]).exp_()
        slope += (logits - self.column[columns]).exp_()
        return slope.div_(2).sub_(self._targets(rows, columns, logits.dtype))

    def _targets(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Targets [rows, columns]: equal for all positives of a row, plus label smoothing; a group has as many
        images as texts."""
        everyone = self.smoothing / self.pairs.total
        positive = (1 - self.smoothing) / self.pairs.positives[rows, None].to(dtype) + everyone  # [rows, 1]
        return torch.where(self.pairs.same(rows, columns), positive, everyone)


class _Sigmoid(_Objective):
    def value(self, strips: Iterator[_Strip], like: Tensor) -> Tensor:
        total = like.new_zeros(())
        for rows, columns, logits in strips:
            total += F.softplus(-logits * self._sign(rows, columns)).sum()
        return total

    def slope(self, rows: slice, columns: slice, logits: Tensor) -> Tensor:
        sign = self._sign(rows, columns)
        return -sign * torch.sigmoid(-logits * sign)

    def _sign(self, rows: slice, columns: slice) -> Tensor:
        return self.pairs.same(rows, columns).to(torch.int8).mul_(2).sub_(1)  # 1 for positives, -1 for the rest


class _Strips(torch.autograd.Function):
    """An objective of scale * image @ text.T + bias, without holding all logits."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        groups: Tensor | None,
        kind: Callable[[_Pairs], _Objective],
    ) -> Tensor:
        pairs = _Pairs(len(image), groups, image.device)
        ctx.objective, ctx.gathered = kind(pairs), pairs.total * text[:1].nbytes <= GATHERED
        held = distributed.gather_rows(text, pairs.sizes) if ctx.gathered else text
        ctx.save_for_backward(image, held, scale, bias)
        strips = (
            (rows, columns, cosines.mul_(scale[rows, None]).add_(bias[rows, None]))
            for columns, texts, _ in distributed.blocks(held, pairs.sizes, ctx.gathered)
            for rows, cosines in _cosines(image, texts)
        )
        value: Tensor = ctx.objective.value(strips, image) * pairs.weight
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, held, scale, bias = ctx.saved_tensors
        pairs = ctx.objective.pairs
        weight = gradients[0] * pairs.weight
        d_image, d_scale, d_bias = (torch.zeros_like(x) for x in (image, scale, bias))
        d_text: Tensor | None = None
        for columns, texts, home in distributed.blocks(held, pairs.sizes, ctx.gathered):
            d_texts = torch.zeros_like(texts)
            for rows, cosines in _cosines(image, texts):
                logits = cosines * scale[rows, None] + bias[rows, None]
                slope = ctx.objective.slope(rows, columns, logits).mul_(weight)  # [rows, columns]
                d_scale[rows] += (slope * cosines).sum(dim=1)
                d_bias[rows] += slope.sum(dim=1)
                slope *= scale[rows, None]
                d_image[rows].addmm_(slope, texts)
                d_texts.addmm_(slope.T, image[rows])
            brought = home(d_texts)
            d_text = brought if d_text is None else d_text.add_(brought)
        return d_image, d_text, d_scale, d_bias, None, None


def _cosines(image: Tensor, texts: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """image @ texts.T, a strip of rows at a time."""
    for start in range(0, len(image), _STRIP):
        rows = slice(start, min(start + _STRIP, len(image)))
        yield rows, image[rows] @ texts.T
