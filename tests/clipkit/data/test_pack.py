import dataclasses
import hashlib
import io
import json
import tarfile
from inspect import signature

import pytest
from PIL import Image

from clipkit.cli import cli
from clipkit.data import pack as packing
from clipkit.data.images import format_of
from clipkit.data.pack import Encoding, pack
from clipkit.data.shards import Shards
from clipkit.data.sources import class_source, csv_source, drawings_source
from clipkit.errors import DataError, UsageError
from clipkit.registry import SOURCES, Registry


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("n01", "red"), ("n02", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(png(colour))
    return tmp_path / "images"


CLASSES = {"n01": ["goldfish", "Carassius auratus"], "n02": ["bullfrog"]}


def test_a_classed_folder_draws_synonyms_and_templates(folder, tmp_path):
    index = pack(class_source(folder, CLASSES, ["a {}.", "one {}."], 0), tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert index["samples"] == 12
    captions = {c for i in range(12) for c in shards.read(i).captions}
    assert captions == {f"{t} {n}." for t in ("a", "one") for n in ("goldfish", "Carassius auratus", "bullfrog")}
    assert shards.classes == list(CLASSES.values())
    assert [shards.read(i).label for i in range(12)] == [0] * 6 + [1] * 6


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_a_tar_of_any_compression_equals_its_folder(folder, tmp_path, compression):
    archive = tmp_path / f"images.tar.{compression}"
    with tarfile.open(archive, f"w:{compression}") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, path.relative_to(folder))
    first = pack(class_source(folder, CLASSES, ["a {}."], 3), tmp_path / "a")
    second = pack(class_source(archive, CLASSES, ["a {}."], 3), tmp_path / "b")
    assert first == second


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    def digest(name):
        pack(drawings_source("train", 30, 32, 5), tmp_path / name)
        return hashlib.sha256((tmp_path / name / "shard-000000.tar").read_bytes()).hexdigest()

    assert digest("a") == digest("b")


def test_a_shard_has_the_bytes_that_webdataset_writes(tmp_path):
    import webdataset

    source = drawings_source("train", 7, 32, 5)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), user="", group="", mtime=0.0) as writer:
        for i, sample in enumerate(source.samples):
            record = {"captions": list(sample.captions), "label": sample.label}
            writer.write(
                {"__key__": f"{i:09d}", "png": sample.image, "txt": sample.captions[0].encode(), "json": record}
                | {"json": json.dumps(record, ensure_ascii=False).encode()}
            )
    pack(drawings_source("train", 7, 32, 5), tmp_path / "ours")
    assert (tmp_path / "ours" / "shard-000000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_directory_names_serve_as_class_names(folder, tmp_path):
    pack(class_source(folder, None, ["a {}."], 0), tmp_path / "out")
    assert Shards(tmp_path / "out").classes == [["n01"], ["n02"]]


@pytest.mark.parametrize("as_tar", [False, True], ids=["folder", "tar"])
def test_what_is_hidden_is_no_class_and_no_image(folder, tmp_path, as_tar):
    """As macOS leaves it in folders, and in the tars that it makes."""
    for name in ("__MACOSX/n01/0.png", "n01/._0.png", ".thumbnails/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"Mac OS X")
    source = folder
    if as_tar:
        source = tmp_path / "images.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(folder, ".")
    index = pack(class_source(source, None, ["a {}."], 0), tmp_path / "out")
    assert (index["classes"], index["samples"], index["skipped"]) == ([["n01"], ["n02"]], 12, {})


def test_csv_with_several_captions_and_every_kind_of_gap(folder, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text('image,caption\nn01/0.png,"red, square"\nn01/0.png,a square\nn02/1.png,\nlost.png,gone\n')
    index = pack(csv_source(table, folder), tmp_path / "out")
    sample = Shards(tmp_path / "out").read(0)
    assert sample.captions == ("red, square", "a square")
    assert sample.label is None
    assert index["samples"] == 1
    assert index["skipped"] == {"not in the table": 10, "no caption": 1, "image missing": 1}


def test_unreadable_images_are_skipped_counted_and_named(folder, tmp_path, capsys):
    (folder / "n01" / "broken.png").write_bytes(b"not an image")
    index = pack(class_source(folder, CLASSES, ["a {}."], 0), tmp_path / "out")
    assert (index["samples"], index["skipped"]) == (12, {"not an image": 1})
    assert "clipkit: not an image: n01/broken.png\n" in capsys.readouterr().err
    for i in range(1, 6):
        (folder / "n01" / f"broken{i}.png").write_bytes(b"not an image")
    pack(class_source(folder, CLASSES, ["a {}."], 0), tmp_path / "more")
    named = "n01/broken.png, n01/broken1.png, n01/broken2.png and 3 more"
    assert f"clipkit: not an image: {named}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["skipped"] == {"not an image": 1}


def test_holdout_splits_without_overlap(tmp_path):
    index = pack(drawings_source("train", 50, 32, 0), tmp_path / "out", holdout=10)
    val = Shards(tmp_path / "out-val")
    train = Shards(tmp_path / "out")
    assert (index["samples"], len(val)) == (40, 10)
    assert not {val.read(i).image for i in range(10)} & {train.read(i).image for i in range(40)}
    assert val.classes == train.classes


def test_shards_have_the_asked_size(tmp_path):
    index = pack(drawings_source("train", 25, 32, 0), tmp_path / "out", shard_size=10)
    assert [s["samples"] for s in index["shards"]] == [10, 10, 5]


def test_nothing_to_pack(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no <class>/<image> layout"):
        pack(class_source(tmp_path / "empty", None, ["a {}."], 0), tmp_path / "out")
    (tmp_path / "no.csv").write_text("file,text\n")
    with pytest.raises(DataError, match="it needs image,caption"):
        csv_source(tmp_path / "no.csv", tmp_path / "empty")
    (tmp_path / "yes.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="nothing to pack"):
        pack(csv_source(tmp_path / "yes.csv", tmp_path / "empty"), tmp_path / "out")


def test_a_source_that_is_no_tar(tmp_path):
    (tmp_path / "x.tar").write_text("hello")
    with pytest.raises(DataError, match="neither a folder nor a readable tar"):
        class_source(tmp_path / "x.tar", None, ["a {}."], 0)


def test_never_writes_over_something(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        pack(drawings_source("train", 5, 32, 0), tmp_path)


def _drawings(count=40):
    return drawings_source("train", count, 24, 0)


@pytest.mark.parametrize("holdout", [0, 5])
@pytest.mark.parametrize("at", [0, 7, 18, 39])
def test_interrupted_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, at, holdout):
    whole = pack(_drawings(), tmp_path / "whole", 10, holdout)
    draw, drawn = packing._checked, []

    def interrupted(sample, encoding):
        drawn.append(sample)
        if len(drawn) > at:
            raise KeyboardInterrupt
        return draw(sample, encoding)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_checked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(_drawings(), tmp_path / "parts", 10, holdout)
    assert not (tmp_path / "parts" / "pack.json").exists()
    with pytest.raises(UsageError, match="another source or options"):
        pack(_drawings(), tmp_path / "parts", 11, holdout)
    assert pack(_drawings(), tmp_path / "parts", 10, holdout) == whole
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == names
    if holdout:
        a, b = (Shards(tmp_path / f"{n}-val") for n in ("whole", "parts"))
        assert [a.read(i).image for i in range(5)] == [b.read(i).image for i in range(5)]


def test_what_is_finished_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        packing, "_write_shard", lambda *a, made=packing._write_shard: calls.append(a[0].name) or made(*a)
    )
    calls: list[str] = []
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    source = _drawings()
    failing = [*[next(source.samples) for _ in range(38)], KeyboardInterrupt()]

    def samples():
        for sample in failing:
            if isinstance(sample, KeyboardInterrupt):
                raise sample
            yield sample

    with pytest.raises(KeyboardInterrupt):
        pack(dataclasses.replace(source, samples=samples()), tmp_path / "out", 10)
    pack(_drawings(), tmp_path / "out", 10)
    assert calls == [f"shard-{i:06d}.tar" for i in (0, 1, 2, 2, 3)]  # 16 were under way


def test_a_damaged_journal(tmp_path):
    (tmp_path / "packing.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        pack(_drawings(), tmp_path)


def _photo(kind, size=(60, 40)):
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize(size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_images_are_reduced_and_encoded_anew_only_when_asked(kind):
    data = _photo(kind)
    assert Encoding()(data) == data
    assert Encoding(resize=50)(data) == data
    assert Encoding(encode=kind)(data) == data
    smaller = Encoding(resize=20)(data)
    assert format_of(smaller) == kind
    assert Image.open(io.BytesIO(smaller)).size == (30, 20)
    for other in ("jpeg", "png", "webp"):
        assert format_of(Encoding(encode=other, resize=20)(data)) == other
    assert len(Encoding(encode="jpeg", resize=39, quality=20)(data)) < len(
        Encoding(encode="jpeg", resize=39, quality=95)(data)
    )


def test_a_bad_image_does_not_cost_the_holdout_its_size(folder, tmp_path):
    for i in range(6):
        (folder / "n01" / f"{i}.png").write_bytes(b"broken")
    pack(class_source(folder, CLASSES, ["a {}."], 0), tmp_path / "out", holdout=3)
    assert (len(Shards(tmp_path / "out")), len(Shards(tmp_path / "out-val"))) == (3, 3)


def test_too_large_a_holdout(tmp_path):
    with pytest.raises(UsageError, match="holdout is 40, which leaves nothing of 40 samples"):
        pack(_drawings(), tmp_path / "out", holdout=40)


def test_hostile_captions_are_cleaned_or_counted(folder, tmp_path):
    table = tmp_path / "captions.csv"
    long = "x" * 100_000
    table.write_bytes(
        f'image,caption\nn01/0.png,"a\x00b"\nn01/1.png,"  "\nn01/2.png,{long}\nn01/3.png,<end> of text\n'.encode()
    )
    index = pack(csv_source(table, folder), tmp_path / "out")
    captions = [Shards(tmp_path / "out").read(i).captions[0] for i in range(index["samples"])]
    assert captions == ["a b", "x" * 4096, "<end> of text"]
    assert index["skipped"]["no caption"] == 1


def _interrupted(source, out, at, monkeypatch):
    """Pack until sample `at`, in shards of two."""
    checked, seen = packing._checked, []

    def until(sample, encoding):
        seen.append(sample)
        if len(seen) > at:
            raise KeyboardInterrupt
        return checked(sample, encoding)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_checked", until)
        with pytest.raises(KeyboardInterrupt):
            pack(source, out, 2)


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "renamed"])
def test_it_is_not_resumed_when_the_folder_has_changed(folder, tmp_path, monkeypatch, change):
    def source():
        return class_source(folder, CLASSES, ["a {}."], 0)

    _interrupted(source(), tmp_path / "out", 5, monkeypatch)
    {
        "added": lambda: (folder / "n01" / "a_new.png").write_bytes(png("green")),
        "removed": lambda: (folder / "n02" / "5.png").unlink(),
        "replaced": lambda: (folder / "n01" / "0.png").write_bytes(png("green")),
        "renamed": lambda: (folder / "n01" / "0.png").rename(folder / "n01" / "9.png"),
    }[change]()
    with pytest.raises(UsageError, match="files were added, removed or changed since; remove it and pack again"):
        pack(source(), tmp_path / "out", 2)


def test_it_is_resumed_when_only_other_files_came(folder, tmp_path, monkeypatch):
    def source():
        return class_source(folder, CLASSES, ["a {}."], 0)

    whole = pack(source(), tmp_path / "whole", 2)
    _interrupted(source(), folder / "packed", 5, monkeypatch)  # within the source, as people do
    (folder / "n01" / "a.gif").write_bytes(b"GIF89a")
    index = pack(source(), folder / "packed", 2)
    assert index["shards"] == whole["shards"]
    assert index["skipped"]["other format"] == 1


def test_what_is_set_aside_does_not_cost_the_holdout_its_size(folder, tmp_path):
    for i in range(30):
        (folder / "n02" / f"x{i}.gif").write_bytes(b"GIF89a")
    index = pack(class_source(folder, CLASSES, ["a {}."], 0), tmp_path / "out", holdout=6)
    assert (len(Shards(tmp_path / "out")), len(Shards(tmp_path / "out-val"))) == (6, 6)
    assert index["skipped"] == {"other format": 30}


@pytest.mark.parametrize("before", [True, False])
def test_a_failure_leaves_no_folder_behind(folder, tmp_path, before):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    (folder / "n01" / "0.gif").write_bytes(b"GIF89a")
    if before:
        (tmp_path / "packs" / "out").mkdir(parents=True)
    with pytest.raises(DataError, match="nothing to pack: 12 not an image, 1 other format"):
        pack(class_source(folder, CLASSES, ["a {}."], 0), tmp_path / "packs" / "out", holdout=2)
    assert (tmp_path / "packs" / "out").exists() == before
    assert (tmp_path / "packs").exists() == before
    assert not (tmp_path / "packs" / "out-val").exists()


def test_a_full_disk_is_an_error_with_a_path(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(OSError, match="No space left") as error:
            pack(_drawings(), tmp_path / "packs" / "out", 10)
    assert error.value.filename == str(tmp_path / "packs" / "out" / "shard-000000.tar")
    assert not (tmp_path / "packs").exists()
    pack(_drawings(), tmp_path / "packs" / "out", 10)  # as if nothing had been


def test_places_without_a_name(folder, tmp_path, monkeypatch):
    (tmp_path / "packs").mkdir()
    monkeypatch.chdir(tmp_path / "packs")
    assert packing.holdout_of(packing.Path()) == tmp_path / "packs-val"
    pack(class_source(folder, CLASSES, ["a {}."], 0), packing.Path(), holdout=2)
    assert len(Shards(tmp_path / "packs-val")) == 2


SOURCE_OF_A_PACKAGE = """
from clipkit.data.sources import RawSample, Source, encode_png
from PIL import Image

def squares(count, size, seed):
    images = [encode_png(Image.new("RGB", (size, size), (0, 0, i))) for i in range(count)]
    samples = (RawSample(image, (f"square {i}",), None) for i, image in enumerate(images))
    return Source(samples, lambda: count, repr(("squares", count, size, seed)), [], [])
"""


def test_a_source_of_another_package(tmp_path, monkeypatch, command):
    (tmp_path / "squares.py").write_text(SOURCE_OF_A_PACKAGE)
    info = tmp_path / "squares-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: squares\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[clipkit.sources]\nsquares = squares:squares\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry("source", SOURCES.own)  # entry points are read once
    monkeypatch.setattr("clipkit.commands.packs.SOURCES", fresh)
    monkeypatch.setattr(cli.commands["pack"], "registries", [fresh])
    assert "squares     from squares" in command("pack", "--help")[1]
    code, out, err = command("pack", "squares", tmp_path / "o", "--count", 3)
    assert (code, err) == (0, ""), out
    assert Shards(tmp_path / "o").read(2).captions == ("square 2",)
    code, _, err = command("pack", "squares", tmp_path / "p", "--variants", 2)
    assert (code, "--variants has no effect on squares" in err) == (2, True)


def test_options_of_each_source_are_options_of_the_command():
    from clipkit.commands.packs import pack as command

    names = {"source", *(parameter.name for parameter in command.params)}
    for name in SOURCES:
        assert set(signature(SOURCES[name]).parameters) <= names, name


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["drawings", "o", "--classnames", "x.json"], "--classnames has no effect on drawings"),
        (["drawings", "o", "--templates", "x.txt"], "--templates has no effect on drawings"),
        (["drawings", "o", "--csv", "x.csv"], "--csv has no effect on drawings"),
        (["drawings", "o", "--download"], "--download has no effect on drawings"),
        (["cifar10", "o", "--count", "5"], "--count has no effect on cifar10"),
        (["cifar10", "o", "--templates", "x.txt"], "--templates has no effect on cifar10"),
        (["images", "o", "--count", "12000"], "--count has no effect on a folder or tar"),
        (["images", "o", "--split", "train"], "--split has no effect on a folder or tar"),
        (["images", "o", "--data-dir", "data"], "--data-dir has no effect on a folder or tar"),
        (["images", "o", "--csv", "x.csv", "--classnames", "x.json"], "--classnames has no effect with --csv"),
        (["images", "o", "--csv", "x.csv", "--seed", "1"], "--seed has no effect with --csv"),
        (["csv:images", "o"], "needs a table of captions; give --csv TABLE"),
        (["pictograms", "o"], "did you mean 'pictograms:FOLDER'?"),
        (["drawings:x", "o"], "did you mean 'drawings'?"),
        (["images", "o", "--quality", "90"], "--quality has no effect on images that are kept"),
        (["images", "o", "--quality", "50", "--encode", "png"], "--quality has no effect on PNGs"),
        (["imagse", "o", "--count", "5"], "no folder or tar at imagse"),
        (["images", "o", "--seed", "-1"], "-1 is not in the range"),
        (["images", "images/n01/0.png"], "cannot write into images/n01/0.png"),
        (["images", "images/n01/0.png/out"], "cannot write into images/n01/0.png/out"),
        (["images", "o", "--templates", "no.txt"], "no.txt does not exist"),
        (["images", "o", "--classnames", "no.json"], "cannot read no.json: No such file"),
        (["images", "o", "--csv", "no.csv"], "no.csv: No such file"),
    ],
)
def test_what_pack_refuses_before_it_begins(folder, words, what, command, monkeypatch):
    monkeypatch.chdir(folder.parent)
    code, out, err = command("pack", *words)
    assert (code, out, err.count("\n")) == (1 if "no.csv" in what else 2, "", 1)
    assert what in err
    assert sorted(p.name for p in folder.parent.iterdir()) == ["images"]


def test_options_that_have_an_effect_are_taken(folder, tmp_path, command):
    (tmp_path / "t.txt").write_text("one {c}.\n\n")
    (tmp_path / "n.json").write_text(json.dumps({"n01": "goldfish", "n02": ["bullfrog"]}), encoding="utf-8-sig")
    words = ["--templates", tmp_path / "t.txt", "--classnames", tmp_path / "n.json", "--seed", 1]
    code, out, _ = command("pack", folder, tmp_path / "o", *words, "--resize", 4, "--quality", 50)
    assert (code, out) == (0, f"{tmp_path / 'o'}: 12 samples in 1 shard; skipped: none\n")
    assert Shards(tmp_path / "o").read(0).captions == ("one goldfish.",) * 4
    assert command("pack", folder, tmp_path / "p", "--templates", "7")[0] == 0
    assert len(Shards(tmp_path / "p").templates) == 7


def test_what_is_skipped_is_said_and_verified(folder, tmp_path, command):
    (folder / "n01" / "x.tiff").write_bytes(b"II*\0")
    assert "skipped: 1 other format" in command("pack", folder, tmp_path / "o")[1]
    assert "skipped when it was made: 1 other format" in command("verify", tmp_path / "o")[1]
