import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import on_ranks

import clipkit
from clipkit.cli import cli
from clipkit.data.inspection import contact_sheet
from clipkit.data.pack import pack
from clipkit.data.sources import drawings_source
from clipkit.errors import CheckpointError, DataError, UsageError
from clipkit.zeroshot import galleries, index
from clipkit.zeroshot.heads import embed_texts


@pytest.fixture(scope="module")
def clip(chain):
    return clipkit.load(chain / "clip", "cpu")


@pytest.fixture
def photographs(tmp_path):
    """Eleven pictures in folders, one of which is none."""
    rng = np.random.default_rng(0)
    for i in range(11):
        path = tmp_path / "photos" / f"year{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "year0" / "04.png").write_text("hello")
    return tmp_path / "photos"


def built(clip, chain, source, out, **how):
    index.build(clip, str(chain), index.open_gallery(str(source)), out, **how)
    return index.Index(out)


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_every_picture_finds_itself(clip, chain, photographs, tmp_path):
    found = built(clip, chain, photographs, tmp_path / "index", part_size=4, batch_size=3)
    assert (len(found), dict(found.skipped)) == (10, {"not an image": 1})
    assert "year0/04.png" not in found.keys
    for key in found.keys:
        hit = found.search(index.embed_query(found, str(photographs / key), device="cpu"), 3)[0][0]
        assert (hit.key, hit.score) == (key, pytest.approx(1, abs=2e-3))


def test_search_is_exact(clip, chain, photographs, tmp_path):
    found = built(clip, chain, photographs, tmp_path / "index", part_size=4)
    queries = F.normalize(torch.randn(5, clip.model.config.embed_dim), dim=1)
    vectors = torch.cat([torch.from_numpy(np.array(v)).float() for v in found._vectors])
    wanted = (queries @ vectors.T).topk(4, dim=1)
    for hits, scores, places in zip(found.search(queries, 4), wanted.values, wanted.indices, strict=True):
        assert [h.key for h in hits] == [found.keys[i] for i in places.tolist()]
        assert [h.score for h in hits] == pytest.approx(scores.tolist(), abs=1e-6)
    assert len(found.search(queries, 100)[0]) == 10


def test_an_interrupted_index_goes_on(clip, chain, photographs, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    built(clip, chain, photographs, whole, part_size=4)
    write, written = index._write_part, []

    def stops(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    with monkeypatch.context() as patched:
        patched.setattr(index, "_write_part", stops)
        with pytest.raises(KeyboardInterrupt):
            built(clip, chain, photographs, tmp_path / "cut", part_size=4)
    with pytest.raises(CheckpointError, match="is incomplete: part 1 is missing; run the same command again"):
        index.Index(tmp_path / "cut")
    first = (tmp_path / "cut" / "part-00000.npy").stat().st_mtime_ns
    built(clip, chain, photographs, tmp_path / "cut", part_size=4)
    assert (tmp_path / "cut" / "part-00000.npy").stat().st_mtime_ns == first
    assert files(tmp_path / "cut") == files(whole)


def build_on_rank(chain, photographs, out):
    clip = clipkit.load(f"{chain}/clip", "cpu")
    index.build(clip, str(chain), index.open_gallery(str(photographs)), index.Path(out), part_size=4)


def test_two_ranks_make_the_same_index(clip, chain, photographs, tmp_path):
    built(clip, chain, photographs, tmp_path / "one", part_size=4)
    on_ranks(2, build_on_rank, str(chain), str(photographs), str(tmp_path / "two"))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_pack_with_its_captions(clip, chain, packs, tmp_path):
    found = built(clip, chain, packs / "heldout", tmp_path / "index", texts=True, part_size=50)
    described = np.load(tmp_path / "index" / "part-00001.texts.npy")
    assert (len(found), described.shape) == (64, (14, clip.model.config.embed_dim))
    caption = clipkit.Shards(packs / "heldout").read(50).captions[0]
    with torch.no_grad():
        wanted = clip.model.encode_text(clip.tokenizer(caption))[0]
    assert np.allclose(described[0], wanted.numpy(), atol=1e-3)


def test_beyond_a_million_an_approximate_index_finds_nearly_the_same(clip, chain, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    folder, dim, count = tmp_path / "index", 32, 5000
    folder.mkdir()
    vectors = rng.normal(size=(count, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "part-00000.npy", vectors.astype(np.float16))
    about = {"format": 1, "source": "x", "model": "x", "weights": "x", "dim": dim, "count": count, "part_size": count}
    (folder / "embeddings.json").write_text(json.dumps(about))
    labels = {"keys": [str(i) for i in range(count)], "rows": list(range(count)), "skipped": {}}
    (folder / "part-00000.json").write_text(json.dumps(labels))
    found, queries = index.Index(folder), torch.from_numpy(vectors[:50]).float()
    exact = found.search(queries, 10)
    found.make_approximate()
    near = index.Index(folder).search(queries, 10)
    assert all(a[0].key == b[0].key for a, b in zip(exact, near, strict=True))
    shared = [len({h.key for h in a} & {h.key for h in b}) for a, b in zip(exact, near, strict=True)]
    assert np.mean(shared) > 4  # of 10, of uniformly random vectors, a sixteenth of the cells looked at


def test_the_commands(chain, photographs, tmp_path, capsys):
    out = str(tmp_path / "index")
    cli.main(["index", str(photographs), out, "--model", str(chain)], standalone_mode=False)
    assert capsys.readouterr().out == f"{out}: 10 pictures; skipped: 1 not an image\n"
    sheet = tmp_path / "found.png"
    cli.main(["search", out, "a red rocket", "-k", "4", "--out", str(sheet), "--json"], standalone_mode=False)
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 4
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)
    with Image.open(sheet) as picture:
        assert picture.width > 300


def change(photographs):
    """One picture more, one less, one other under the same name; 02 and 08 keep all but their rows."""
    Image.new("RGB", (40, 30), "blue").save(photographs / "a first.png")
    Image.new("RGB", (40, 30), "red").save(photographs / "year0" / "06.png")
    (photographs / "year0" / "00.png").unlink()


def counted(monkeypatch):
    """The keys that are embedded from now on, in a list."""
    keys, embed = [], galleries.embed_pictures

    def counting(clip, gallery, rows, *rest):
        keys.extend(gallery.key(row) for row in rows)
        return embed(clip, gallery, rows, *rest)

    monkeypatch.setattr(galleries, "embed_pictures", counting)
    return keys


def vectors(folder):
    found = index.Index(folder)
    return dict(zip(found.keys, np.concatenate([np.array(v, dtype=np.float32) for v in found._vectors]), strict=True))


def update(clip, chain, source, out, **how):
    return index.build(clip, str(chain), index.open_gallery(str(source)), out, part_size=4, **how)


def test_an_index_follows_its_folder(clip, chain, photographs, tmp_path, monkeypatch, capsys):
    first = update(clip, chain, photographs, tmp_path / "index")
    assert (first.pictures, first.added, first.kept) == (10, 10, 0)
    change(photographs)
    keys = counted(monkeypatch)
    capsys.readouterr()
    done = update(clip, chain, photographs, tmp_path / "index")
    assert f"clipkit: {tmp_path / 'index'}: its pictures have changed; updating\n" in capsys.readouterr().err
    assert (done.pictures, done.added, done.changed, done.dropped, done.kept) == (10, 1, 1, 1, 8)
    assert sorted(keys) == ["a first.png", "year0/04.png", "year0/06.png"]  # what could not be read is tried again
    assert dict(done.skipped) == {"not an image": 1}
    update(clip, chain, photographs, tmp_path / "fresh")
    updated, fresh = vectors(tmp_path / "index"), vectors(tmp_path / "fresh")
    assert list(updated) == list(fresh)
    for key in fresh:
        np.testing.assert_allclose(updated[key], fresh[key], atol=2e-3)
    names = {p.name for p in (tmp_path / "index").iterdir()}
    assert len(names) == 7, names  # three parts of two files and embeddings.json: nothing of the old series
    keys.clear()
    again = update(clip, chain, photographs, tmp_path / "index")
    assert (keys, again.pictures) == ([], 10)


def test_an_interrupted_update_resumes_even_if_the_folder_changes_again(
    clip, chain, photographs, tmp_path, monkeypatch
):
    update(clip, chain, photographs, tmp_path / "index")
    before = vectors(tmp_path / "index")
    change(photographs)
    write, written = index._write_part, []

    def stops(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    with monkeypatch.context() as patched:
        patched.setattr(index, "_write_part", stops)
        with pytest.raises(KeyboardInterrupt):
            update(clip, chain, photographs, tmp_path / "index")
    assert vectors(tmp_path / "index").keys() == before.keys()  # the index is still the one before
    (photographs / "year1" / "01.png").unlink()
    keys = counted(monkeypatch)
    done = update(clip, chain, photographs, tmp_path / "index")
    assert "a first.png" not in keys  # embedded before the interruption, though for another series
    assert (done.pictures, done.added, done.dropped) == (9, 1, 2)
    assert len({p.name for p in (tmp_path / "index").iterdir()}) == 7


def test_an_unfinished_index_is_updated_too(clip, chain, photographs, tmp_path, monkeypatch):
    update(clip, chain, photographs, tmp_path / "index")
    (tmp_path / "index" / "part-00002.json").unlink()
    change(photographs)
    assert update(clip, chain, photographs, tmp_path / "index").pictures == 10


def update_on_rank(chain, photographs, out):
    clip = clipkit.load(f"{chain}/clip", "cpu")
    update(clip, chain, photographs, index.Path(out))


def test_two_ranks_make_the_same_update(clip, chain, photographs, tmp_path):
    for name in ("one", "two"):
        update(clip, chain, photographs, tmp_path / name)
    change(photographs)
    update(clip, chain, photographs, tmp_path / "one")
    on_ranks(2, update_on_rank, str(chain), str(photographs), str(tmp_path / "two"))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_index_of_a_pack_follows_it(clip, chain, tmp_path, monkeypatch):
    source = tmp_path / "pack"
    pack(drawings_source("train", 12, 24, 0), source, shard_size=4)
    how = {"texts": True}
    update(clip, chain, source, tmp_path / "index", **how)
    texts = np.concatenate([np.load(p) for p in sorted((tmp_path / "index").glob("*.texts.npy"))])
    pack(drawings_source("heldout", 3, 24, 1), tmp_path / "other", shard_size=4)
    (source / "shard-000001.tar").write_bytes((tmp_path / "other" / "shard-000000.tar").read_bytes())
    (source / "pack.json").unlink()  # made again when it is opened
    keys = counted(monkeypatch)
    done = update(clip, chain, source, tmp_path / "index", **how)
    assert (done.pictures, done.changed, done.dropped, done.kept, len(keys)) == (11, 3, 1, 8, 3)
    now = np.concatenate([np.load(p) for p in sorted((tmp_path / "index").glob("*.texts.npy"))])
    assert np.array_equal(now[:4], texts[:4])
    assert np.array_equal(now[-4:], texts[-4:])
    described = embed_texts(clip.model, clip.tokenizer, [clipkit.Shards(source).read(4).captions[0]])
    np.testing.assert_allclose(now[4], described[0].numpy(), atol=1e-3)


def made_by_an_older_version(folder):
    """Described by index.json, without marks, and without the pictures that could not be read."""
    (folder / "embeddings.json").rename(folder / "index.json")
    for part in folder.glob("part-*.json"):
        labels = json.loads(part.read_text())
        part.write_text(json.dumps({k: v for k, v in labels.items() if k not in ("marks", "unread")}))


def test_an_index_of_an_older_version_is_read_and_updated(clip, chain, photographs, tmp_path, capsys):
    out = tmp_path / "index"
    update(clip, chain, photographs, out)
    made_by_an_older_version(out)
    found = index.Index(out)
    assert found.search(index.embed_query(found, str(photographs / "year1/01.png"), device="cpu"))[0][0].key == (
        "year1/01.png"
    )
    assert found.differences(index.open_gallery(str(photographs))) == ""
    assert update(clip, chain, photographs, out).pictures == 10  # nothing to do
    Image.new("RGB", (40, 30), "red").save(photographs / "year0" / "06.png")
    assert index.Index(out).differences(index.open_gallery(str(photographs))) != ""
    capsys.readouterr()
    done = update(clip, chain, photographs, out)
    assert "is of an older version, which did not record changes of pictures" in capsys.readouterr().err
    assert (done.pictures, done.kept) == (10, 0)


def test_what_was_skipped_is_counted_over_all_parts(clip, chain, photographs, tmp_path):
    (photographs / "year1" / "03.png").write_text("hello")
    found = built(clip, chain, photographs, tmp_path / "index", part_size=3)
    assert dict(found.skipped) == {"not an image": 2}


def test_search_says_that_an_index_is_older_than_its_folder(command, clip, chain, photographs, tmp_path):
    out = tmp_path / "index"
    update(clip, chain, photographs, out)
    code, _, err = command("search", out, "a red rocket", "--model", chain)
    assert (code, err) == (0, "")
    change(photographs)
    code, text, err = command("search", out, "a red rocket", "--model", chain, "--json")
    assert (code, len(json.loads(text)["hits"])) == (0, 10)
    wanted = f"clipkit: {out} is older than {photographs}: 1 new, 1 changed, 1 gone; update it with clipkit index"
    assert err.startswith(wanted)
    assert err.count("\n") == 1
    photographs.rename(tmp_path / "moved")
    code, text, err = command("search", out, "a red rocket", "--model", chain)
    assert (code, len(text.splitlines())) == (0, 10)
    assert err == f"clipkit: cannot compare the index with its pictures: no folder at {photographs}\n"
    code, text, err = command("search", out, "a red rocket", "--model", chain, "--out", tmp_path / "new" / "sheet.png")
    assert (code, text) == (1, "")
    assert err == f"clipkit: cannot show what is found: no folder at {photographs}\n"
    assert not (tmp_path / "new").exists()


def test_a_sheet_shows_what_was_found_not_what_is_in_its_row_now(clip, chain, photographs, tmp_path):
    update(clip, chain, photographs, tmp_path / "index")
    found = index.Index(tmp_path / "index")
    hits = found.search(index.embed_query(found, str(photographs / "year1/05.png"), device="cpu"), 10)[0]
    change(photographs)
    shown = dict(zip((hit.key for hit in hits), (image for image, _ in index.show(found, hits)), strict=True))
    assert shown["year1/05.png"] == (photographs / "year1/05.png").read_bytes()
    assert shown["year0/00.png"] == "it is gone"


def test_pictures_that_have_gone_are_named(command, clip, chain, photographs, tmp_path):
    update(clip, chain, photographs, tmp_path / "index")
    (photographs / "year1" / "01.png").unlink()
    sheet = tmp_path / "sheet.webp"
    code, _, err = command("search", tmp_path / "index", "a boat", "--model", chain, "--out", sheet)
    assert code == 0
    assert err.splitlines()[1] == "clipkit: cannot show year1/01.png (it is gone)"
    with Image.open(sheet) as picture:
        assert picture.format == "WEBP"


def test_an_index_without_pictures(command, clip, chain, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("hello")
    done = update(clip, chain, tmp_path / "photos", tmp_path / "index")
    assert done.pictures == 0
    code, _, err = command("search", tmp_path / "index", "a boat", "--model", chain)
    assert (code, err) == (2, f"clipkit: {tmp_path / 'index'} holds no picture to find; skipped: 1 not an image\n")


def test_a_query_is_text_or_a_picture_that_is_there(command, clip, chain, photographs, tmp_path):
    out = tmp_path / "index"
    update(clip, chain, photographs, out)
    words = ["--model", chain, "-k", "1"]
    assert command("search", out, "a red house beside a long river " * 10, *words)[0] == 0
    for query, code, message in (
        ("nofile.jpg", 2, "the query nofile.jpg does not exist; it looks like the path of a file"),
        (photographs, 2, "is a folder; give a file, or text"),
        (photographs / "year0/04.png", 1, "not an image"),
        (" ", 2, "the query is empty"),
    ):
        found, text, err = command("search", out, query, *words)
        assert (found, text) == (code, "")
        assert message in err
    code, _, err = command("search", out, "a", "red", "house", *words)
    assert (code, err) == (2, "clipkit: the query has 3 parts; put it in quotes: 'a red house'\n")
    for name in ("sheet.xyz", "sheet", "year/../sheet.svg"):
        code, _, err = command("search", out, "a boat", *words, "--out", tmp_path / name)
        assert code == 2
        assert "its name must end in one of .jpg" in err


def test_places_are_checked_before_the_work(command, photographs, packs, tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.models.pretrained.load", pytest.fail)
    (tmp_path / "file").write_text("x")
    for name, source in (("index", photographs), ("embed", packs / "heldout")):
        code, _, err = command(name, source, tmp_path / "file" / "out")
        assert (code, err) == (2, f"clipkit: cannot write into {tmp_path / 'file' / 'out'}: Not a directory\n")


def test_names_that_are_not_utf8(clip, chain, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (b"caf\xe9.png", b"ok.png"):
        with open(os.fsencode(tmp_path / "photos") + b"/" + name, "wb") as file:
            Image.new("RGB", (40, 30), "blue").save(file, "PNG")
    update(clip, chain, tmp_path / "photos", tmp_path / "index")
    found = index.Index(tmp_path / "index")
    assert found.keys == ["caf\udce9.png", "ok.png"]
    hits = found.search(index.embed_query(found, "a boat", device="cpu"))[0]
    assert all(isinstance(image, bytes) for image, _ in index.show(found, hits))
    contact_sheet(index.show(found, hits)).save(tmp_path / "sheet.png")
    assert update(clip, chain, tmp_path / "photos", tmp_path / "index").pictures == 2


def test_what_makes_no_sense_is_one_line(clip, chain, photographs, packs, tmp_path):
    found = built(clip, chain, photographs, tmp_path / "index", part_size=4)
    with pytest.raises(UsageError, match=r"holds features of .* \(weights \w+\), not of clipkit-tiny \(\w+\)"):
        built(clipkit.load("clipkit-tiny", "cpu"), "clipkit-tiny", photographs, tmp_path / "index", part_size=4)
    with pytest.raises(UsageError, match="holds another index: source is"):
        built(clip, chain, packs / "heldout", tmp_path / "index", part_size=4)
    with pytest.raises(UsageError, match="has no captions to embed"):
        built(clip, chain, photographs, tmp_path / "texts", texts=True)
    with pytest.raises(UsageError, match="the query is empty"):
        index.embed_query(found, " ")
    with pytest.raises(UsageError, match=r"queries are \[1, 3\]; this index needs"):
        found.search(torch.ones(1, 3))
    with pytest.raises(CheckpointError, match=r"is not an embedding index; `clipkit index IMAGES .*` makes one"):
        index.Index(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        index.open_gallery(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="is the folder of the pictures; give another"):
        built(clip, chain, photographs, photographs / ".")
    with pytest.raises(
        CheckpointError, match=r"is a pack, not an embedding index; `clipkit index .*heldout OUT` embeds it"
    ):
        index.Index(packs / "heldout")
    with pytest.raises(UsageError, match="is a pack; give another folder for the index"):
        built(clip, chain, photographs, packs / "heldout")
    (tmp_path / "index" / "part-00001.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(CheckpointError, match=r"part-00001\.npy is damaged"):
        index.Index(tmp_path / "index")
    (tmp_path / "index" / "part-00001.json").write_text('{"keys": 7}')
    with pytest.raises(CheckpointError, match=r"part-00001\.json is damaged: KeyError 'rows'"):
        index.Index(tmp_path / "index")


def test_an_index_of_other_weights_is_refused(clip, chain, photographs, tmp_path):
    found = built(clip, chain, photographs, tmp_path / "index")
    about = json.loads((tmp_path / "index" / "embeddings.json").read_text())
    (tmp_path / "index" / "embeddings.json").write_text(json.dumps({**about, "weights": "0" * 16}))
    with pytest.raises(CheckpointError, match="was made with other weights than those of"):
        index.embed_query(index.Index(found.folder), "a boat", device="cpu")
