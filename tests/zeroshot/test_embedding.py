import pytest
import torch
from PIL import Image
from ranks import on_ranks

from clipkit.data.images import preprocess
from clipkit.errors import SampleError, ShardError
from clipkit.zeroshot.embedding import Encoder, embed

BAD = {2: "damaged image", 6: "not an image"}


def read(row):
    if row in BAD:
        raise SampleError(BAD[row], f"image {row}")
    return Image.new("RGB", (8, 6), (row, 0, 255 - row)), [f"image {row}"]


def colours():
    """An encoder whose embedding is the colour of the first pixel."""
    return Encoder(lambda image: preprocess(image, 4), lambda pixels: pixels[:, :, 0, 0].float(), 3)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (3, 2), (100, 0)])
def test_rows_are_embedded_in_their_order_and_bad_ones_skipped_with_a_reason(batch_size, workers):
    found = embed(colours(), read, range(1, 8), batch_size, workers)
    assert (found.rows, found.skipped) == ([1, 3, 4, 5, 7], BAD)
    assert found.features.tolist() == [[row, 0, 255 - row] for row in found.rows]
    assert found.notes == [[f"image {row}"] for row in found.rows]
    assert found.reasons == {"damaged image": 1, "not an image": 1}


def test_no_rows_and_no_readable_rows():
    assert embed(colours(), read, []).features.shape == (0, 3)
    found = embed(colours(), read, [6, 2], batch_size=1)
    assert (found.features.shape, found.rows, found.skipped) == ((0, 3), [], BAD)


def test_other_errors_end_the_loop():
    def broken(row):
        raise ShardError("the shard is gone")

    with pytest.raises(ShardError, match="the shard is gone"):
        embed(colours(), broken, range(3))


def test_the_global_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    embed(colours(), read, range(4))
    assert torch.get_rng_state().equal(state)


def on_this_rank(shared):
    batches = []
    encoder = colours()

    def encode(pixels):
        batches.append(len(pixels))
        return encoder.encode(pixels)

    found = embed(Encoder(encoder.preprocess, encode, 3), read, range(7), batch_size=2, shared=shared)
    reasons = "".join(found.skipped.values())
    return {"rows": found.rows, "features": found.features, "skipped": reasons, "batches": batches}


def test_ranks_share_the_rows_and_all_get_everything():
    alone = on_this_rank(False)
    for found in on_ranks(3, on_this_rank, True):
        assert found["rows"] == alone["rows"]
        assert found["features"].equal(alone["features"])
        assert found["skipped"] == alone["skipped"]
        assert found["batches"] == [2, 1]  # as many on each rank: the last row of two of them is padding


def test_a_rank_may_embed_rows_of_its_own():
    alone = on_this_rank(False)
    for found in on_ranks(2, on_this_rank, False):
        assert found["features"].equal(alone["features"])
