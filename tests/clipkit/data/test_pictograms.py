"""Pictograms: what becomes of a table and transparent images, what is held out, and main colours that are replaced."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clipkit.data.pack import pack
from clipkit.data.pictograms import BACKGROUNDS, COLOURS, pictograms_source, plain_name, recoloured
from clipkit.data.shards import Shards
from clipkit.data.sources import drawings_source
from clipkit.errors import DataError, UsageError

NAMES = [f"thing {i}" for i in range(40)]
STYLES = ("fluent", "noto", "twemoji")


def disc(colour, size=32):
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((4, 4, size - 5, size - 5), fill=colour)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictograms")
    lines = ["image,caption,tags,group,style"]
    for style in STYLES:
        (place / style).mkdir()
        for i, name in enumerate(NAMES):
            disc((222, 46, 66, 255)).save(place / style / f"{i}.webp", lossless=True)
            lines.append(f"{style}/{i}.webp,{name},round; small,objects,{style}")
    (place / "captions.csv").write_text("\n".join(lines))
    return place


def test_every_pictogram_gives_its_variants(folder):
    source = pictograms_source(folder, "train", 48, 3, seed=0)
    samples = list(source.samples)
    assert len(samples) == source.count()
    assert len(source.classes) == len(NAMES)
    assert {Image.open(io.BytesIO(s.image)).size for s in samples} == {(48, 48)}
    assert {source.classes[s.label][0] in s.captions[0] for s in samples} == {True}
    again = list(pictograms_source(folder, "train", 48, 3, seed=0).samples)
    assert again == samples
    assert list(pictograms_source(folder, "train", 48, 3, seed=1).samples) != samples


def test_captions_say_name_way_keywords_and_background(folder):
    samples = list(pictograms_source(folder, "train", 32, 8, seed=0).samples)
    plain = next(s for s in samples if s.captions[0] == "a thing 3")
    assert plain.captions[1] in {f"a {way} drawing of a thing 3" for way in ("flat", "shaded", "plain")}
    assert set(plain.captions[2].split(", ")) == {"a thing 3", "round", "small"}
    assert plain.captions[3] in {f"a thing 3 on a {name} background" for name in BACKGROUNDS}
    coloured = {s.captions[0].split()[1] for s in samples} - {"thing"}
    assert coloured == set(COLOURS)


def test_the_background_and_the_colour_are_those_of_the_caption(folder):
    for sample in list(pictograms_source(folder, "train", 32, 8, seed=0).samples)[:200]:
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB")).astype(int)
        background = sample.captions[3].split(" on a ")[1].removesuffix(" background")
        assert (np.median(pixels.reshape(-1, 3)[[0, 31, -32, -1]], axis=0) == BACKGROUNDS[background]).all()
        word = sample.captions[0].split()[1]
        wanted = COLOURS.get(word, (222, 46, 66))
        assert np.abs(pixels - wanted).sum(axis=2).min() < 12, sample.captions[0]


def test_one_style_of_some_things_is_held_out(folder):
    train, held = (
        {(s.captions[1].split()[1], s.label) for s in pictograms_source(folder, split, 16, 1, 0).samples}
        for split in ("train", "heldout")
    )
    assert 0 < len(held) <= len(NAMES) / 4
    assert not held & train
    labels = [label for _, label in held]
    assert len(labels) == len(set(labels))  # one style of each
    assert set(labels) <= {label for _, label in train}  # the thing itself is known


def test_a_tar_beside_the_table_gives_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as tar:
        for style in STYLES:
            tar.add(folder / style, arcname=style)
    (tmp_path / "captions.csv").write_text((folder / "captions.csv").read_text())
    ours = {s.captions: s.image for s in pictograms_source(tmp_path, "train", 16, 1, 0).samples}
    assert ours == {s.captions: s.image for s in pictograms_source(folder, "train", 16, 1, 0).samples}


def test_the_main_colour_is_replaced_and_the_rest_is_kept():
    image = disc((222, 46, 66, 255))
    image.paste((255, 255, 255, 255), (14, 14, 18, 18))
    blue = recoloured(image, COLOURS["blue"])
    assert np.abs(np.array(blue.getpixel((8, 16))[:3]) - COLOURS["blue"]).max() <= 4
    assert blue.getpixel((16, 16)) == (255, 255, 255, 255)
    assert blue.getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("colour", [(120, 120, 120, 255), (20, 20, 24, 255), (0, 0, 0, 0)])
def test_what_has_no_main_colour_is_left(colour):
    assert recoloured(disc(colour), COLOURS["blue"]) is None


def test_names_in_the_words_of_a_caption():
    assert plain_name("flag: France") == "flag of France"
    assert plain_name("keycap: 7") == "keycap 7"
    assert plain_name("waving hand: light skin tone") == "waving hand, light skin tone"
    assert plain_name("cat face") == "cat face"


def test_what_is_wrong_is_said(folder, tmp_path):
    with pytest.raises(UsageError, match="'test'; pictograms have train and heldout"):
        pictograms_source(folder, "test", 32, 1, 0)
    with pytest.raises(UsageError, match="size is 200"):
        pictograms_source(folder, "train", 200, 1, 0)
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a\n")
    with pytest.raises(DataError, match="tags"):
        pictograms_source(tmp_path, "train", 32, 1, 0)


def test_photographs_lie_behind_things(folder, tmp_path):
    pack(drawings_source("train", 20, 24, 0), tmp_path / "pack", 10, 0)
    behind = Shards(str(tmp_path / "pack"))
    samples = list(pictograms_source(folder, "train", 32, 2, 0, behind).samples)
    assert {Image.open(io.BytesIO(s.image)).size for s in samples} == {(32, 32)}
    assert {s.captions[3] for s in samples} == {f"a picture of {s.captions[0]}" for s in samples}
    assert list(pictograms_source(folder, "train", 32, 2, 0, behind).samples) == samples
    plain = pictograms_source(folder, "train", 32, 2, 0)
    assert plain.identity != pictograms_source(folder, "train", 32, 2, 0, behind).identity
