import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import UsageError
from clipkit.inputs import (
    check_file,
    check_writable,
    file_of,
    items_of,
    print_json,
)

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=600)  # NUL and lone surrogates too


@given(ANY_TEXT)
def test_any_text_is_a_file_or_text_or_one_line(text):
    file, said = None, "x"
    try:
        file = file_of(text, "QUERY")
    except UsageError as error:
        said = str(error)
    assert file is None or file.exists()
    assert len(said.splitlines()) == 1
    assert len(said) < 200


@given(st.text("ab ,.:\x00\U0001f680é", min_size=1, max_size=400))
def test_what_does_not_look_like_a_path_is_text(text):
    assert file_of(f"a{text}b", "QUERY") is None


@pytest.mark.parametrize("name", ["labels.txt", "photo.jpg", "/labels", "./labels", "../labels", "~/labels", "A.PNG"])
def test_what_looks_like_a_path_must_exist(name):
    with pytest.raises(UsageError, match=r"--labels .* does not exist; it looks like the path of a file"):
        file_of(name, "--labels")


def test_what_exists_is_a_file_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("cat,dog", "a red car", "names"):
        Path(name).write_text("x")
        assert file_of(name, "--labels") == Path(name)
    assert file_of("~/names", "--labels") == tmp_path / "names"  # zsh and bash leave it in --labels=~/names


def test_a_folder_is_text_as_a_word_and_refused_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cats/old").mkdir(parents=True)
    assert file_of("cats", "QUERY") is None
    for name in ("cats/", "./cats", "cats/old", str(tmp_path)):
        with pytest.raises(UsageError, match="is a folder; give a file, or text"):
            file_of(name, "QUERY")


def test_a_pipe_is_a_file():
    reading, writing = os.pipe()
    os.write(writing, b"cat\ndog\n")
    os.close(writing)
    try:
        assert items_of(f"/dev/fd/{reading}", "--labels", ",") == ["cat", "dog"]
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"cat\nred dog\n", ["cat", "red dog"]),
        (b"\xef\xbb\xbfcat\r\n\r\n  red   dog \r\n", ["cat", "red dog"]),
        (b'["cat", "red dog"]', ["cat", "red dog"]),
        (b'\xef\xbb\xbf [\n"cat"\n]', ["cat"]),
        (b"cat, dog\nfish", ["cat, dog", "fish"]),  # in a file a comma is a comma
        ("chat\u2028noir".encode(), ["chat", "noir"]),
    ],
)
def test_items_of_a_file(tmp_path, content, wanted):
    (tmp_path / "labels.txt").write_bytes(content)
    assert items_of(str(tmp_path / "labels.txt"), "--labels", ",") == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cat, red  dog", ["cat", "red dog"]),
        ("cat\nred, dog\n", ["cat", "red, dog"]),  # "$(cat labels.txt)"
        ('["cat", "red, dog"]', ["cat", "red, dog"]),
        (",".join(f"a thing with number {i}" for i in range(20)), [f"a thing with number {i}" for i in range(20)]),
    ],
)
def test_items_of_a_text(text, wanted):
    assert items_of(text, "--labels", ",") == wanted


def test_without_a_separator_a_text_is_one_item():
    assert items_of("a cat, sitting", "--text") == ["a cat, sitting"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give one entry a line"),
        (b"\n \n", "is empty; give one entry a line"),
        (b"[]", "is empty; give one entry a line"),
        (b'["cat", " "]', "entry 2 of 2 is empty"),
        (b'["cat", null]', "entry 2 of the JSON list is null, not text"),
        (b'[["cat"]]', r'entry 1 of the JSON list is \["cat"\], not text'),
        (b"[1]", "entry 1 of the JSON list is 1, not text"),
        (b"[cat]", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"cat\nCat\n", "has 'Cat' twice; keep one of each"),
        (b"\xffcat", "is not text in UTF-8"),
    ],
)
def test_lists_that_make_no_sense(tmp_path, content, message):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        items_of(str(tmp_path / "labels"), "--labels", ",")


def test_a_json_file_must_be_a_list(tmp_path):
    (tmp_path / "labels.json").write_text('{"n01": "cat"}')
    with pytest.raises(UsageError, match="must be a JSON list of texts; found a dict"):
        items_of(str(tmp_path / "labels.json"), "--labels", ",")


@pytest.mark.parametrize("text", ["", "cat,", ",", "cat,,dog", " "])
def test_empty_items_of_a_text(text):
    with pytest.raises(UsageError, match=r"entry \d of \d is empty"):
        items_of(text, "--labels", ",")


@given(st.lists(st.text('abc é\U0001f680,"', min_size=1).filter(lambda t: t.strip()), min_size=1))
def test_json_lists_are_read_as_they_are_written(tmp_path_factory, items):
    items = list({" ".join(item.split()).casefold(): " ".join(item.split()) for item in items}.values())
    assert items_of(json.dumps(items), "--labels", ",") == items


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "b.png", [".png"])
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    for place, reason in (("file", "Not a directory"), ("file/a", "Not a directory"), ("n" * 300, "too long")):
        with pytest.raises(UsageError, match=f"cannot write into .*{reason}"):
            check_writable(tmp_path / place)
    with pytest.raises(UsageError, match=r"cannot write into .*dangling/a: No such file"):
        check_writable(tmp_path / "dangling" / "a")
    with pytest.raises(UsageError, match="cannot write into "):
        check_writable(Path("/proc/clipkit/out"))
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "a.png").mkdir()
    for name, reason in (("a.png", "it is a folder"), ("a.xyz", r"must end in one of \.png, \.jpg"), ("a", "must end")):
        with pytest.raises(UsageError, match=f"cannot write .*{name}: .*{reason}"):
            check_file(tmp_path / name, [".png", ".jpg"])
    check_file(tmp_path / "A.PNG", [".png"])


def test_json_has_no_nan(capsys):
    print_json({"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf}, "d": "\udce9"})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"a": [None, [1.5, None]], "b": {"c": None}, "d": "\udce9"}


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.jsonl"])
def test_tables_are_no_lists(tmp_path, name):
    (tmp_path / name).write_text("name\ncat\ndog\n")
    with pytest.raises(UsageError, match="is a table; give a text file"):
        items_of(str(tmp_path / name), "--labels")


def test_an_object_is_no_list(tmp_path):
    (tmp_path / "labels").write_text('{"a": 1}')
    for argument in ('{"a": 1}, dog', str(tmp_path / "labels")):
        with pytest.raises(UsageError, match="looks like a JSON object"):
            items_of(argument, "--labels", separator=",")
