import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipkit
from clipkit.errors import UsageError
from clipkit.model import CLIPConfig
from clipkit.zeroshot import classify, retrieval
from clipkit.zeroshot.datasets import ImageSet


@pytest.fixture(scope="module")
def clip(chain):
    return clipkit.load(chain / "clip", "cpu")


def test_the_head_is_the_normalised_mean_of_normalised_prompts(clip):
    templates, names = ["a {}.", "one {}"], ["red house", ["boat", "ship"]]
    head = classify.class_head(clip.model, clip.tokenizer, names, templates)
    with torch.no_grad():
        for row, group in zip(head, [["red house"], ["boat", "ship"]], strict=True):
            each = [clip.model.encode_text(clip.tokenizer(t.format(n)))[0] for n in group for t in templates]
            torch.testing.assert_close(row, F.normalize(torch.stack(each).mean(0), dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["a {}"], "needs classes and templates"),
        (["cat"], [], "needs classes and templates"),
        (["cat", " "], ["a {}"], "class name is empty"),
        ([[]], ["a {}"], "class name is empty"),
        (["cat"], ["a cat"], "must hold exactly one"),
    ],
)
def test_heads_that_make_no_sense(clip, names, templates, message):
    with pytest.raises(UsageError, match=message):
        classify.class_head(clip.model, clip.tokenizer, names, templates)


class Fake:
    """A model whose image feature is the picture's colour: what is right is known."""

    config = CLIPConfig(image_size=4)

    def encode_image(self, pixels):
        return F.normalize(pixels[:, :, 0, 0].float() + 1e-3, dim=1)


def colours(labels):
    swatches = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]

    def get(i):
        shown, label = labels[i]
        return Image.new("RGB", (4, 4), swatches[shown]), label

    return ImageSet("colours", [["red"], ["green"], ["blue"]], ["{}"], len(labels), get)


def test_scores_are_counted_right():
    shown_and_label = [(0, 0), (0, 0), (0, 1), (1, 1), (2, 1), (1, 1)]
    scores = classify.evaluate(Fake(), torch.eye(3), colours(shown_and_label), batch_size=4)
    assert (scores.n, scores.top1, scores.top5) == (6, pytest.approx(4 / 6), 1.0)
    assert scores.mean_per_class == pytest.approx((1 + 2 / 4) / 2)  # no image of the third class


def test_an_empty_set(clip):
    with pytest.raises(UsageError, match="holds no image"):
        classify.evaluate(Fake(), torch.eye(3), colours([]))


def test_recall_counts_ties_against():
    features = torch.eye(4)
    assert retrieval.recall(features, features, 1) == 1.0
    assert retrieval.recall(features, features.roll(1, 0), 1) == 0.0
    same = torch.ones(4, 2)
    assert retrieval.recall(same, same, 3) == 0.0
    assert retrieval.recall(same, same, 4) == 1.0


def test_retrieval_over_a_pack(clip, packs):
    from clipkit.shards import Shards

    scores = retrieval.evaluate(clip.model, clip.tokenizer, Shards(packs / "heldout"), batch_size=20)
    assert scores["n"] == 64
    assert 0 <= scores["image_to_text_recall@1"] <= scores["image_to_text_recall@5"] <= 1
