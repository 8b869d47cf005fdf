"""What a noise-aware CLIP is trained with, beside the loop."""

from clipkit.shards import Shards
from clipkit.train.noisy_clip import caption_bank


def captions(shards):
    return {caption for i in range(len(shards)) for caption in shards.read(i).captions}


def test_the_bank_has_as_many_captions_of_every_pack(packs):
    one, two = Shards(packs / "train"), Shards(packs / "heldout")
    bank = caption_bank([one, two], 40, seed=0)
    assert len(bank) == len(set(bank)) == 40
    assert bank == caption_bank([one, two], 40, seed=0) != caption_bank([one, two], 40, seed=1)
    only = captions(two) - captions(one)
    assert 10 <= len(only & set(bank)) <= 20  # some captions are in both packs
    assert set(bank) <= captions(one) | captions(two)


def test_a_small_pack_gives_what_it_has(packs):
    shards = Shards(packs / "heldout")
    assert set(caption_bank([shards], 10_000, seed=0)) == captions(shards)
