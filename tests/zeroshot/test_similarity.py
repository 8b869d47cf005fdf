import dataclasses
import json

import pytest
import torch
from PIL import Image

import clipkit
from clipkit.cli import cli
from clipkit.errors import DataError, UsageError
from clipkit.models.words import words_of
from clipkit.zeroshot import similarity


@pytest.fixture(scope="module")
def clip(chain):
    return clipkit.load(chain / "clip", "cpu")


@pytest.fixture
def photographs(tmp_path):
    """Pictures that come with scikit-image, as files."""
    data = pytest.importorskip("skimage.data")
    found = {"cat": data.cat(), "astronaut": data.astronaut(), "coffee": data.coffee(), "page": data.page()}
    for name, pixels in found.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in found]


def test_similarities_are_cosines(clip, photographs):
    images = similarity.read_images(photographs)
    found = similarity.similarities(clip, images, ["a cat", "a cup"])
    assert found.shape == (2, 4)
    with torch.no_grad():
        image = clip.model.encode_image(clip.preprocess(images[2])[None])[0]
        text = clip.model.encode_text(clip.tokenizer("a cup"))[0]
    assert float(found[1, 2]) == pytest.approx(float(image @ text), abs=1e-6)


def test_probabilities_are_those_of_the_logit_scale(clip, photographs):
    images, labels = similarity.read_images(photographs), ["cat", "cup", "rocket", "house", "tree", "fish"]
    guesses = similarity.classify(clip, images, labels, ["a {}"])
    cosines = similarity.similarities(clip, images, [f"a {name}" for name in labels])
    expected = (clip.model.logit_scale.detach() * cosines).softmax(0)
    for i, guess in enumerate(guesses):
        assert len(guess) == 5
        assert [g.probability for g in guess] == sorted((g.probability for g in guess), reverse=True)
        for g in guess:
            assert g.probability == pytest.approx(float(expected[labels.index(g.label), i]), abs=1e-5)


def test_figures_are_drawn(clip, photographs, tmp_path):
    pytest.importorskip("matplotlib")
    images = similarity.read_images(photographs)
    texts = ["a page of text", "a cat", "a cup of coffee on a table, seen from above, with a spoon"]
    figure = similarity.similarity_figure(images, texts, similarity.similarities(clip, images, texts))
    figure.savefig(tmp_path / "matrix.png")
    figure = similarity.classify_figure(images, similarity.classify(clip, images, ["cat", "cup"]))
    figure.savefig(tmp_path / "bars.png")
    for name in ("matrix.png", "bars.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_the_commands(chain, photographs, tmp_path, capsys):
    cli.main(["similarity", *photographs, "--text", "a cat", "--model", str(chain), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (len(found["cosines"]), len(found["cosines"][0])) == (1, 4)
    words = ["classify", photographs[0], "--labels", "cat, cup", "--model", str(chain)]
    cli.main([*words, "--out", str(tmp_path / "a" / "figure.png")], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"{photographs[0]}: c")
    assert (tmp_path / "a" / "figure.png").is_file()


@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures of the same name in two folders, and files that are none."""
    for name in ("a/one.png", "b/one.png", "b/two.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), "red" if name == "a/one.png" else "blue").save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "b" / "bad.jpg").write_text("hello")
    return tmp_path / "photos"


def test_folders_are_classified_and_compared(command, chain, packs, pictures):
    words = ["--labels", "cat, cup", "--model", chain, "--json"]
    code, out, err = command("classify", pictures, pictures / "a" / "one.png", packs / "heldout", *words)
    found = json.loads(out)
    assert code == 0
    assert err == f"clipkit: skipped {pictures}/b/bad.jpg (not an image)\n"
    assert [name for name in found if name.startswith(str(pictures))] == [
        f"{pictures}/{name}" for name in ("a/one.png", "b/one.png", "b/two.png")
    ]  # the same file, given twice, counts once
    assert len(found) == 3 + 64
    assert all(sum(guess.values()) == pytest.approx(1, abs=1e-5) for guess in found.values())
    assert found[f"{pictures}/a/one.png"] != found[f"{pictures}/b/one.png"]
    code, out, _ = command("similarity", pictures, "--text", "a cat", "--text", "a cup", "--model", chain, "--json")
    assert (code, len(json.loads(out)["images"])) == (0, 3)
    assert [len(row) for row in json.loads(out)["cosines"]] == [3, 3]


def test_a_folder_gives_what_its_files_give(command, clip, chain, pictures):
    (pictures / "b" / "bad.jpg").unlink()
    names = sorted(str(p) for p in pictures.rglob("*.png"))
    words = ["--labels", "cat,cup,boat", "--model", chain, "--json"]
    assert json.loads(command("classify", pictures, *words)[1]) == json.loads(command("classify", *names, *words)[1])
    guesses = similarity.classify(clip, similarity.read_images(names), ["cat", "cup", "boat"])
    first = json.loads(command("classify", pictures, *words)[1])[names[0]]
    assert first == pytest.approx({g.label: g.probability for g in guesses[0]}, abs=1e-5)


@pytest.mark.parametrize("name", ["classify", "similarity"])
def test_pictures_that_cannot_be_read_are_all_named(command, chain, pictures, name):
    rest = ["--model", chain, *(["--labels", "cat,cup"] if name == "classify" else ["--text", "a cat"])]
    (pictures / "cut.png").write_bytes((pictures / "b" / "two.png").read_bytes()[:60])
    good, bad, cut = (pictures / each for each in ("a/one.png", "b/bad.jpg", "cut.png"))
    code, out, err = command(name, good, bad, cut, *rest)
    assert (code, out) == (1, "")
    assert err == f"clipkit: cannot read {bad} (not an image), {cut} (damaged image)\n"
    code, out, err = command(name, good, "no.png", "nor.png", *rest)
    assert (code, out, err) == (1, "", "clipkit: no picture at no.png, nor.png\n")
    (pictures / "none").mkdir()
    code, out, err = command(name, pictures / "none", *rest)
    assert (code, out) == (1, "")
    assert "none holds no images" in err
    (pictures / "none" / "a.jpg").write_text("hello")
    code, out, err = command(name, pictures / "none", *rest)
    assert (code, out, err) == (1, "", "clipkit: no picture can be read; skipped: 1 not an image\n")


def test_labels_are_text_or_a_file(command, chain, pictures, tmp_path):
    words = ["classify", pictures / "a" / "one.png", "--model", chain, "--json", "--labels"]
    many = ",".join(f"a thing with number {i}" for i in range(20))
    code, out, _ = command(*words, many)
    assert (code, len(json.loads(out)[str(pictures / "a/one.png")])) == (0, 5)
    (tmp_path / "labels.json").write_text('["cat", "a cup, half full"]')
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\na cup, half full\r\n")
    for name in ("labels.json", "labels.txt"):
        code, out, _ = command(*words, tmp_path / name)
        assert set(json.loads(out)[str(pictures / "a/one.png")]) == {"cat", "a cup, half full"}
    for labels, message in (
        ("cat", "'cat' alone, whose probability is always 100 %"),
        ("cat,dog,Cat", "has 'Cat' twice"),
        ("cat,,dog", "entry 2 of 3 is empty"),
        (tmp_path / "label.txt", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        code, out, err = command(*words, labels)
        assert (code, out) == (2, "")
        assert message in err


def test_texts_are_read_from_a_file(command, chain, pictures, tmp_path):
    (tmp_path / "texts.txt").write_text("a cat, sitting\na cup\n")
    words = ["similarity", pictures / "a" / "one.png", "--model", chain, "--json", "--text", "a boat", "--text"]
    assert json.loads(command(*words, tmp_path / "texts.txt")[1])["texts"] == ["a boat", "a cat, sitting", "a cup"]
    code, _, err = command(*words, "text.txt")
    assert (code, "--text text.txt does not exist" in err) == (2, True)


def test_figures_are_refused_before_the_work(command, pictures, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("clipkit.models.pretrained.load", pytest.fail)
    (tmp_path / "file").write_text("x")
    for out, message in (
        ("x.xyz", "its name must end in one of .pdf, .png, .svg"),
        ("figure", "its name must end in one of"),
        ("file/a.png", "Not a directory"),
    ):
        for words in (["classify", pictures, "--labels", "cat,cup"], ["similarity", pictures, "--text", "a cat"]):
            code, _, err = command(*words, "--out", tmp_path / out)
            assert code == 2
            assert message in err
    monkeypatch.setattr(similarity, "MOST_SHOWN", 3)
    code, _, err = command("classify", pictures, "--labels", "cat,cup", "--out", tmp_path / "x.png")
    assert (code, err) == (2, "clipkit: --out shows at most 3 pictures and texts; 4 are given\n")


def test_words_that_no_caption_had_are_named(command, clip, chain, packs, pictures):
    known = words_of([clipkit.Shards(packs / "train")])
    assert list(clip.words) == known
    texts = ["The red rocket!", "a photo of a zebra_crossing", "кот", "🚀 7 zebras", "7"]
    assert similarity.unknown_words(clip, texts) == ["zebra", "crossing", "кот", "🚀", "zebras"]
    words = ["classify", pictures / "a" / "one.png", "--model", chain]
    _, _, err = command(*words, "--labels", "red rocket,🦓", "--templates", "80")
    assert err == "clipkit: no caption that this model learned from had '🦓'; it guesses those words\n"
    assert command(*words, "--labels", "red rocket,blue fish")[2] == ""


def test_of_published_weights_nothing_is_said(clip):
    assert similarity.unknown_words(dataclasses.replace(clip, words=()), ["🚀 кот zebra"]) == []


def test_the_model_that_ships_names_what_it_cannot_know():
    tiny = clipkit.load(device="cpu")
    assert similarity.unknown_words(tiny, ["a red rocket", "mushroom", "goldfish"]) == []
    assert similarity.unknown_words(tiny, ["🚀", "кот", "stethoscopes"]) == ["🚀", "кот", "stethoscopes"]


def test_what_makes_no_sense_is_one_line(clip, tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(DataError, match=r"x\.png: not an image"):
        similarity.read_images([tmp_path / "x.png"])
    with pytest.raises(DataError, match=r"cannot read .*none\.png: No such file"):
        similarity.read_images([tmp_path / "none.png"])
    with pytest.raises(UsageError, match="none of them empty"):
        similarity.similarities(clip, [Image.new("RGB", (8, 8))], [" "])
    with pytest.raises(UsageError, match="class name is empty"):
        similarity.classify(clip, [Image.new("RGB", (8, 8))], ["cat", ""])
