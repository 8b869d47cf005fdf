import io
import tarfile

import pytest
from PIL import Image

from clipkit.data.sources import class_source, csv_source, encode_png, scenes_source
from clipkit.errors import DataError, SampleError, UsageError


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or png("red"))


def captions(source):
    return {sample.captions for sample in source.samples}


def test_what_is_set_aside_is_no_sample(tmp_path, capsys):
    for name in ("red/0.jpg", "red/1.gif", "blue/0.jfif", "gifs/0.gif", "red/notes.txt"):
        put(tmp_path / name)
    (tmp_path / "green").symlink_to("nowhere")
    source = class_source(tmp_path, None, ["a {}"], 0)
    assert source.classes == [["blue"], ["red"]]
    assert source.count() == len(list(source.samples)) == 2
    assert source.aside() == {"other format": 2, "not a picture": 1, "broken link": 1}
    assert capsys.readouterr().err == f"clipkit: {tmp_path}: no picture that is read in gifs; left out of the classes\n"


def test_nothing_that_is_read_says_what_there_is(tmp_path):
    put(tmp_path / "red/0.gif")
    put(tmp_path / "red/1.HEIC")
    with pytest.raises(DataError, match=r"no picture in a format that is read .*; not taken: 2 other format"):
        class_source(tmp_path, None, ["a {}"], 0)


def test_classes_in_an_object_name_their_folders(tmp_path):
    for name in ("old/red/0.jpg", "blue/more/0.jpg", "cover.jpg", "green/0.jpg"):
        put(tmp_path / name)
    source = class_source(tmp_path, {"red": ["crimson"], "blue": ["azure"]}, ["a {c}"], 0)
    assert captions(source) == {("a azure",) * 4, ("a crimson",) * 4}
    assert source.templates == ["a {}"]
    assert source.aside() == {"unknown class": 2}
    assert source.count() == 2


def test_templates_are_checked_before_anything_is_read(tmp_path):
    put(tmp_path / "red/0.jpg")
    with pytest.raises(UsageError, match=r"template 'a \{x\}' must hold exactly one"):
        class_source(tmp_path, None, ["a {x}"], 0)


def test_an_unreadable_file_is_one_sample(tmp_path):
    put(tmp_path / "red/0.jpg")
    put(tmp_path / "red/1.jpg")
    source = class_source(tmp_path, None, ["a {}"], 0)
    (tmp_path / "red/0.jpg").unlink()
    bad, _ = source.samples
    assert isinstance(bad, SampleError)
    assert bad.reason == "unreadable file"
    assert source.count() == 2


def test_classes_that_prompts_do_not_tell_apart_are_named(tmp_path, capsys):
    for name in ("sea_lion", "Sea lion", "dog", "dogs"):
        put(tmp_path / name / "0.jpg")
    assert len(class_source(tmp_path, None, ["a {}"], 0).classes) == 4
    assert capsys.readouterr().err == (
        f"clipkit: {tmp_path}: several classes are called 'sea lion', the same in a prompt\n"
    )


def table(tmp_path, *lines):
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + "".join(f"{line}\n" for line in lines))
    return path


def paired(tmp_path, *lines):
    """{colour of the picture: captions}, and what is set aside."""
    source = csv_source(table(tmp_path, *lines), tmp_path / "pics")
    samples = list(source.samples)
    assert source.count() == len(samples)
    return {Image.open(io.BytesIO(s.image)).getpixel((0, 0)): s.captions for s in samples}, dict(source.aside())


RED, BLUE, LIME = (255, 0, 0), (0, 0, 255), (0, 255, 0)


@pytest.fixture
def pics(tmp_path):
    put(tmp_path / "pics/0.jpg", png("red"))
    put(tmp_path / "pics/masks/0.jpg", png("blue"))
    put(tmp_path / "pics/masks/deep/1.jpg", png("lime"))
    return tmp_path


def test_a_path_is_that_path(pics):
    assert paired(pics, "0.jpg,root", "masks/0.jpg,mask") == (
        {RED: ("root",), BLUE: ("mask",)},
        {"not in the table": 1},
    )
    assert paired(pics, "0.jpg,root") == ({RED: ("root",)}, {"not in the table": 2})


def test_the_end_of_a_path_will_do_when_only_one_has_it(pics):
    assert paired(pics, "1.jpg,deep", "deep/1.jpg,again") == ({LIME: ("deep", "again")}, {"not in the table": 2})
    (pics / "pics/0.jpg").rename(pics / "pics/other.jpg")
    put(pics / "pics/more/0.jpg")
    assert paired(pics, "0.jpg,which", "eep/1.jpg,half a name") == (
        {},
        {"ambiguous name": 1, "image missing": 1, "not in the table": 4},
    )


def test_spellings_of_a_path(pics):
    assert paired(pics, "./0.jpg,a", r"masks\0.jpg,b", " masks//deep/1.jpg ,c") == (
        {RED: ("a",), BLUE: ("b",), LIME: ("c",)},
        {},
    )


def test_rows_that_are_of_no_picture(pics):
    put(pics / "pics/2.gif")
    found, aside = paired(pics, "0.jpg,a", ",nothing", "2.gif,counted once", "lost.jpg,x", "lost.jpg,y")
    assert found == {RED: ("a",)}
    assert aside == {"other format": 1, "no image": 1, "image missing": 1, "not in the table": 2}


def test_the_table_is_no_file_that_was_not_taken(pics):
    path = table(pics / "pics", "0.jpg,a")
    put(pics / "pics/readme.md")
    assert csv_source(path, pics / "pics").aside() == {"not a picture": 1, "not in the table": 2}


def test_a_tar_with_a_folder_around(pics):
    with tarfile.open(pics / "x.tar.gz", "w:gz") as tar:
        tar.add(pics / "pics", "some/pics")
    source = csv_source(table(pics, "masks/0.jpg,mask", "0.jpg,which"), pics / "x.tar.gz")
    assert captions(source) == {("mask",)}
    assert source.aside() == {"not in the table": 2, "ambiguous name": 1}


def test_the_identity_changes_with_the_files(pics):
    path = table(pics, "0.jpg,a")
    before = csv_source(path, pics / "pics").identity
    assert csv_source(path, pics / "pics").identity == before
    put(pics / "pics/a_new.jpg")
    assert csv_source(path, pics / "pics").identity != before
    before = class_source(pics / "pics/masks", {"masks": ["m"]}, ["a {}"], 0).identity
    put(pics / "pics/masks/0.jpg", png("black") + b" ")
    assert class_source(pics / "pics/masks", {"masks": ["m"]}, ["a {}"], 0).identity != before


def test_scenes_are_a_source_with_true_captions(tmp_path):
    from clipkit import world

    samples = list(scenes_source("relations", 30, 32, 5).samples)
    assert samples == list(scenes_source("relations", 30, 32, 5).samples)
    for i, sample in enumerate(samples):
        assert 1 <= len(sample.captions) <= 8
        assert sample.label is None
        styles = ("flat",) * 4 + world.STYLES[1:]
        true = {caption.text for caption in world.captions(world.sample("relations", 5, i, styles))}
        assert set(sample.captions) <= true
    with pytest.raises(UsageError, match="unknown split 'tset'"):
        scenes_source("tset", 1, 32, 0)
    with pytest.raises(UsageError, match="8 to 1024 pixels"):
        scenes_source("train", 1, 2000, 0)


def test_rendered_and_pictogram_sources_pack_by_command(command, tmp_path):
    code, out, _ = command("pack", "scenes", tmp_path / "s", "--count", 6, "--size", 32)
    assert (code, "6 samples" in out) == (0, True)
    code, _, err = command("pack", "scenes", tmp_path / "t", "--variants", 2)
    assert (code, "--variants has no effect on scenes" in err) == (2, True)
    code, _, err = command("pack", f"pictograms:{tmp_path}", tmp_path / "t")
    assert (code, "holds no captions.csv" in err) == (1, True)
    code, _, err = command("pack", f"pictograms:{tmp_path}", tmp_path / "t", "--count", 2)
    assert (code, "--count has no effect on pictograms" in err) == (2, True)


def test_a_table_given_as_the_source_is_said_to_be_one(command, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,a cat\n")
    code, _, err = command("pack", tmp_path / "t.csv", tmp_path / "p")
    assert (code, "is a table; give the folder or tar of its images" in err) == (2, True)


def test_a_further_row_without_a_caption_is_counted(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "0.png").write_bytes(encode_png(Image.new("RGB", (8, 8))))
    (tmp_path / "t.csv").write_text("image,caption\n0.png,a cat\n0.png,\n")
    source = csv_source(tmp_path / "t.csv", tmp_path / "pics")
    assert [sample.captions for sample in source.samples] == [("a cat", "")]
    assert source.aside() == {"no caption": 1}
