from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.data.classes import (
    are_consecutive,
    checked_templates,
    class_name,
    fill,
    fit_names,
    in_order,
    layout,
    named_layout,
)
from clipkit.errors import DataError, UsageError

SOURCE = Path("photos.tar")


def labelled(names, known=()):
    """{name: class} as the layout has it, the classes in their order."""
    found = layout(SOURCE, names, known)
    classes = list(found.classes)
    return {name: classes[found.label_of(name)] for name in names}, classes


def test_the_class_is_the_folder():
    names = ["red/0.jpg", "blue/1.jpg", "red/1.jpg"]
    assert labelled(names) == ({n: n.split("/")[0] for n in names}, ["blue", "red"])


def test_numbers_are_in_the_order_of_numbers():
    assert labelled([f"{i}/0.jpg" for i in range(12)])[1] == [str(i) for i in range(12)]
    assert in_order(["10", "9", "a"]) == ["10", "9", "a"]


@pytest.mark.parametrize("above", ["", "photos/", "data/photos/"])
@pytest.mark.parametrize(
    "names",
    [
        ["red/2019/0.jpg", "red/2020/0.jpg", "blue/2019/0.jpg"],
        ["red/0.jpg", "red/more/1.jpg", "blue/0.jpg"],  # some lie directly in the class's folder
        ["red/day/0.jpg", "red/night/0.jpg", "blue/day/0.jpg", "blue/night/0.jpg"],
        ["n01/images/0.jpg", "n02/images/0.jpg"],  # Tiny ImageNet as it is published
        ["red/a/b/c/0.jpg", "blue/a/0.jpg"],
    ],
)
def test_deeper_folders_belong_to_the_class_as_in_torchvision(names, above, capsys):
    found, classes = labelled([above + name for name in names])
    assert found == {above + name: name.split("/")[0] for name in names}
    assert classes == in_order(name.split("/")[0] for name in names)
    lines = capsys.readouterr().err.splitlines()
    assert "have the class of the first" in lines[-1]
    assert len(lines) == (2 if above else 1)  # what holds all others is passed over, and said


@pytest.mark.parametrize("above", ["", "data/"])
@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "VAL"), ("train2017", "val2017"), ("training", "dev")])
@pytest.mark.parametrize("inside", ["{}/red/0.jpg", "{}/0.jpg", "red/{}/0.jpg"])
def test_several_splits_are_no_data_set(splits, inside, above):
    with pytest.raises(DataError, match=r"holds several splits \(.*\)"):
        layout(SOURCE, [above + inside.format(split) for split in splits])


def test_the_splits_of_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=rf"give one of them, such as {tmp_path}/x/test"):
        layout(tmp_path, ["x/test/red/0.jpg", "x/train/red/0.jpg"])


@pytest.mark.parametrize(
    "names",
    [
        ["train/red/0.jpg", "train/blue/0.jpg"],  # one split alone
        ["train/0.jpg", "test/0.jpg", "bus/0.jpg"],  # a vehicle
        ["red/train.jpg", "blue/test.jpg"],
        ["testimony/0.jpg", "training shoes/0.jpg"],
        ["train station/a/0.jpg", "test tube/b/0.jpg"],
        ["steam train/day/0.jpg", "steam train/night/0.jpg", "bus/day/0.jpg", "bus/night/0.jpg"],
    ],
)
def test_what_only_looks_like_splits(names):
    assert len(labelled(names)[1]) in (2, 3)


def test_splits_that_are_classes_can_be_said_to_be():
    assert labelled(["train/0.jpg", "test/0.jpg"], known=["train", "test"])[1] == ["test", "train"]
    assert list(named_layout(SOURCE, ["train/0.jpg", "test/0.jpg"], ["train", "test"]).classes) == ["train", "test"]
    with pytest.raises(DataError, match="several splits"):
        named_layout(SOURCE, ["train/red/0.jpg", "test/red/0.jpg", "0.jpg"], ["red"])


NESTED = ["animals/cat/0.jpg", "animals/dog/0.jpg", "vehicles/bus/0.jpg"]


def test_an_outer_and_an_inner_folder_that_may_both_be_the_class():
    with pytest.raises(
        DataError, match="the class may be 'animals' or 'cat'; name the class folders in a table of class names"
    ):
        layout(SOURCE, NESTED)
    for known in (["cat", "dog", "bus"], ["animals", "vehicles"]):
        found, classes = labelled(NESTED, known)
        assert classes == sorted(known)
        assert all(c in name.split("/") for name, c in found.items())


def test_pictures_in_no_class_folder():
    with pytest.raises(DataError, match=r"no <class>/<image> layout: cover\.jpg is in no class folder"):
        layout(SOURCE, ["red/0.jpg", "cover.jpg"])
    found = named_layout(SOURCE, ["red/0.jpg", "cover.jpg", "old/red/more/1.jpg"], ["blue", "red"])
    assert [found.label_of(n) for n in ("red/0.jpg", "cover.jpg", "old/red/more/1.jpg")] == [1, None, 1]


def test_folders_without_pictures_are_named():
    found = layout(SOURCE, ["x/red/0.jpg", "x/blue/0.jpg"])
    assert found.barren(["x/gifs/0.gif", "x/red/1.gif", "x/logo.gif", "y.gif"]) == ["gifs"]


def test_names_of_classes():
    assert class_name(" red_cup/big ") == "red cup big"
    assert class_name("caf\udce9") == "caf?"
    assert are_consecutive(["0", "1", "2"])
    assert are_consecutive(["1", "2"])
    assert not are_consecutive(["0", "2"])
    assert not are_consecutive(["0", "a"])


KEYS, CALLED = ["red_cup", "blue", "green"], ["red cup", "blue", "green"]


@pytest.mark.parametrize(
    ("given", "ordered", "expected"),
    [
        (["red cup", "blue", "green"], False, [0, 1, 2]),
        (["green", "Red_Cup", "blue"], False, [1, 2, 0]),
        (["green", "mug", "blue"], False, [1, 2, 0]),  # what is left is of the one that is left
        (["green", "red cup", "blue"], True, [1, 2, 0]),
        (["rouge", "bleu", "vert"], True, [0, 1, 2]),
        (["green", "bleu", "rouge"], True, [0, 1, 2]),
    ],
)
def test_a_list_of_names_is_put_in_order(given, ordered, expected):
    assert fit_names([[n] for n in given], KEYS, CALLED, ordered, "list") == [[given[i]] for i in expected]


def test_any_of_several_names_will_do():
    given = [["verdant", "green"], ["cup", "red cup"], ["blue"]]
    assert fit_names(given, KEYS, CALLED, False, "list") == [given[1], given[2], given[0]]


@pytest.mark.parametrize("given", [["rouge", "bleu", "vert"], ["blue", "rouge", "vert"], ["blue", "blue", "vert"]])
def test_an_order_that_cannot_be_known_is_refused(given):
    with pytest.raises(UsageError, match=r"list: in which order .* write a JSON object instead, \{'red_cup': its name"):
        fit_names([[n] for n in given], KEYS, CALLED, False, "list")


def test_an_object_of_names():
    spellings = {"red_cup": ["mug"], "blue": ["bleu"], "green": ["vert"], "other": ["x"]}
    assert fit_names(spellings, KEYS, CALLED, False, "o") == [["mug"], ["bleu"], ["vert"]]
    spellings["red cup"] = spellings.pop("red_cup")
    assert fit_names(spellings, KEYS, CALLED, False, "o") == [["mug"], ["bleu"], ["vert"]]
    del spellings["blue"]
    with pytest.raises(UsageError, match=r"o has no names for class 'blue' \(1 missing\)"):
        fit_names(spellings, KEYS, CALLED, False, "o")
    with pytest.raises(UsageError, match="o lists 2 classes; the data set has 3"):
        fit_names([["a"], ["b"]], KEYS, CALLED, True, "o")


@given(st.lists(st.text("abcde_", min_size=1).map(class_name).filter(bool), min_size=1, unique=True), st.randoms())
def test_any_order_of_the_names_gives_the_classes_back(names, random):
    given = [[name] for name in names]
    random.shuffle(given)
    assert fit_names(given, names, names, False, "list") == [[name] for name in names]


def test_templates():
    assert checked_templates(["a {}.", "a photo of a {c}."]) == ["a {}.", "a photo of a {}."]
    assert fill("a {}.", "{} {0} {name}") == "a {} {0} {name}."
    for bad in (
        "a photo",
        "{} and {}",
        "a {} {looks nice}",
        "a {0}",
        "{name}",
        "{{}}",
        "a {} }",
        "{c} {}",
        "{!r}",
        "{",
    ):
        with pytest.raises(UsageError, match=r"lines\.txt: template .* must hold exactly one"):
            checked_templates(["a {}", bad], "lines.txt")


@given(st.text("{}c !0a"), st.text("{}c !0a"))
def test_no_text_raises_anything_else(template, name):
    try:
        (checked,) = checked_templates([template])
    except UsageError:
        return
    before, after = checked.split("{}")
    assert fill(checked, name) == before + name + after


@pytest.mark.parametrize(
    "splits",
    [
        ("training_set", "test_set"),
        ("seg_train", "seg_test", "seg_pred"),
        ("train_images", "val_images"),
        ("Train1", "Test1"),
        ("train_images", "test_pics"),
        ("training-set", "Validation", "old test"),
    ],
)
def test_splits_by_a_word_within_their_names_are_no_classes(splits):
    names = [f"{split}/{c}/{i}.jpg" for split in splits for c in ("cats", "dogs") for i in range(2)]
    with pytest.raises(DataError, match="holds several splits"):
        layout(SOURCE, names)


@pytest.mark.parametrize("dates", [("2019", "2020"), ("2019-05", "2019-12-31"), ("20190531", "2020_01")])
def test_dates_within_the_only_class_are_no_classes(dates):
    assert labelled([f"cats/{date}/0.jpg" for date in dates])[1] == ["cats"]


def test_other_numbers_within_the_only_folder_are_classes():
    assert labelled(["digits/0/0.jpg", "digits/1/1.jpg"])[1] == ["0", "1"]
    assert labelled(["people/20191331/0.jpg", "people/201901/1.jpg"])[1] == ["201901", "20191331"]
