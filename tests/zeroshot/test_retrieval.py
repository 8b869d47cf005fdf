import json

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

import clipkit
from clipkit.cli import cli
from clipkit.data.shards import Shards
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.zeroshot import retrieval


@pytest.fixture(scope="module")
def clip(chain):
    return clipkit.load(chain / "clip", "cpu")


def test_a_hand_made_matrix():
    """Images are the axes, so a text's coordinates are its similarities. Two texts of each of three images."""
    texts = torch.tensor([
        [0.9, 0.1, 0.0], [0.2, 0.8, 0.0],  # of image 0; the second looks like image 1
        [0.0, 0.5, 0.6], [0.0, 0.4, 0.3],  # of image 1
        [0.7, 0.0, 0.6], [0.1, 0.0, 0.2],  # of image 2
    ])  # fmt: skip
    owner = [0, 0, 1, 1, 2, 2]
    # Image 0: 0.9, nothing above: 0. Image 1: best own 0.5, 0.8 above: 1. Image 2: best own 0.6, and 0.6 ties: 1.
    assert retrieval.ranks(torch.eye(3), texts, [[0, 1], [2, 3], [4, 5]]).tolist() == [0, 1, 1]
    # texts: 0 | 1 (0.8 above 0.2) | 1 (0.6 above 0.5) | 0 | 1 (0.7 above 0.6) | 0
    assert retrieval.ranks(texts, torch.eye(3), [[i] for i in owner]).tolist() == [0, 1, 1, 0, 1, 0]
    found = retrieval.recalls(torch.eye(3), texts, owner)
    assert found["image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert found["text_to_image_recall@1"] == 0.5
    assert found["image_to_text_recall@5"] == found["text_to_image_recall@10"] == 1.0


def test_ranks_are_those_of_the_whole_matrix():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(2100, 8), dim=1), F.normalize(torch.randn(2100, 8), dim=1)
    similarity = images @ texts.T
    wanted = (similarity > similarity.diagonal()[:, None]).sum(1)
    assert retrieval.ranks(images, texts, [[i] for i in range(2100)]).equal(wanted)


def test_ties_count_against():
    same = torch.ones(4, 2)
    rank = retrieval.ranks(same, same, [[i] for i in range(4)])
    assert (retrieval.recall(rank, 3), retrieval.recall(rank, 4)) == (0.0, 1.0)


def test_an_image_without_text():
    with pytest.raises(UsageError, match="and a text for each"):
        retrieval.recalls(torch.eye(2), torch.eye(2), [0, 0])


def test_the_command(chain, packs, capsys):
    words = ["retrieval", "--model", str(chain), "--shards", str(packs / "heldout"), "--json"]
    cli.main(words, standalone_mode=False)
    scores = json.loads(capsys.readouterr().out)
    assert (scores["n"], scores["texts"] > 64) == (64, True)
    assert 0 <= scores["image_to_text_recall@1"] <= scores["image_to_text_recall@5"] <= 1


class Spoilt(Shards):
    """A pack of which only every second sample can be read."""

    bad = range(0, 64, 2)

    def read(self, i):
        if i in self.bad:
            raise SampleError("damaged image")
        return super().read(i)


def test_samples_that_cannot_be_read_are_counted(clip, packs):
    shards = Spoilt(packs / "heldout")
    found = retrieval.evaluate(clip.model, clip.tokenizer, shards, batch_size=3)
    assert (found.n, found.skipped) == (32, {"damaged image": 32})
    assert found == retrieval.evaluate(clip.model, clip.tokenizer, shards, batch_size=1)  # also of whole bad batches
    shards.bad = range(64)
    with pytest.raises(DataError, match=r"none of the 64 samples of .* can be read: 64 damaged image"):
        retrieval.evaluate(clip.model, clip.tokenizer, shards)


def scores_of_this_rank(model, pack):
    clip = clipkit.load(model, "cpu")
    found = retrieval.evaluate(clip.model, clip.tokenizer, Shards(pack), batch_size=16)
    return {"n": found.n, "texts": found.texts, **found.recalls}


def test_two_ranks_find_what_one_finds(chain, packs):
    alone = scores_of_this_rank(chain / "clip", packs / "heldout")
    assert on_ranks(2, scores_of_this_rank, chain / "clip", packs / "heldout") == [alone, alone]
