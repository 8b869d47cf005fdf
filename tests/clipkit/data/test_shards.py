import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.data.captions import clean_caption
from clipkit.data.inspection import verify
from clipkit.data.manifest import index_folder
from clipkit.data.remote import Cache
from clipkit.data.shards import Shards
from clipkit.data.sources import pictures
from clipkit.data.tar_scan import scan, split_key
from clipkit.errors import SampleError, ShardError, UsageError


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
    for extra in [*folder.glob("*.npy"), folder / "pack.json"]:
        extra.unlink()
    assert Shards(folder).read(7) == dataclasses.replace(expected, label=None)  # the classes were in the index


@pytest.mark.parametrize("read_only", [False, True])
def test_a_pack_of_version_0_1_is_read_from_its_index(folder, read_only, monkeypatch):
    if read_only:
        monkeypatch.setattr("clipkit.data.manifest.check_writable", None)
    expected = Shards(folder)
    samples = [expected.read(i) for i in range(0, 240, 40)]
    (folder / "pack.json").rename(folder / "index.json")
    before = sorted(folder.iterdir())
    former = Shards(folder)
    assert (former.index, former.classes) == (expected.index, expected.classes)
    assert [former.read(i) for i in range(0, 240, 40)] == samples
    assert len(list(pictures(str(folder)))) == 240
    assert verify(str(folder)).damaged == {}
    assert sorted(folder.iterdir()) == before


def test_a_pack_and_an_index_of_embeddings_may_share_a_folder(folder):
    about = json.dumps({"source": "x", "weights": "y", "pictures": "z"})
    for name in ("index.json", "embeddings.json"):
        (folder / name).write_text(about)
    assert len(Shards(folder)) == 240
    (folder / "pack.json").unlink()
    assert len(Shards(folder)) == 240
    assert (folder / "index.json").read_text() == about


@pytest.mark.parametrize("name", ["index.json", "embeddings.json"])
def test_an_index_of_embeddings_is_said_to_be_one(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"source": "x", "weights": "y", "pictures": "z"}))
    for open_it in (Shards, lambda folder: next(pictures(str(folder))), lambda folder: verify(str(folder))):
        with pytest.raises(ShardError) as error:
            open_it(tmp_path)
        assert str(error.value) == f"{tmp_path} is an index of embeddings, not a pack; `clipkit search` reads it"


@pytest.mark.parametrize("name", ["pack.json", "index.json"])
def test_index_that_is_not_one(folder, name):
    (folder / "pack.json").unlink()
    for text, what in (("[]", "holds a list"), ("{}", "lacks 'format'"), ("", "Expecting value"), ("\0", "Expecting")):
        (folder / name).write_text(text)
        with pytest.raises(ShardError, match=f"not the manifest of a pack: .*{what}"):
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
        ({"jpg": b"x", "json": json.dumps({"captions": [3]}).encode()}, "no caption"),
        ({"jpg": b"x", "json": json.dumps({"captions": None, "caption": None}).encode()}, "no caption"),
        ({"jpg": b"x", "json": json.dumps({"captions": ["  "], "caption": ["a"]}).encode()}, "no caption"),
        ({"jpg": b"x", "txt": b" ", "json": b"[]"}, "bad metadata"),
        ({"jpg": b"x", "json": b"[" * 100_000}, "bad metadata"),
        ({"gif": b"x", "txt": b"a"}, "no image"),
        ({"seg.png": b"x", "txt": b"a"}, "no image"),
    ],
)
def test_bad_samples_have_a_reason(tmp_path, members, reason):
    with pytest.raises(SampleError) as error:
        _tar_with(tmp_path, **members).read(0)
    assert error.value.reason == reason


def test_long_captions_are_cut(tmp_path):
    shards = _tar_with(tmp_path, jpg=b"x", txt=b"a" * 1_000_000)
    assert len(shards.read(0).captions[0]) == 4096


@pytest.mark.parametrize("label", [3, -1, 1 << 70, True, 1.0, "cat", [1]])
def test_a_label_is_one_of_the_classes_of_the_index(tmp_path, label):
    record = {"captions": ["a"], "label": label}
    shards = _tar_with(tmp_path, jpg=b"x", json=json.dumps(record).encode())
    assert (shards.read(0).captions, shards.read(0).label) == (("a",), None)
    index_folder(tmp_path, {"classes": [["a"], ["b"], ["c"]]})
    with pytest.raises(SampleError, match=r"bad metadata: label .* of 3 classes"):
        Shards(tmp_path).read(0)


@pytest.mark.parametrize(
    ("text", "record", "captions"),
    [
        ("good", {"key": "0", "caption": "x", "url": "u", "status": "success", "width": 3, "label": "cat"}, ["good"]),
        ("good", {"caption": "x", "captions": None, "label": 3.0}, ["good"]),
        ("good", {"captions": "one text"}, ["good"]),
        ("good", {"captions": [{"text": "x"}]}, ["good"]),
        ("good", [1, 2], ["good"]),
        ("good", None, ["good"]),
        ("  ", {"caption": "x"}, ["x"]),
        (None, {"caption": "x", "captions": []}, ["x"]),
        (None, {"captions": ["x", " ", "y"]}, ["x", "y"]),
        ("good", {"captions": ["x", "y"], "label": None}, ["x", "y"]),
    ],
)
def test_the_json_of_others(tmp_path, text, record, captions):
    members = {"jpg": b"x", "json": json.dumps(record).encode()} | ({} if text is None else {"txt": text.encode()})
    sample = _tar_with(tmp_path, **members).read(0)
    assert (list(sample.captions), sample.label) == (captions, None)


def test_a_broken_json_beside_a_caption(tmp_path):
    """Elsewhere nothing depends on it; in a pack with classes the label would be gone."""
    assert _tar_with(tmp_path, jpg=b"x", txt=b"good", json=b"{").read(0).captions == ("good",)
    index_folder(tmp_path, {"classes": [["a"]]})
    with pytest.raises(SampleError, match="bad metadata"):
        Shards(tmp_path).read(0)


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


def _tar_of(path, *names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(*_member(name, data=f"bytes of {name}".encode()))
    return path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", ".jpg")),
        ("./a.jpg", ("a", ".jpg")),
        ("v1.2/a.seg.png", ("v1.2/a", ".seg.png")),
        ("./v1.2//a", ("v1.2/a", "")),
        ("a.", ("a", ".")),
    ],
)
def test_keys_end_at_the_first_dot_of_the_base_name(name, parts):
    assert split_key(name) == parts


@given(st.text(st.sampled_from("ab./"), min_size=1, max_size=12))
def test_keys_are_those_of_webdataset(name):
    """But for `./`, doubled slashes and hidden files, which it has as keys of their own or not at all."""
    from webdataset.tariterators import base_plus_ext

    if "//" in name or any(part[:1] in (".", "") for part in name.split("/")):
        return
    key, suffix = base_plus_ext(name)
    assert split_key(name) == ((name, "") if key is None else (key, f".{suffix}"))


@pytest.mark.parametrize("prefix", ["", "./", "part.0/", "./part.0/x/"])
def test_names_of_members(tmp_path, prefix):
    names = ["0.seg.png", "0.jpg", "0.cls", "0.txt", "1.txt", "1.mask.png", "1.JPEG", "1.depth.jpg"]
    _tar_of(tmp_path / "0.tar", *(prefix + name for name in names))
    shards = Shards(tmp_path)
    assert [shards.read(i).image.decode() for i in range(2)] == [f"bytes of {prefix}0.jpg", f"bytes of {prefix}1.JPEG"]
    assert (len(shards), shards.skipped) == (2, {})


def test_what_macos_puts_beside_files_is_no_data(tmp_path):
    names = ["./._0.jpg", "./0.jpg", "./._0.txt", "./0.txt", "__MACOSX/._0.jpg", ".DS_Store", "x/._0.txt", "._1.json"]
    _tar_of(tmp_path / "0.tar", *names)
    assert (len(Shards(tmp_path)), Shards(tmp_path).skipped) == (1, {})
    assert Shards(tmp_path).read(0).captions == ("bytes of ./0.txt",)


def test_members_that_are_there_twice_are_counted_and_the_first_counts(tmp_path):
    _tar_of(tmp_path / "0.tar", "0.png", "0.jpg", "0.txt", "0.txt", "1.jpg", "1.txt")
    shards = Shards(tmp_path)
    assert shards.read(0).image == b"bytes of 0.png"
    assert (len(shards), shards.skipped) == (2, {"second image of a key": 1, "second caption of a key": 1})


def test_members_of_a_key_that_lie_apart_are_counted(tmp_path):
    _tar_of(tmp_path / "0.tar", "0.jpg", "1.jpg", "0.txt", "1.txt", "2.jpg", "2.txt")
    found = scan(tmp_path / "0.tar")
    assert found.refused == {"members of a key apart": 2}
    assert {k: v.tolist() for k, v in found.incomplete().items()} == {
        "no image": [False, False, True, True, False],
        "no caption": [True, True, False, False, False],
    }


@pytest.mark.parametrize("zeros", [0, 512, 30 << 10])
def test_what_follows_the_end_of_a_shard_is_never_dropped(tmp_path, zeros):
    one, other = (_tar_of(tmp_path / f"{n}.tar", f"{n}.jpg", f"{n}.txt").read_bytes() for n in (0, 1))
    (tmp_path / "0.tar").write_bytes(one + bytes(zeros))
    assert len(scan(tmp_path / "0.tar").offsets) == 1
    (tmp_path / "0.tar").write_bytes(one + bytes(zeros) + other)
    with pytest.raises(ShardError, match=r"0\.tar is damaged: data after the end .* \(byte 2048\); .*`cat`"):
        Shards(tmp_path)


def test_a_lost_header_in_the_middle_is_no_end(tmp_path):
    path = _tar_of(tmp_path / "0.tar", "0.jpg", "0.txt", "1.jpg", "1.txt")
    whole = path.read_bytes()
    for lost in (slice(1024, 2048), slice(1024, 3072)):
        path.write_bytes(whole[: lost.start] + bytes(lost.stop - lost.start) + whole[lost.stop :])
        with pytest.raises(ShardError, match=r"data after the end of the archive \(byte 1024\)"):
            scan(path)


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder of shards in which nothing can be written, and a cache; who runs tests may be root."""
    folder, cache = tmp_path / "shards", Cache(tmp_path / "cache")
    folder.mkdir()
    for i in range(2):
        _tar_of(folder / f"{i}.tar", f"{i}.jpg", f"{i}.txt")
    closed = {folder}

    def check(place):
        if closed & {place, *place.parents}:
            raise UsageError(f"cannot write into {place}: Read-only file system")

    monkeypatch.setattr("clipkit.data.manifest.check_writable", check)
    return folder, cache, closed


def test_the_index_of_shards_on_a_read_only_place_is_in_the_cache(locked, capsys):
    folder, cache, _ = locked
    before = sorted(folder.iterdir())
    shards = Shards(folder, cache=cache)
    assert [shards.read(i).image for i in range(2)] == [b"bytes of 0.jpg", b"bytes of 1.jpg"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(next((cache.folder / "indexes").iterdir())) in said
    assert sorted(folder.iterdir()) == before


def test_the_cached_index_is_used_again_with_its_offsets(locked, capsys, monkeypatch):
    folder, cache, _ = locked
    Shards(folder, cache=cache)
    capsys.readouterr()
    monkeypatch.setattr("clipkit.data.manifest.scan", None)
    monkeypatch.setattr("clipkit.data.shards.scan", None)
    again = pickle.loads(pickle.dumps(Shards(folder, cache=cache)))  # as a loader process gets it
    assert again.read(1).captions == ("bytes of 1.txt",)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["beside", "cache"])
def test_an_index_of_an_older_key_rule_on_a_read_only_place(locked, capsys, where):
    folder, cache, closed = locked
    if where == "beside":
        closed.clear()
    Shards(folder, cache=cache)
    place = folder if where == "beside" else next((cache.folder / "indexes").iterdir())
    index = json.loads((place / "pack.json").read_text())
    del index["keys"]
    index["shards"].pop()  # a sample that the older rule lost
    (place / "pack.json").write_text(json.dumps(index))
    closed.add(folder)
    capsys.readouterr()
    assert len(Shards(folder, cache=cache)) == 2
    assert f"{place / 'pack.json'} was made by an older version" in capsys.readouterr().err
    assert len(Shards(folder, cache=cache)) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ["grown", "replaced", "more", "fewer"])
def test_an_index_in_the_cache_is_that_of_these_shards(locked, change):
    folder, cache, _ = locked
    assert len(Shards(folder, cache=cache)) == 2
    if change == "grown":
        _tar_of(folder / "1.tar", "1.jpg", "1.txt", "2.jpg", "2.txt")
    elif change == "replaced":
        size = (folder / "1.tar").stat().st_size
        assert _tar_of(folder / "1.tar", "7.jpg", "7.txt").stat().st_size == size
        os.utime(folder / "1.tar", ns=(0, 1))
    elif change == "more":
        _tar_of(folder / "2.tar", "2.jpg", "2.txt")
    else:
        (folder / "1.tar").unlink()
    shards = Shards(folder, cache=cache)
    expected = {"grown": "012", "replaced": "07", "more": "012", "fewer": "0"}[change]
    assert [shards.read(i).image.decode() for i in range(len(shards))] == [f"bytes of {n}.jpg" for n in expected]


def test_no_place_for_an_index_is_one_line(locked):
    folder, cache, closed = locked
    closed.add(cache.folder)
    with pytest.raises(
        ShardError, match=r"shards in .* cannot write into .*shards: .*indexes.*set data\.cache"
    ) as found:
        Shards(folder, cache=cache)
    assert "\n" not in str(found.value)
    assert not cache.folder.exists()


def test_a_shard_that_may_not_be_read_is_one_line(folder, monkeypatch):
    """Who runs tests may be root, to whom everything is allowed."""
    whole = Shards(folder, verify=False)

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("clipkit.data.shards.os.open", denied)
    with pytest.raises(ShardError, match=r"shard .*shard-000000\.tar cannot be read: Permission denied"):
        whole.read(0)
    monkeypatch.setattr("clipkit.data.tar_scan.tarfile.open", denied)
    with pytest.raises(ShardError, match=r"shard .*shard-000000\.tar cannot be read: Permission denied"):
        scan(folder / "shard-000000.tar")
    monkeypatch.setattr("clipkit.data.inspection.sha256", denied)
    assert all("Permission denied" in what for what in verify(str(folder)).damaged.values())
    assert len(verify(str(folder)).damaged) == 3


def test_shards_that_came_after_the_index(tmp_path):
    _tar_of(tmp_path / "0.tar", "0.jpg", "0.txt")
    Shards(tmp_path)
    _tar_of(tmp_path / "1.tar", "1.jpg", "1.txt")
    with pytest.raises(ShardError, match=r"does not list 1\.tar, which was added later; remove it"):
        Shards(tmp_path)


def test_an_index_of_embeddings_is_no_pack(chain, packs, tmp_path, command):
    place = tmp_path / "index"
    assert command("index", packs / "heldout", place, "--model", chain)[0] == 0
    before = (place / "embeddings.json").read_text()
    for words in (
        ("verify", place),
        ("inspect", place, "--out", tmp_path / "sheet.png"),
        ("zeroshot", "--model", chain, "--dataset", f"shards:{place}"),
        ("retrieval", "--model", chain, "--shards", place),
        ("noise-curve", "--model", chain, "--shards", place),
        ("pretrain", "drawings_clip.toml", f"data.shards={place}", f"run.out={tmp_path / 'run'}"),
        ("index", place, tmp_path / "other", "--model", chain),
    ):
        code, _, err = command(*words)
        assert code == 1, words
        assert "is an index of embeddings, not a pack; `clipkit search` reads it" in err
    with pytest.raises(ShardError, match="is an index of embeddings"):
        next(pictures(str(place)))
    assert (place / "embeddings.json").read_text() == before


def test_directories_in_a_shard_are_nothing_special(tmp_path):
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
        archive.addfile(_member("photos", tarfile.DIRTYPE)[0])
        for name in ("photos/a.jpg", "photos/a.txt"):
            archive.addfile(*_member(name))
    assert (len(Shards(tmp_path)), Shards(tmp_path).index["skipped"]) == (1, {})


def test_many_shards_do_not_use_up_the_file_descriptors(tmp_path, monkeypatch):
    import webdataset

    monkeypatch.setattr("clipkit.data.shards._OPEN_FILES", 3)
    for i in range(8):
        with webdataset.TarWriter(str(tmp_path / f"shard-{i:06d}.tar")) as writer:
            writer.write({"__key__": "a", "jpg": b"x", "txt": f"caption {i}".encode()})
    shards = Shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [shards.read(i % 8).captions[0] for i in range(24)] == [f"caption {i % 8}" for i in range(24)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize("name", ["../shard.tar", "a/b.tar", "shard.zip"])
def test_an_index_cannot_name_files_elsewhere(folder, name):
    index = json.loads((folder / "pack.json").read_text())
    index["shards"][0]["name"] = name
    (folder / "pack.json").write_text(json.dumps(index))
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


def test_a_hidden_tar_beside_shards_is_no_shard(folder):
    (folder / "._shard-000000.tar").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert len(Shards(folder)) == 240
    (folder / "pack.json").unlink()
    assert len(Shards(folder)) == 240


def test_an_index_of_an_older_key_rule_is_made_again_but_not_that_of_a_pack(folder, capsys):
    packed = (folder / "pack.json").read_text()
    assert len(Shards(folder)) == 240
    assert (folder / "pack.json").read_text() == packed
    (folder / "pack.json").unlink()
    index = index_folder(folder)
    del index["keys"]
    index["shards"][0]["samples"] -= 1  # as the older rule counted
    (folder / "pack.json").write_text(json.dumps(index))
    assert len(Shards(folder)) == 240
    assert "was made by an older version with another rule for keys; it is made again" in capsys.readouterr().err
    assert len(Shards(folder)) == 240
    assert capsys.readouterr().err == ""
