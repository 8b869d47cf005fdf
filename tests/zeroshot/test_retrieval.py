import pytest
import torch

import clipkit
from clipkit.zeroshot import retrieval


@pytest.fixture(scope="module")
def clip(chain):
    return clipkit.load(chain / "clip", "cpu")


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
