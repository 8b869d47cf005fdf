"""Zero-shot classifier: predictions of a class head on a data set, accuracy, calibration (ECE), confusion matrix.

Radford et al. 2021 (arXiv 2103.00020), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from clipkit.data.files import counted
from clipkit.errors import DataError, UsageError
from clipkit.models.clip import CLIP
from clipkit.zeroshot.datasets import ImageSet
from clipkit.zeroshot.embedding import Encoder, embed

_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """Predictions for each of N images of C classes, in their order, on the CPU."""

    targets: Tensor
    """bool [N, C]: the true classes of an image; several in a multi-label set."""
    ranking: Tensor
    """int64 [N, k]: the most similar classes, best first; k is the smaller of 5 and C."""
    confidence: Tensor
    """float64 [N]: the probability of the first, under the model's learned logit scale."""
    similarities: Tensor | None
    """float32 [N, C], kept for multi-label sets only."""
    rows: Sequence[int] | None = None
    """Numbers of the N images in their set; None: all of it."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """The set's images that could not be read, by reason."""


@dataclass(frozen=True)
class Scores:
    """Fractions over a data set of `n` images."""

    n: int
    top1: float
    top5: float
    """One of five predictions is correct; of all C where there are fewer classes."""
    mean_per_class: float
    """Mean recall over the classes that have images."""
    top1_low: float
    top1_high: float
    """Ends of the bootstrap's 95 % interval of top1."""
    ece: float
    """Expected calibration error: 15 bins of confidence (Guo et al. 2017, arXiv 1706.04599, equation 3)."""


@torch.no_grad()
def predict(model: CLIP, head: Tensor, images: ImageSet, batch_size: int = 256, workers: int = 0) -> Predictions:
    """Cosines of every image with every row of `head` [C, D], as predictions; the ranks share the work, each gets all.

    Images that cannot be read are skipped and counted. Raises UsageError for an empty set, or a head with another
    number of classes, DataError when no image can be read.
    """
    if not len(images):
        raise UsageError(f"data set {images.name!r} holds no image")
    if len(head) != len(images.classes):
        raise UsageError(f"the head has {len(head)} classes, data set {images.name!r} {len(images.classes)}")
    found = embed(Encoder.of(model), images.__getitem__, range(len(images)), batch_size, workers, "zero-shot")
    if not found.rows:
        raise DataError(f"none of the {len(images)} images of {images.name} can be read: {counted(found.reasons)}")
    targets = torch.zeros(len(found.rows), len(head), dtype=torch.bool)
    for row, labels in zip(targets, found.notes, strict=True):
        row[list(labels)] = True
    rankings, confidences, similarities = list[Tensor](), list[Tensor](), list[Tensor]()
    for features in torch.split(found.features, batch_size):
        similar = features.to(head) @ head.T  # [b, C]
        ranking = similar.topk(min(5, len(head)), dim=1).indices
        probability = (model.logit_scale * similar).softmax(dim=1)
        rankings.append(ranking.cpu())
        confidences.append(probability.gather(1, ranking[:, :1])[:, 0].double().cpu())
        if images.multilabel:
            similarities.append(similar.float().cpu())
    return Predictions(
        targets,
        torch.cat(rankings),
        torch.cat(confidences),
        torch.cat(similarities) if images.multilabel else None,
        found.rows,
        found.reasons,
    )


def evaluate(model: CLIP, head: Tensor, images: ImageSet, batch_size: int = 256, workers: int = 0) -> Scores:
    """Scores of the zero-shot classifier `head` [C, D]; the ranks share the work and get the same scores."""
    return score(predict(model, head, images, batch_size, workers))


def score(predictions: Predictions) -> Scores:
    """Scores of predictions. In a multi-label set a prediction is correct if it is one of the image's classes."""
    targets, ranking = predictions.targets, predictions.ranking
    hits = targets.gather(1, ranking)  # [N, k]
    top1 = hits[:, 0].double()
    per_class = targets.double().sum(dim=0)  # [C]
    right = (targets & (ranking[:, :1] == torch.arange(targets.shape[1]))).double().sum(dim=0)
    recall = (right / per_class)[per_class > 0].mean()
    n, share = len(top1), float(top1.mean())
    # A bootstrap sample of n hits and misses is n draws with this fraction of hits: binomial.
    low, high = np.quantile(np.random.default_rng(0).binomial(n, share, 10_000) / n, [0.025, 0.975])
    return Scores(
        n=n,
        top1=share,
        top5=float(hits.any(dim=1).double().mean()),
        mean_per_class=float(recall),
        top1_low=float(low),
        top1_high=float(high),
        ece=calibration_error(predictions.confidence, top1),
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = _BINS) -> float:
    """ECE: mean over images of |accuracy - confidence| of their bin; bins are equally wide, (low, high]."""
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))


def confusions(predictions: Predictions) -> Tensor:
    """Confusion matrix, int64 [C, C]: images of the row's class that were classified as the column's."""
    classes = predictions.targets.shape[1]
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    image, target = predictions.targets.nonzero().T
    flat = target * classes + predictions.ranking[image, 0]
    return matrix.flatten().index_add_(0, flat, torch.ones_like(flat)).reshape(classes, classes)


def mean_average_precision(similarities: Tensor, targets: Tensor) -> float:
    """Mean over classes of the average precision of [N, C] scores against bool [N, C].

    The area under the precision-recall steps, as in scikit-learn: equal scores count together. Classes without images
    are omitted.
    """
    present = [c for c in range(targets.shape[1]) if targets[:, c].any()]
    return float(torch.stack([_average_precision(similarities[:, c], targets[:, c]) for c in present]).mean())


def _average_precision(scores: Tensor, right: Tensor) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    scores, right = scores[order], right[order].double()
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of a run of equal scores
    hits = right.cumsum(0)[last]
    precision = hits / (torch.arange(1, len(scores) + 1)[last])
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=hits.dtype)) / right.sum()
    return (precision * gained).sum()
