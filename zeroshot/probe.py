"""Linear probes, also few-shot: logistic regression on frozen image features.

Radford et al. 2021 (arXiv 2103.00020), section 3.2 and appendix A.3: fitted by L-BFGS, the strength of regularisation
chosen on a validation part of the training images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.data.files import counted
from clipkit.errors import DataError, UsageError
from clipkit.log import progress
from clipkit.models.clip import CLIP
from clipkit.zeroshot.datasets import ImageSet
from clipkit.zeroshot.embedding import Encoder, embed

STRENGTHS = tuple(10.0 ** (e / 2) for e in range(-6, 13))
"""Candidates for C, 0.001 to 1,000,000; larger is weaker regularisation."""
_VALIDATION = 0.2


@dataclass(frozen=True)
class Probe:
    """Scores of a linear probe. shots: training images a class, 0 for all; accuracy: on the test images."""

    train: int
    test: int
    classes: int
    shots: int
    C: float
    validation_accuracy: float
    accuracy: float


def check_same_classes(train: ImageSet, test: ImageSet) -> None:
    """Check that two data sets have the same classes, by their first names. Raises UsageError naming the first other.

    Further names of a class are for prompts, and may differ.
    """
    known, tested = ([names[0] for names in images.classes] for images in (train, test))
    if known != tested:
        differ = next(f"{a!r} and {b!r}" for a, b in zip_longest(known, tested) if a != b)
        raise UsageError(
            f"{train.name} and {test.name} must have the same classes in the same order; they have {len(known)} and "
            f"{len(tested)}, and differ first in {differ}"
        )


def features(
    model: CLIP, images: ImageSet, batch_size: int = 256, workers: int = 0, cache: Path | None = None
) -> tuple[Tensor, Tensor, Counter[str]]:
    """Unit image features [N, D] in float64 and labels [N], on the CPU, and the counts of skipped images, by reason.

    The ranks share the work. With `cache` (a folder) each batch is encoded once for the same weights and pixels,
    whatever its files are called.
    Raises UsageError for a multi-label or an empty set, DataError when no image can be read.
    """
    if images.multilabel or not len(images):
        raise UsageError(f"a probe needs images with one label each; {images.name} has none, or several")
    found = embed(Encoder.of(model, cache), images.__getitem__, range(len(images)), batch_size, workers, "features")
    if not found.rows:
        raise DataError(f"none of the {len(images)} images of {images.name} can be read: {counted(found.reasons)}")
    labels = torch.tensor([labels[0] for labels in found.notes])
    return found.features.double(), labels, found.reasons + Counter(images.skipped)


class LogisticRegression:
    """Multinomial, with an L2 penalty on the weights and none on the intercepts: scikit-learn's objective.

    C sum_i log-loss_i + ||W||^2 / 2, by L-BFGS in float64.
    """

    def __init__(self, classes: int, C: float = 1.0, iterations: int = 1000) -> None:
        self.classes, self.C, self.iterations = classes, C, iterations

    def fit(self, x: Tensor, y: Tensor) -> LogisticRegression:
        """x [N, D], y [N] -> itself."""
        self.weight = torch.zeros(self.classes, x.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(self.classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=self.iterations,
            history_size=10,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            penalty = self.weight.square().sum() / (
                2 * self.C * len(x)
            )  # divided by C N, so that gradients do not grow with N
            loss = F.cross_entropy(F.linear(x, self.weight, self.bias), y) + penalty
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Fraction of [N] classified correctly."""
        return float((F.linear(x, self.weight, self.bias).argmax(dim=1) == y).double().mean())


def few(y: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of a few-shot training set: `shots` images of each class, drawn by `seed`. Raises UsageError for too few."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    chosen = []
    for c in sorted(set(y.tolist())):
        rows = order[y[order] == c]
        if len(rows) < shots:
            raise UsageError(f"class {c} has {len(rows)} training images; {shots} shots need as many")
        chosen.append(rows[:shots])
    return torch.cat(chosen)


def probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, shots: int = 0, seed: int = 0
) -> Probe:
    """Choose C on a fifth of the training images of each class, fit on all of them, evaluate on the test images."""
    x, y = train
    if shots:
        rows = few(y, shots, seed)
        x, y = x[rows], y[rows]
    held = _held_out(y, seed)
    fits = [
        (LogisticRegression(classes, C).fit(x[~held], y[~held]).accuracy(x[held], y[held]), C)
        for C in progress(STRENGTHS, len(STRENGTHS), "C")
    ]
    best = max(score for score, _ in fits)
    C = next(C for score, C in fits if score == best)  # the strongest regularisation among the best
    accuracy = LogisticRegression(classes, C).fit(x, y).accuracy(*test)
    return Probe(len(y), len(test[1]), classes, shots, C, best, accuracy)


def _held_out(y: Tensor, seed: int) -> Tensor:
    """bool [N]: the validation part, a fifth of the images of each class; none of a class with one image."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 1))
    held = torch.zeros(len(y), dtype=torch.bool)
    for c in sorted(set(y.tolist())):
        rows = order[y[order] == c]
        held[rows[: max(1, round(_VALIDATION * len(rows))) if len(rows) > 1 else 0]] = True
    if not held.any():
        held[order[: max(1, len(y) // 5)]] = True
    return held
