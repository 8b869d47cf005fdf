"""Distances between two collections of pictures: FID, KID, CMMD, precision and recall, inception score, CLIP score.

Functions of features, in float64; the networks are in clipkit/guidance/metrics/extractors.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.errors import DataError, UsageError

_ROWS = 512
"""Points whose distances to all others are held at a time."""


@dataclass
class Moments:
    """Count, mean [D] and scatter [D, D] (about the mean) of features that arrive in batches."""

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features [N, D]. Raises DataError for features that are not numbers."""
        x = _checked(features)
        centred = x - x.mean(dim=0)
        return cls(len(x), x.mean(dim=0), centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:
        """Of both together (Chan et al. 1983, equation 2.1), without the cancellation of sums of squares."""
        n = self.n + other.n
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.n * other.n / n)
        return Moments(n, self.mean + apart * (other.n / n), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D]. Raises UsageError for fewer than two pictures."""
        if self.n < 2:
            raise UsageError(
                f"a Frechet distance needs at least 2 pictures on each side, better thousands; found {self.n}"
            )
        return self.scatter / (self.n - 1)


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or not len(features):
        raise UsageError(f"features are {list(features.shape)}; they must be [N, D] with N above 0")
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(dim=1).sum())
        raise DataError(
            f"features of {bad} of {len(features)} pictures are not finite; check the pictures and the model"
        )
    return features.detach().cpu().double()


def _same_width(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UsageError(f"features have {a.shape[-1]} and {b.shape[-1]} dimensions; both must come from one extractor")


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, equation 6): the FID.

    (S1 S2)^(1/2) has the eigenvalues of (L^T S2 L)^(1/2) with S1 = L L^T: two symmetric eigenproblems, which cannot
    become complex, and also serve where a covariance is singular.
    """
    _same_width(a.mean, b.mean)
    values, vectors = torch.linalg.eigh(a.covariance)
    factor = vectors * values.clamp(min=0).sqrt()
    crossed = torch.linalg.eigvalsh(factor.T @ b.covariance @ factor).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return float(apart + a.covariance.trace() + b.covariance.trace() - 2 * crossed)


def frechet_bias(reference: Moments, n: int, m: int) -> float:
    """The expected Frechet distance of n and m pictures when both come from the reference's Gaussian.

    To second order in the error of a Wishart covariance: with eigenvalues v, (1/n + 1/m) times
    (tr S + 1/2 (sum_ij v_i v_j / (v_i + v_j) + tr S / 2)); good for n well above the number of dimensions.
    """
    values = torch.linalg.eigvalsh(reference.covariance).clamp(min=0)
    pairs = torch.outer(values, values) / (values[:, None] + values).clamp(min=torch.finfo(values.dtype).tiny)
    return float((1 / n + 1 / m) * (values.sum() + (pairs.sum() + values.sum() / 2) / 2))


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID of features [N, D] and [M, D]: mean and standard deviation over random subsets.

    The unbiased squared MMD with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401, section 3.1).
    Raises UsageError for fewer than two pictures on a side.
    """
    a, b = _checked(a), _checked(b)
    _same_width(a, b)
    size = min(size, len(a), len(b))
    if subsets < 1:
        raise UsageError(f"subsets is {subsets}; it must be at least 1")
    if size < 2:
        raise UsageError(f"a kernel distance needs at least 2 pictures on each side; found {len(a)} and {len(b)}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (side[torch.randperm(len(side), generator=generator)[:size]] for side in (a, b))
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found.append(within - 2 * xy.mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(unbiased=False))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    kernel: Tensor = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def cmmd(a: Tensor, b: Tensor, sigma: float = 10.0) -> float:
    """1000 times the squared MMD of unit vectors with a Gaussian kernel (Jayasumana et al. 2024, arXiv 2401.09603).

    The biased estimate, as there (section 4): never negative, and 0 for the same pictures.
    """
    a, b = _checked(a), _checked(b)
    _same_width(a, b)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        sums = [(-torch.cdist(rows, y).square() / (2 * sigma**2)).exp().sum() for rows in torch.split(x, _ROWS)]
        return torch.stack(sums).sum() / (len(x) * len(y))

    return float(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and the other way round (Kynkaanniemi et al. 2019, 1904.06991).

    A manifold is the union of balls around each point, reaching to its k-th nearest neighbour. Raises UsageError when a
    side has k pictures or fewer.
    """
    reference, samples = _checked(reference), _checked(samples)
    _same_width(reference, samples)
    if k < 1:
        raise UsageError(f"k is {k}; it must be at least 1")
    if min(len(reference), len(samples)) <= k:
        raise UsageError(f"{k} neighbours need more pictures than {len(reference)} and {len(samples)}")
    return _inside(samples, reference, k), _inside(reference, samples, k)


def _inside(points: Tensor, manifold: Tensor, k: int) -> float:
    # The nearest neighbour of a point among its own is the point itself.
    radii = torch.cat(
        [torch.cdist(rows, manifold).kthvalue(k + 1, dim=1).values for rows in torch.split(manifold, _ROWS)]
    )
    inside = [(torch.cdist(rows, manifold) <= radii).any(dim=1) for rows in torch.split(points, _ROWS)]
    return float(torch.cat(inside).double().mean())


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean KL of p(y | x) to p(y) (Salimans et al. 2016, arXiv 1606.03498, section 4): mean and deviation.

    logits: [N, classes], in random order cut into `splits` parts. Raises UsageError for fewer pictures than parts.
    """
    logits = _checked(logits)
    if splits < 1:
        raise UsageError(f"splits is {splits}; it must be at least 1")
    if len(logits) < splits:
        raise UsageError(f"{splits} splits need as many pictures; found {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits[order].tensor_split(splits):
        log_p = part.log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0, keepdim=True) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(unbiased=False))


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 100 max(cosine, 0) over pairs of unit vectors [N, D] (Hessel et al. 2021, arXiv 2104.08718)."""
    images, texts = _checked(images), _checked(texts)
    _same_width(images, texts)
    if len(images) != len(texts):
        raise UsageError(f"a CLIP score needs a text for each image; found {len(images)} images, {len(texts)} texts")
    return float(100 * (images * texts).sum(dim=1).clamp(min=0).mean())


def compare(reference: Tensor, samples: Tensor, train: Tensor | None = None, seed: int = 0) -> dict[str, float]:
    """The distances of samples [M, D] to reference pictures [N, D], each with its floor, that of a perfect generator.

    The floor is the distance of the pictures `train` to the reference, or of one half of the reference to the other.
    Raises UsageError for fewer than four pictures on a side, or fewer than two of `train`.
    """
    if min(len(reference), len(samples)) < 4:
        raise UsageError(f"distances need at least 4 pictures on each side; found {len(reference)} and {len(samples)}")
    if train is not None and len(train) < 2:
        raise UsageError(f"the floor needs at least 2 pictures that the model was trained on; found {len(train)}")
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    halves = reference[order[: len(order) // 2]], reference[order[len(order) // 2 :]]
    at_best = (reference, train) if train is not None else halves
    known, drawn = Moments.of(reference), Moments.of(samples)
    best = [Moments.of(side) for side in at_best]
    size = min(1000, len(samples), *(len(side) for side in at_best))
    kid, deviation = kernel_distance(reference, samples, size=size)
    precision, recall = precision_recall(reference, samples)
    return {
        "frechet": frechet_distance(known, drawn),
        "frechet_floor": frechet_distance(best[0], best[1]),
        "frechet_bias": frechet_bias(known, len(reference), len(samples)),
        "kid": kid,
        "kid_std": deviation,
        "kid_floor": kernel_distance(*at_best, size=size)[0],
        "precision": precision,
        "recall": recall,
    }
