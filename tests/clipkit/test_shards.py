import contextlib
import json
import shutil

import numpy as np
import pytest

from clipkit.errors import SampleError, ShardError
from clipkit.shards import Shards, scan


@pytest.fixture
def folder(packs, tmp_path):
    return shutil.copytree(packs / "train", tmp_path / "pack")


def test_reads_every_sample_with_its_captions_and_class(packs):
    shards = Shards(packs / "train")
    samples = [shards.read(i) for i in range(len(shards))]
    assert len(samples) == 240
    assert len({s.image for s in samples}) == 240
    for s in samples[:5]:
        assert any(shards.classes[s.label][0].split()[1] in c for c in s.captions)


def test_missing_shard(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar is missing"):
        Shards(folder)


def test_shortened_shard(folder):
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-10240])
    with pytest.raises(ShardError, match="bytes found"):
        Shards(folder)


def test_a_flipped_bit_anywhere_is_found(folder):
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="sha256"):
        Shards(folder)


def test_lost_or_damaged_offsets_are_made_again(folder):
    expected = Shards(folder).read(42)
    np.save(folder / "shard-000000.npy", np.zeros((100, 6), dtype=np.int64))
    (folder / "shard-000001.npy").unlink()
    shards = Shards(folder)
    assert shards.read(42) == expected
    assert shards.read(142).captions


def test_shards_from_elsewhere_get_an_index(folder):
    expected = Shards(folder).read(7)
    for extra in [*folder.glob("*.npy"), folder / "index.json"]:
        extra.unlink()
    assert Shards(folder).read(7) == expected


def test_index_that_is_not_one(folder):
    (folder / "index.json").write_text("[]")
    with pytest.raises(ShardError, match="not an index"):
        Shards(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ShardError, match="clipkit pack"):
        Shards(tmp_path / "nothing")


def test_no_cut_is_silent(packs, tmp_path):
    """Cut at every block and in between: either all samples are still there, or the damage is reported."""
    whole = (packs / "heldout" / "shard-000000.tar").read_bytes()
    expected = len(scan(packs / "heldout" / "shard-000000.tar"))
    cut = tmp_path / "cut.tar"
    sizes = sorted({*range(0, len(whole), 512 * 7), *range(100, len(whole), 51_003), len(whole) - 512})
    for size in sizes:
        cut.write_bytes(whole[:size])
        with contextlib.suppress(ShardError):
            assert len(scan(cut)) == expected, f"silent loss when cut to {size} bytes"


def test_no_header_bit_flip_is_silent(packs, tmp_path):
    path = packs / "heldout" / "shard-000000.tar"
    whole = bytearray(path.read_bytes())
    offsets = scan(path)
    headers = [int(o) - 512 for o in offsets[1:30, 0]]
    flipped = tmp_path / "flipped.tar"
    rng = np.random.default_rng(0)
    for header in headers:
        data = whole.copy()
        data[header + int(rng.integers(512))] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(data)
        with contextlib.suppress(ShardError):
            assert np.array_equal(scan(flipped), offsets), f"silent change in the header at {header}"


def _tar_with(tmp_path, **members):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "shard-000000.tar")) as writer:
        writer.write({"__key__": "a", **members})
    return Shards(tmp_path)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"no image"}, "no image"),
        ({"jpg": b"x", "txt": b"  "}, "no caption"),
        ({"jpg": b"x", "json": b"{"}, "bad metadata"),
        ({"jpg": b"x", "json": json.dumps({"captions": [3]}).encode()}, "bad metadata"),
    ],
)
def test_bad_samples_have_a_reason(tmp_path, members, reason):
    with pytest.raises(SampleError) as error:
        _tar_with(tmp_path, **members).read(0)
    assert error.value.reason == reason


def test_long_captions_are_cut(tmp_path):
    shards = _tar_with(tmp_path, jpg=b"x", txt=b"a" * 1_000_000)
    assert len(shards.read(0).captions[0]) == 4096
