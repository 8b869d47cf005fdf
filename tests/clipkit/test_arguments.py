import json
import os
import threading

import pytest

from clipkit.commands.arguments import read_class_list, read_class_names, read_templates
from clipkit.errors import UsageError


def written(tmp_path, content, name="n.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


BAD = [None, 3, {}, {"a": 1}, [], [""], "", "  ", ["a", None], [["a"]], True]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_names_that_are_none_are_refused_with_their_key(tmp_path, bad):
    path = written(tmp_path, {"red": ["crimson"], "n02": bad})
    for read in (read_class_names, read_class_list):
        with pytest.raises(UsageError, match=r"n\.json, 'n02': found .*; it needs a text") as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"n\.json, entry 2: found"):
        read_class_list(written(tmp_path, ["crimson", bad]))


@pytest.mark.parametrize("content", ["null", "3", '"a"', "{}", "{", "", "[" * 100_000])
def test_what_is_no_object(tmp_path, content):
    for read in (read_class_names, read_class_list):
        with pytest.raises(UsageError) as error:
            read(written(tmp_path, content))
        assert "\n" not in str(error.value)


def test_names(tmp_path):
    expected = {"a": ["cat"], "b": ["dog", "hound"]}
    path = written(tmp_path, {"a": " cat ", "b": ["dog", "hound"]})
    assert read_class_names(path) == read_class_list(path) == expected
    assert read_class_list(written(tmp_path, ["cat", ["dog", "hound"]])) == list(expected.values())
    assert read_class_list(written(tmp_path, "cat\r\n\r\n  dog\r\n", "n.txt")) == [["cat"], ["dog"]]
    (tmp_path / "bom.txt").write_bytes("café\n".encode("utf-16"))
    assert read_class_list(tmp_path / "bom.txt") == [["café"]]


def piped(tmp_path, content):
    pipe = tmp_path / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=(content,)).start()
    return pipe


def test_pipes(tmp_path):
    assert read_class_list(piped(tmp_path, '["cat", "dog"]')) == [["cat"], ["dog"]]
    assert read_class_list(piped(tmp_path, "cat\ndog\n")) == [["cat"], ["dog"]]
    assert read_class_names(piped(tmp_path, '{"a": "cat"}')) == {"a": ["cat"]}
    assert read_templates(str(piped(tmp_path, "a {c}\n")), {}) == ["a {}"]


def test_templates(tmp_path):
    sets = {"one": ["a {}"]}
    assert read_templates("one", sets) == ["a {}"]
    assert read_templates(str(written(tmp_path, "a {c}.\nthe {}\n", "t.txt")), sets) == ["a {}.", "the {}"]
    with pytest.raises(UsageError, match=r"t\.txt: template 'a {} of {}' must hold exactly one"):
        read_templates(str(written(tmp_path, "a {}\na {} of {}\n", "t.txt")), sets)
    with pytest.raises(UsageError, match="is neither a file nor one of one"):
        read_templates("a photo of a {} " * 20, sets)
    with pytest.raises(UsageError, match=r"none\.txt does not exist"):
        read_templates("none.txt", sets)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UsageError, match=f"cannot read {path}: "):
            read_class_list(path)
    (tmp_path / "x").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="is not text in UTF-8"):
        read_class_list(tmp_path / "x")
