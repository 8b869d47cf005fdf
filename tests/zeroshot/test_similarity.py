import json

import pytest
import torch
from PIL import Image

import clipkit
from clipkit.cli import cli
from clipkit.errors import DataError, UsageError
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
