import errno

import pytest
import torch
import torch.nn.functional as F

import clipkit
from clipkit.errors import UsageError
from clipkit.zeroshot import heads


@pytest.fixture(scope="module")
def clip(chain):
    return clipkit.load(chain / "clip", "cpu")


def test_the_head_is_the_normalised_mean_of_normalised_prompts(clip):
    templates, names = ["a {}.", "one {}"], ["red house", ["boat", "ship"]]
    head = heads.class_head(clip.model, clip.tokenizer, names, templates)
    with torch.no_grad():
        for row, group in zip(head, [["red house"], ["boat", "ship"]], strict=True):
            each = [clip.model.encode_text(clip.tokenizer(t.format(n)))[0] for n in group for t in templates]
            torch.testing.assert_close(row, F.normalize(torch.stack(each).mean(0), dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["a {}"], "needs classes and templates"),
        (["cat"], [], "needs classes and templates"),
        (["cat", " "], ["a {}"], "class name is empty"),
        ([[]], ["a {}"], "class name is empty"),
        (["cat"], ["a cat"], "must hold exactly one"),
    ],
)
def test_heads_that_make_no_sense(clip, names, templates, message):
    with pytest.raises(UsageError, match=message):
        heads.class_head(clip.model, clip.tokenizer, names, templates)


def test_descriptions_are_further_prompts(clip):
    names, sentences = ["boat", "house"], {"boat": ["it floats", "it has a sail"]}
    head = heads.class_head(clip.model, clip.tokenizer, names, ["a {}."], sentences)
    each = heads.embed_texts(clip.model, clip.tokenizer, ["a boat.", *sentences["boat"]])
    torch.testing.assert_close(head[0], F.normalize(each.mean(0), dim=0))
    with pytest.raises(UsageError, match="descriptions of 'bat', not one of the 2 classes"):
        heads.class_head(clip.model, clip.tokenizer, names, ["a {}."], {"bat": ["it flies"]})


def test_each_distinct_prompt_is_encoded_once(clip, monkeypatch):
    seen = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda ids: seen.append(len(ids)) or encode(ids))
    heads.class_head(clip.model, clip.tokenizer, [["boat", "ship"], ["ship"], ["boat"]], ["a {}.", "one {}"])
    assert sum(seen) == 4


def test_a_cached_head_is_not_computed_again(clip, tmp_path, monkeypatch):
    words = (clip.model, clip.tokenizer, ["boat", "house"])
    first = heads.class_head(*words, ["a {}."], cache=tmp_path / "heads")

    def never(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patched:
        patched.setattr(heads, "embed_texts", never)
        assert heads.class_head(*words, ["a {}."], cache=tmp_path / "heads").equal(first)
        with pytest.raises(AssertionError, match="encoded again"):  # other prompts
            heads.class_head(*words, ["one {}"], cache=tmp_path / "heads")
        with torch.no_grad():
            clip.model.text.positions += 1e-3
        try:
            with pytest.raises(AssertionError, match="encoded again"):  # other weights
                heads.class_head(*words, ["a {}."], cache=tmp_path / "heads")
        finally:
            with torch.no_grad():
                clip.model.text.positions -= 1e-3


def test_a_cut_cache_file_is_computed_anew(clip, tmp_path):
    words = (clip.model, clip.tokenizer, ["boat", "house"], ["a {}."], None, tmp_path)
    first = heads.class_head(*words)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    torch.testing.assert_close(heads.class_head(*words), first)


def test_a_cache_that_cannot_be_written_is_said_once_and_no_error(clip, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for name in ("boat", "ship", "raft"):
        heads.class_head(clip.model, clip.tokenizer, [name], ["a {}."], cache=tmp_path / "file")
    said = f"clipkit: cannot write the cache {tmp_path / 'file'}: File exists; nothing is cached"
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_full_disk_leaves_nothing_in_the_cache(clip, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("clipkit.io.os.replace", full)
    heads.class_head(clip.model, clip.tokenizer, ["boat"], ["a {}."], cache=tmp_path)
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ensembles():
    found = heads.ensembles()
    assert {name: len(templates) for name, templates in found.items()} == {"one": 1, "7": 7, "80": 80}
    assert all(template.count("{}") == 1 for templates in found.values() for template in templates)
    assert set(found["7"]) <= set(found["80"])
