import contextlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import SampleError, ShardError
from clipkit.shards import Shards, clean_caption, scan


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


def test_a_shard_cut_in_what_extends_a_header(packs, tmp_path):
    """Newer Pythons find that such a header is invalid, and take it for the end of the archive."""
    shard = packs / "heldout" / "shard-000000.tar"
    whole, image = shard.read_bytes(), int(scan(shard).offsets[-1, 0])
    extending = image - 3 * 512  # its block and its text come before the header
    assert whole[extending + 156 : extending + 157] == b"x"
    for after in (1, 512, 522):
        (tmp_path / "cut.tar").write_bytes(whole[: extending + after])
        with pytest.raises(ShardError, match="damaged tar header"):
            scan(tmp_path / "cut.tar")


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
    expected = len(scan(packs / "heldout" / "shard-000000.tar").offsets)
    cut = tmp_path / "cut.tar"
    sizes = sorted({*range(0, len(whole), 512 * 7), *range(100, len(whole), 51_003), len(whole) - 512})
    for size in sizes:
        cut.write_bytes(whole[:size])
        with contextlib.suppress(ShardError):
            assert len(scan(cut).offsets) == expected, f"silent loss when cut to {size} bytes"


def test_no_header_bit_flip_is_silent(packs, tmp_path):
    path = packs / "heldout" / "shard-000000.tar"
    whole = bytearray(path.read_bytes())
    offsets = scan(path).offsets
    headers = [int(o) - 512 for o in offsets[1:30, 0]]
    flipped = tmp_path / "flipped.tar"
    rng = np.random.default_rng(0)
    for header in headers:
        data = whole.copy()
        data[header + int(rng.integers(512))] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(data)
        with contextlib.suppress(ShardError):
            assert np.array_equal(scan(flipped).offsets, offsets), f"silent change in the header at {header}"


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
        ({"jpg": b"x", "json": json.dumps({"captions": "abc"}).encode()}, "bad metadata"),
        ({"jpg": b"x", "json": json.dumps({"captions": ["a"], "label": 1 << 70}).encode()}, "bad metadata"),
        ({"jpg": b"x", "json": json.dumps({"captions": ["a"], "label": True}).encode()}, "bad metadata"),
        ({"jpg": b"x", "json": b"[" * 100_000}, "bad metadata"),
    ],
)
def test_bad_samples_have_a_reason(tmp_path, members, reason):
    with pytest.raises(SampleError) as error:
        _tar_with(tmp_path, **members).read(0)
    assert error.value.reason == reason


def test_long_captions_are_cut(tmp_path):
    shards = _tar_with(tmp_path, jpg=b"x", txt=b"a" * 1_000_000)
    assert len(shards.read(0).captions[0]) == 4096


def _member(name, kind=tarfile.REGTYPE, data=b"x", **more):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
    for key, value in more.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (_member("../b.jpg"), "unsafe name"),
        (_member("/etc/b.jpg"), "unsafe name"),
        (_member("x/../../b.txt"), "unsafe name"),
        (_member("b.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), "link or device"),
        (_member("b.jpg", tarfile.LNKTYPE, linkname="a.jpg"), "link or device"),
        (_member("b.jpg", tarfile.CHRTYPE), "link or device"),
        (_member("b.jpg", tarfile.FIFOTYPE), "link or device"),
        (_member("b.pkl"), "pickle"),
        (_member("b.pth"), "pickle"),
    ],
)
def test_what_a_shard_must_not_hold_is_refused_and_counted(tmp_path, member, reason):
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        for info, data in (_member("a.jpg"), _member("a.txt"), member, _member("c.jpg"), _member("c.txt")):
            archive.addfile(info, data)
    shards = Shards(tmp_path)
    assert len(shards) == 2
    assert shards.index["skipped"] == {reason: 1}
    assert [p.name for p in tmp_path.parent.glob("b.*")] == []


def test_directories_in_a_shard_are_nothing_special(tmp_path):
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        archive.addfile(_member("photos", tarfile.DIRTYPE)[0])
        for name in ("photos/a.jpg", "photos/a.txt"):
            archive.addfile(*_member(name))
    assert (len(Shards(tmp_path)), Shards(tmp_path).index["skipped"]) == (1, {})


def test_many_shards_do_not_use_up_the_file_descriptors(tmp_path, monkeypatch):
    import webdataset

    monkeypatch.setattr("clipkit.shards._OPEN_FILES", 3)
    for i in range(8):
        with webdataset.TarWriter(str(tmp_path / f"shard-{i:06d}.tar")) as writer:
            writer.write({"__key__": "a", "jpg": b"x", "txt": f"caption {i}".encode()})
    shards = Shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [shards.read(i % 8).captions[0] for i in range(24)] == [f"caption {i % 8}" for i in range(24)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize("name", ["../shard.tar", "a/b.tar", "shard.zip"])
def test_an_index_cannot_name_files_elsewhere(folder, name):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="names the shard"):
        Shards(folder)


@given(st.text(st.characters(), max_size=50) | st.just("\ud800 lone") | st.just("a\x00b"))
def test_a_cleaned_caption_can_be_encoded_and_stays_clean(text):
    cleaned = clean_caption(text)
    cleaned.encode()
    assert "\x00" not in cleaned
    assert clean_caption(cleaned) == cleaned


def test_captions_spread_over_the_pack(packs):
    shards = Shards(packs / "train")
    assert len(shards.captions(1000)) >= 240
    assert 0 < len(shards.captions(24)) < len(shards.captions(1000)) / 5
