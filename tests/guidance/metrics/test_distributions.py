"""Against closed forms, and against the libraries whose numbers people compare with."""

import math
import warnings

import numpy as np
import pytest
import torch

from clipkit.errors import DataError, UsageError
from clipkit.guidance.metrics.distributions import (
    Moments,
    clip_score,
    cmmd,
    compare,
    frechet_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def gaussian(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def torchmetrics():
    pytest.importorskip("torchmetrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchmetrics.image

        return torchmetrics


class Same(torch.nn.Module):
    """A "network" whose features are its input, so that torchmetrics sees the same ones."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, x):
        return x


@pytest.mark.parametrize(("least", "near"), [(0.5, 1e-12), (0.0, 1e-7)])  # a root of what rounding leaves of 0
def test_frechet_distance_of_gaussians_with_known_moments(least, near):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 6))
    rotation = torch.from_numpy(np.linalg.qr(a)[0])
    one, other = (torch.tensor([4.0, 1, 9, least, 2, 0.25]).double(), torch.tensor([1.0, 1, 4, 3, 2, least]).double())
    # Covariances that commute: the distance is that of the standard deviations, axis by axis.
    first = Moments(3, torch.zeros(6).double(), 2 * rotation @ one.diag() @ rotation.T)
    second = Moments(3, torch.from_numpy(b[0]), 2 * rotation @ other.diag() @ rotation.T)
    expected = float((one.sqrt() - other.sqrt()).square().sum()) + float((b[0] ** 2).sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=near)
    assert abs(frechet_distance(first, first)) < 1e-10


def test_frechet_distance_equals_torchmetrics():
    tm = torchmetrics()
    a, b = gaussian(300, 24), gaussian(200, 24, seed=1, scale=1.3, shift=0.2)
    theirs = tm.image.fid.FrechetInceptionDistance(feature=Same(24), input_img_size=(24,))
    theirs.set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert math.isclose(frechet_distance(Moments.of(a), Moments.of(b)), float(theirs.compute()), rel_tol=1e-6)


def test_frechet_distance_of_singular_covariances_is_that_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(8, 20), gaussian(9, 20, seed=1)
    one, other = Moments.of(a), Moments.of(b)
    crossed = linalg.sqrtm((one.covariance + 1e-14 * torch.eye(20)) @ (other.covariance + 1e-14 * torch.eye(20)))
    expected = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace()
    expected -= 2 * np.trace(crossed.real)
    assert math.isclose(frechet_distance(one, other), float(expected), rel_tol=1e-5)


def test_moments_of_batches_are_those_of_the_whole():
    x = gaussian(100, 5, shift=1e4)  # a sum of squares would lose eight digits here
    parts = Moments.of(x[:1]) + Moments.of(x[1:40]) + Moments.of(x[40:])
    whole = Moments.of(x)
    assert parts.n == 100
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.covariance, x.T.cov())


def test_the_expected_bias_is_what_equal_distributions_show():
    scale = torch.linspace(0.2, 2, 12).double()
    pairs = [(gaussian(400, 12, 2 * i, scale), gaussian(300, 12, 2 * i + 1, scale)) for i in range(60)]
    found = np.mean([frechet_distance(Moments.of(a), Moments.of(b)) for a, b in pairs])
    exact = Moments(2, torch.zeros(12).double(), scale.square().diag())
    assert math.isclose(frechet_bias(exact, 400, 300), found, rel_tol=0.06)


def test_kernel_distance_equals_torchmetrics_and_is_unbiased():
    tm = torchmetrics()
    a, b = gaussian(60, 16), gaussian(60, 16, seed=1, shift=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the memory that features take
        theirs = tm.image.kid.KernelInceptionDistance(feature=Same(16), subsets=1, subset_size=60)
    theirs.update(a.float(), real=True)
    theirs.update(b.float(), real=False)
    assert math.isclose(kernel_distance(a, b, subsets=1, size=60)[0], float(theirs.compute()[0]), rel_tol=1e-4)
    alike = [kernel_distance(gaussian(50, 4, i), gaussian(50, 4, 1000 + i), subsets=1)[0] for i in range(200)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / math.sqrt(200)


def test_kernel_distance_repeats_itself():
    a, b = gaussian(50, 4), gaussian(70, 4, seed=1)
    assert kernel_distance(a, b, size=20) == kernel_distance(a, b, size=20) != kernel_distance(a, b, size=20, seed=1)


def test_inception_score_equals_torchmetrics_and_its_bounds():
    tm = torchmetrics()
    logits = 3 * gaussian(90, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tm.image.inception.InceptionScore(feature=Same(7), splits=1)
    theirs.update(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the deviation over one split
        expected = float(theirs.compute()[0])
    assert math.isclose(inception_score(logits, splits=1)[0], expected, rel_tol=1e-5)
    certain = 100 * torch.eye(5).repeat(8, 1)
    assert math.isclose(inception_score(certain, splits=1)[0], 5, rel_tol=1e-9)
    assert math.isclose(inception_score(torch.zeros(20, 5))[0], 1, rel_tol=1e-9)


def test_cmmd_is_the_plain_sum():
    a, b = gaussian(7, 3), gaussian(5, 3, seed=1)

    def mean(x, y):
        return np.mean([[math.exp(-float((p - q).square().sum()) / 200) for q in y] for p in x])

    assert math.isclose(cmmd(a, b), 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel_tol=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_on_a_line():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    # With k = 1 every ball has radius 1; the samples lie close together at one end.
    samples = torch.tensor([[4.5], [4.6], [4.7], [5.2]])
    assert precision_recall(reference, samples, k=1) == (0.75, 0.0)
    assert precision_recall(reference, reference + 0.1, k=1) == (1.0, 1.0)
    assert precision_recall(reference, reference + 100, k=1) == (0.0, 0.0)


def test_clip_score_is_torchmetrics_formula():
    images = torch.nn.functional.normalize(gaussian(6, 8), dim=1)
    assert math.isclose(clip_score(images, images), 100, rel_tol=1e-9)
    assert clip_score(images, -images) == 0


def test_compare_has_a_floor_for_every_distance():
    a, b, train = gaussian(200, 6), gaussian(150, 6, 1, shift=2), gaussian(180, 6, 2)
    found = compare(a, b)
    assert found["frechet"] > 20 > 1 > found["frechet_floor"] > 0
    assert found["kid"] > 10 * abs(found["kid_floor"])
    assert compare(a, b, train)["frechet_floor"] == frechet_distance(Moments.of(a), Moments.of(train))
    assert found["precision"] < 0.2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Moments.of(gaussian(1, 3)).covariance, UsageError, "at least 2 pictures on each side"),
        (lambda: Moments.of(torch.full((3, 2), torch.nan)), DataError, "3 of 3 pictures are not finite"),
        (lambda: Moments.of(torch.zeros(0, 3)), UsageError, r"\[0, 3\]"),
        (lambda: frechet_distance(Moments.of(gaussian(4, 3)), Moments.of(gaussian(4, 2))), UsageError, "3 and 2 dimen"),
        (lambda: kernel_distance(gaussian(1, 3), gaussian(4, 3)), UsageError, "found 1 and 4"),
        (lambda: precision_recall(gaussian(3, 2), gaussian(9, 2)), UsageError, "more pictures than 3 and 9"),
        (lambda: compare(gaussian(9, 2), gaussian(9, 2), gaussian(1, 2)), UsageError, "trained on; found 1"),
        (lambda: compare(gaussian(9, 2), gaussian(3, 2)), UsageError, "found 9 and 3"),
        (lambda: compare(gaussian(9, 2) * math.nan, gaussian(9, 2)), DataError, "not finite"),
        (lambda: clip_score(gaussian(3, 2), gaussian(4, 2)), UsageError, "3 images, 4 texts"),
        (lambda: precision_recall(gaussian(9, 2), gaussian(9, 2), k=0), UsageError, "k is 0"),
        (lambda: kernel_distance(gaussian(9, 2), gaussian(9, 2), subsets=0), UsageError, "subsets is 0"),
        (lambda: inception_score(gaussian(9, 2), splits=0), UsageError, "splits is 0"),
        (lambda: inception_score(gaussian(3, 2)), UsageError, "10 splits need as many pictures; found 3"),
    ],
)
def test_what_cannot_be_measured(call, error, message):
    with pytest.raises(error, match=message):
        call()
