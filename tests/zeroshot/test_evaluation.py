"""What ends one data set, and what is wrong with some of its images, costs no scores of others."""

import json

import pytest
from PIL import Image

from clipkit.cli import cli
from clipkit.zeroshot.datasets import open_set
from clipkit.zeroshot.evaluation import Prompts, evaluate_all, table
from clipkit.zeroshot.report import write_report

SWATCHES = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def put(folder, count=2, names=SWATCHES):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (24, 24), SWATCHES[name.split(" ")[0]]).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def spoilt(tmp_path):
    """Six images of three classes, of which one cannot be read, and a GIF."""
    folder = put(tmp_path / "spoilt")
    (folder / "red" / "0.png").write_bytes(b"hello")
    (folder / "red" / "1.gif").write_bytes(b"GIF89a")
    return folder


def test_one_bad_picture_is_in_every_form_of_the_result(spoilt, chain, tmp_path):
    images = open_set(f"folder:{spoilt}", tmp_path)
    (result,) = evaluate_all([str(chain)], [images], Prompts(), "cpu")
    assert result.as_dict()["n"] == 5
    assert result.as_dict()["skipped"] == {"other format": 1, "not an image": 1}
    assert table([result]).splitlines()[-1] == f"skipped of folder:{spoilt}: 1 other format, 1 not an image"
    page = write_report([result], tmp_path / "report").read_text()
    assert "5 images, 3 classes" in page
    assert "skipped: 1 other format, 1 not an image" in page


def test_examples_of_the_report_are_those_that_were_wrong(spoilt, chain, tmp_path):
    """Rows behind a bad image are shown as themselves."""
    (result,) = evaluate_all([str(chain)], [open_set(f"folder:{spoilt}", tmp_path)], Prompts(), "cpu")
    for i, row in enumerate(result.predictions.targets.int().argmax(1).tolist()):
        image, (label,) = result.images[i]
        assert label == row
        assert image.getpixel((3, 3)) == SWATCHES[["blue", "green", "red"][label]]


@pytest.mark.parametrize("as_json", [True, False])
def test_scores_before_a_failure_are_printed(spoilt, chain, tmp_path, command, as_json):
    hollow = put(tmp_path / "hollow", 1)
    for path in hollow.rglob("*.png"):
        path.write_bytes(b"hello")
    sets = ["--dataset", f"folder:{spoilt}", "--dataset", f"folder:{hollow}"]
    code, out, err = command("zeroshot", "--model", chain, *sets, *["--json"] * as_json)
    assert code == 1
    assert err == f"clipkit: none of the 3 images of folder:{hollow} can be read: 3 not an image\n"
    if as_json:
        assert [result["n"] for result in json.loads(out)] == [5]  # a list, as for all of them
    else:
        assert out.splitlines()[1].split()[2] == "5"


def test_a_list_of_names_in_another_order(chain, tmp_path, command):
    folder, names = put(tmp_path / "set"), tmp_path / "names.txt"
    words = ["zeroshot", "--model", chain, "--dataset", f"folder:{folder}", "--json"]
    expected = json.loads(command(*words)[1])
    names.write_text("red\ngreen\nblue\n")
    code, out, err = command(*words, "--classnames", names)
    assert (code, json.loads(out)) == (0, expected)
    assert err == f"clipkit: {names}: put into the order of the classes, by their names\n"
    names.write_text("rouge\nvert\nbleu\n")
    code, out, err = command(*words, "--classnames", names)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "in which order it names the 3 classes cannot be known" in err


def test_each_data_set_gets_the_names_in_its_own_order(chain, tmp_path, command):
    one, other = put(tmp_path / "one"), tmp_path / "other.csv"
    other.write_text("image,label\n" + "".join(f"one/{n}/0.png,{n}\n" for n in SWATCHES))
    (tmp_path / "n.json").write_text(json.dumps({n: [n, "thing"] for n in SWATCHES}))
    sets = ["--dataset", f"folder:{one}", "--dataset", f"csv:{other}"]
    code, out, _ = command("zeroshot", "--model", chain, *sets, "--classnames", tmp_path / "n.json", "--json")
    assert (code, [r["n"] for r in json.loads(out)]) == (0, [6, 3])


def test_class_folders_that_only_the_names_can_tell(chain, tmp_path, command):
    folder = tmp_path / "nested"
    put(folder / "warm", 1, ["red"])
    put(folder / "cold", 1, ["green", "blue"])
    words = ["zeroshot", "--model", chain, "--dataset", f"folder:{folder}", "--json"]
    code, _, err = command(*words)
    assert (code, "the class may be 'cold' or 'blue'" in err) == (1, True)
    (tmp_path / "n.json").write_text(json.dumps({n: n for n in SWATCHES}))
    code, out, _ = command(*words, "--classnames", tmp_path / "n.json")
    assert (code, json.loads(out)["n"]) == (0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--download"], "--download has no effect on data sets that are given by their place"),
        (["--data-dir", "data"], "--data-dir has no effect"),
        (["--report", "set/red/0.png/report"], "cannot write into set/red/0.png/report"),
        (["--descriptions", "d.json"], "d.json, 'red': found null"),
    ],
)
def test_what_is_refused_before_anything_is_read(words, message, chain, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "set")
    (tmp_path / "d.json").write_text('{"red": null}')
    code, out, err = command("zeroshot", "--model", chain, "--dataset", "folder:set", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_probe_counts_what_it_cannot_read(chain, tmp_path, capsys):
    train, test = put(tmp_path / "train", 4), put(tmp_path / "test", 2)
    (train / "red" / "0.png").write_bytes(b"hello")
    (test / "red" / "0.tif").write_bytes(b"II*\0")
    words = ["probe", "--model", str(chain), "--train", f"folder:{train}", "--test", f"folder:{test}"]
    cli.main([*words, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["train"], found["test"]) == (11, 6)
    assert (found["skipped_train"], found["skipped_test"]) == ({"not an image": 1}, {"other format": 1})
    cli.main(words, standalone_mode=False)
    assert f"skipped of folder:{train}: 1 not an image" in capsys.readouterr().out
