import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import on_ranks

from clipkit.errors import DataError, SampleError, UsageError
from clipkit.models.clip import CLIPConfig
from clipkit.zeroshot import classify
from clipkit.zeroshot.datasets import ImageSet


class Fake:
    """A model whose image feature is the picture's colour: what is right is known."""

    config, logit_scale = CLIPConfig(image_size=4), torch.tensor(10.0)

    def encode_image(self, pixels):
        return F.normalize(pixels[:, :, 0, 0].float() + 1e-3, dim=1)


def colours(labels):
    swatches = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]

    def get(i):
        shown, label = labels[i]
        return Image.new("RGB", (4, 4), swatches[shown]), (label,)

    return ImageSet("colours", [["red"], ["green"], ["blue"]], ["{}"], len(labels), get)


def test_scores_are_counted_right():
    shown_and_label = [(0, 0), (0, 0), (0, 1), (1, 1), (2, 1), (1, 1)]
    scores = classify.evaluate(Fake(), torch.eye(3), colours(shown_and_label), batch_size=4)
    assert (scores.n, scores.top1, scores.top5) == (6, pytest.approx(4 / 6), 1.0)
    assert scores.mean_per_class == pytest.approx((1 + 2 / 4) / 2)  # no image of the third class


def test_an_empty_set():
    with pytest.raises(UsageError, match="holds no image"):
        classify.evaluate(Fake(), torch.eye(3), colours([]))


def test_a_head_of_another_size():
    with pytest.raises(UsageError, match="the head has 2 classes, data set 'colours' 3"):
        classify.evaluate(Fake(), torch.eye(3)[:2], colours([(0, 0)]))


def predictions(targets, ranking, confidence=None):
    targets = torch.tensor(targets).bool()
    confidence = torch.tensor(confidence or [1.0] * len(targets)).double()
    return classify.Predictions(targets, torch.tensor(ranking), confidence, None)


def test_calibration_error_against_numpy():
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(0, 1, 500), rng.uniform(0, 1, 500) < 0.4
    expected, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = classify.calibration_error(torch.tensor(confidence), torch.tensor(right))
    assert found == pytest.approx(expected, abs=1e-12)
    assert classify.calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([False, True])) == 0


def test_the_confidence_is_that_of_the_learned_temperature():
    found = classify.predict(Fake(), torch.eye(3), colours([(0, 0)]))
    feature = Fake().encode_image(torch.tensor([255, 0, 0]).reshape(1, 3, 1, 1))
    assert found.confidence[0] == pytest.approx(float((10 * feature).softmax(1).max()), rel=1e-6)


def test_the_interval_holds_what_a_bootstrap_would():
    targets = [[1, 0]] * 100
    scores = classify.score(predictions(targets, [[0, 1]] * 70 + [[1, 0]] * 30))
    assert scores.top1 == pytest.approx(0.7)
    draws = np.random.default_rng(1).choice([1] * 70 + [0] * 30, (5000, 100)).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (scores.top1_low, scores.top1_high) == (pytest.approx(low, abs=0.011), pytest.approx(high, abs=0.011))


def test_confusions_count_the_row_as_the_truth():
    matrix = classify.confusions(predictions([[1, 0, 0], [1, 0, 0], [0, 0, 1]], [[0, 1], [2, 0], [2, 1]]))
    assert matrix.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_mean_average_precision_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, (200, 6)) / 7  # with ties
    targets = rng.uniform(0, 1, (200, 6)) < 0.2
    found = classify.mean_average_precision(torch.tensor(scores), torch.tensor(targets))
    assert found == pytest.approx(metrics.average_precision_score(targets, scores, average="macro"), abs=1e-9)


def test_a_multi_label_set():
    pictures, labels = [(255, 90, 0), (0, 0, 255)], [(0, 1), (2,)]

    def get(i):
        return Image.new("RGB", (4, 4), pictures[i]), labels[i]

    images = ImageSet("two", [["red"], ["green"], ["blue"]], ["{}"], 2, get, multilabel=True)
    found = classify.predict(Fake(), torch.eye(3), images)
    assert classify.mean_average_precision(found.similarities, found.targets) == 1.0
    assert classify.score(found).top1 == 1.0


SHOWN = [(0, 0), (0, 1), (1, 1), (2, 1), (1, 1), (2, 2), (0, 0)]  # seven: the second rank's last place is padding


def broken(labels, bad):
    """`colours` of which some cannot be read."""
    images = colours(labels)

    def get(i):
        if i in bad:
            raise SampleError(bad[i], f"image {i}")
        return images[i]

    return dataclasses.replace(images, get=get)


BAD = {1: "damaged image", 5: "not an image", 6: "not an image"}  # the last one is what pads the second rank


def found_by_this_rank():
    found = classify.predict(Fake(), torch.eye(3), colours(SHOWN), batch_size=2)
    some = classify.predict(Fake(), torch.eye(3), broken(SHOWN, BAD), batch_size=2)
    counts = {"rows": torch.tensor(some.rows), "skipped": torch.tensor(sorted(some.skipped.values()))}
    return {"targets": found.targets, "ranking": found.ranking, "confidence": found.confidence, **counts}


def test_two_ranks_find_what_one_finds():
    alone = found_by_this_rank()
    for found in on_ranks(2, found_by_this_rank):
        assert all(found[name].equal(alone[name]) for name in alone)


def test_images_that_cannot_be_read_are_skipped_and_counted():
    found = classify.predict(Fake(), torch.eye(3), broken(SHOWN, BAD), batch_size=2)
    assert found.skipped == {"damaged image": 1, "not an image": 2}
    assert found.rows == [0, 2, 3, 4]
    kept = classify.predict(Fake(), torch.eye(3), colours([SHOWN[i] for i in found.rows]))
    assert all(getattr(found, n).equal(getattr(kept, n)) for n in ("targets", "ranking", "confidence"))
    assert classify.score(found) == classify.score(kept)


def test_a_multi_label_set_with_bad_images_keeps_the_other_similarities():
    images = dataclasses.replace(broken(SHOWN, BAD), multilabel=True)
    found = classify.predict(Fake(), torch.eye(3), images)
    assert found.similarities.shape == (4, 3)
    assert classify.mean_average_precision(found.similarities, found.targets) > 0


def test_when_nothing_can_be_read_it_is_an_error():
    with pytest.raises(DataError, match="none of the 7 images of colours can be read: 7 damaged image"):
        classify.predict(Fake(), torch.eye(3), broken(SHOWN, dict.fromkeys(range(7), "damaged image")))
