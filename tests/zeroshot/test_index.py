import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import on_ranks

import clipkit
from clipkit.cli import cli
from clipkit.errors import CheckpointError, DataError, UsageError
from clipkit.zeroshot import index


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
    with pytest.raises(CheckpointError, match="is not whole: part 1 is missing; run the same command again"):
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
    (folder / "index.json").write_text(json.dumps(about))
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


def test_a_folder_that_changed_is_not_taken_for_what_it_was(clip, chain, photographs, tmp_path):
    built(clip, chain, photographs, tmp_path / "index", part_size=4)
    Image.new("RGB", (9, 9), "red").save(photographs / "year0" / "02.png")  # as many files, under the same names
    with pytest.raises(UsageError, match="holds another index: pictures is"):
        built(clip, chain, photographs, tmp_path / "index", part_size=4)


def test_what_makes_no_sense_is_one_line(clip, chain, photographs, packs, tmp_path):
    found = built(clip, chain, photographs, tmp_path / "index", part_size=4)
    with pytest.raises(UsageError, match="holds another index: source is"):
        built(clip, chain, packs / "heldout", tmp_path / "index", part_size=4)
    with pytest.raises(UsageError, match="has no captions to embed"):
        built(clip, chain, photographs, tmp_path / "texts", texts=True)
    with pytest.raises(UsageError, match="the query is empty"):
        index.embed_query(found, " ")
    with pytest.raises(UsageError, match=r"queries are \[1, 3\]; this index needs"):
        found.search(torch.ones(1, 3))
    with pytest.raises(CheckpointError, match="is not an index"):
        index.Index(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        index.open_gallery(str(tmp_path / "empty"))
    (tmp_path / "index" / "part-00001.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(CheckpointError, match=r"part-00001\.npy is damaged"):
        index.Index(tmp_path / "index")


def test_an_index_of_other_weights_is_refused(clip, chain, photographs, tmp_path):
    found = built(clip, chain, photographs, tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**about, "weights": "0" * 16}))
    with pytest.raises(CheckpointError, match="was made with other weights than those of"):
        index.embed_query(index.Index(found.folder), "a boat", device="cpu")
