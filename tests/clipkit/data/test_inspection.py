import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clipkit.data.inspection import sheet, verify
from clipkit.data.manifest import index_folder
from clipkit.data.shards import Shards
from clipkit.data.sources import encode_png
from clipkit.errors import ShardError


@pytest.fixture
def folder(packs, tmp_path):
    return shutil.copytree(packs / "train", tmp_path / "pack")


def test_a_sound_pack(folder):
    report = verify(str(folder), per_shard=5)
    assert (report.shards, report.samples, report.decoded) == (3, 240, 15)
    assert (report.damaged, report.bad) == ({}, {})


def test_all_damage_is_found_and_named(folder):
    flipped = folder / "shard-000000.tar"
    data = bytearray(flipped.read_bytes())
    data[5000] ^= 4
    flipped.write_bytes(data)
    (folder / "shard-000002.tar").unlink()
    report = verify(str(folder))
    assert list(report.damaged) == ["shard-000000.tar", "shard-000002.tar"]
    assert "sha256" in report.damaged["shard-000000.tar"]
    assert "missing" in report.damaged["shard-000002.tar"]


def test_images_that_do_not_decode_are_counted(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "shard-000000.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": str(i), "jpg": b"broken", "txt": b"a caption"})
    assert verify(str(tmp_path)).bad == {"not an image": 4}


def test_samples_that_lack_something_are_counted_in_all_of_a_shard(tmp_path, command):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(40):
            image = {} if i % 10 == 3 else {"png": encode_png(Image.new("RGB", (9, 9)))}
            writer.write({"__key__": str(i), **image, **({} if i % 10 == 5 else {"txt": b"a caption"})})
        writer.write({"__key__": "model", "pkl": b"x"})
    report = verify(str(tmp_path), per_shard=3)
    assert (report.incomplete, report.bad, report.decoded) == ({"no image": 4, "no caption": 4}, {}, 3)
    code, out, _ = command("verify", tmp_path)
    assert code == 1
    for line in ("skipped when it was made: 1 pickle", "4 of 40 samples: no image", "no caption", "not sound"):
        assert line in out
    assert json.loads(command("verify", tmp_path, "--json")[1])["incomplete"] == report.incomplete


def test_a_shard_that_is_not_in_the_index_is_damage(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000007.tar")
    assert verify(str(folder)).damaged == {"shard-000007.tar": "the manifest does not list it"}


def test_shards_joined_by_cat_are_said_to_be_damaged(folder, command):
    (folder / "pack.json").unlink()
    one, other = folder / "shard-000000.tar", folder / "shard-000001.tar"
    one.write_bytes(one.read_bytes() + other.read_bytes())
    code, _, err = command("verify", folder)
    assert code == 1
    assert "data after the end of the archive" in err


def test_more_asked_for_than_there_is(folder):
    assert verify(str(folder), per_shard=1000).decoded == 240


def test_no_pack(tmp_path):
    with pytest.raises(ShardError):
        verify(str(tmp_path / "nothing"))


def test_the_command_says_what_is_wrong(folder, command):
    code, out, _ = command("verify", folder, "--json")
    assert (code, json.loads(out)["damaged"]) == (0, {})
    assert "sound: every checksum is right" in command("verify", folder)[1]
    (folder / "shard-000001.tar").write_bytes(b"")
    code, out, _ = command("verify", folder)
    assert code == 1
    assert "shard-000001.tar" in out
    assert "1 damaged shard" in out


def test_a_sheet_shows_samples_and_captions(folder):
    picture = np.asarray(sheet(Shards(folder), 9, 0))
    assert picture.shape[0] > 3 * 160
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert np.array_equal(picture, np.asarray(sheet(Shards(folder), 9, 0)))
    assert not np.array_equal(picture, np.asarray(sheet(Shards(folder), 9, 1)))


def test_a_sheet_of_what_cannot_be_shown_shows_why(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "shard-000000.tar")) as writer:
        writer.write({"__key__": "0", "jpg": b"broken", "txt": b"a caption"})
    index_folder(tmp_path)
    assert sheet(Shards(tmp_path), 4, 0).size == (8 + 168, 8 + 160 + 4 * 13 + 8)


def test_the_inspect_command_writes_a_png(folder, command, tmp_path):
    code, out, _ = command("inspect", folder, "-n", 4, "--out", tmp_path / "a" / "sheet.png")
    assert code == 0
    assert "sheet.png" in out
    with Image.open(tmp_path / "a" / "sheet.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("name", ["sheet.jpg", "sheet", "folder.png", "file.txt/sheet.png"])
def test_a_sheet_that_cannot_be_written_is_refused_before_the_work(folder, command, tmp_path, name, monkeypatch):
    monkeypatch.setattr("clipkit.data.inspection.sheet", None)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.txt").write_text("")
    before = sorted(tmp_path.iterdir())
    code, _, err = command("inspect", folder, "--out", tmp_path / name)
    assert code == 2
    assert str(tmp_path) in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_sheet_says_how_many_it_shows(folder, command, tmp_path):
    assert "sheet.png: 240 samples of" in command("inspect", folder, "-n", 300, "--out", tmp_path / "sheet.png")[1]
