import gc
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from external_models import write_fashion_mnist
from PIL import Image
from ranks import on_ranks

from clipkit.data.images import decode
from clipkit.data.pack import pack
from clipkit.data.shards import Shards
from clipkit.data.sources import class_source
from clipkit.errors import ClipkitError, DataError, SampleError, UsageError
from clipkit.registry import DATASETS, Entry
from clipkit.zeroshot.datasets import ImageSet, as_source, open_set
from clipkit.zeroshot.named import described


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("red_cup", "red"), ("boat", "blue")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "set" / name / f"{i}.jpg")
    return tmp_path / "set"


def check(images):
    assert len(images) == 6
    assert images.classes == [["boat"], ["red cup"]]
    image, (label,) = images[0]
    assert label == (0 if image.getpixel((4, 4))[2] > 200 else 1)


def test_a_folder_and_its_tar(folder, tmp_path):
    check(open_set(f"folder:{folder}", tmp_path))
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as archive:
        archive.add(folder, "set")
    check(open_set(f"tar:{tmp_path / 'set.tar.xz'}", tmp_path))


def test_a_pack(packs, tmp_path):
    images = open_set(f"shards:{packs / 'heldout'}", tmp_path)
    assert len(images) == 64
    assert len(images.classes) == 128
    assert images.templates[0] == "a {}"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cifar1000", UsageError, "unknown data set 'cifar1000'; did you mean 'cifar100'"),
        ("folder:nowhere", DataError, "no folder at nowhere"),
        ("tar:nowhere.tar", DataError, "no tar at nowhere.tar"),
        ("shards:nowhere", DataError, "no pack at nowhere"),
        ("cifar100", DataError, "cifar100 is not in .*; download it, or give the folder"),
        ("fashion-mnist", DataError, "fashion-mnist is not in .*; download it, or give the folder"),
    ],
)
def test_what_is_not_there(tmp_path, name, error, message):
    with pytest.raises(error, match=message) as found:
        open_set(name, tmp_path)
    assert "\n" not in str(found.value)


def test_an_image_that_is_not_one(folder, tmp_path):
    (folder / "boat" / "0.jpg").write_text("hello")
    images = open_set(f"folder:{folder}", tmp_path)
    with pytest.raises(SampleError, match=r"not an image: folder:.*, boat/0.jpg: no readable"):
        _ = images[0]


def test_a_folder_without_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no <class>/<image> layout: a\.png is in no class folder"):
        open_set(f"folder:{tmp_path}", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_its_own_format(name, tmp_path, monkeypatch):
    """The python version's pickles, with checksums of the files that this test makes."""
    from torchvision import datasets

    kind = getattr(datasets, described()[name]["torchvision"])
    pixels = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
    labels = [3, 1, 0, 2]
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    test_list = [write("test", {"data": pixels, key: labels})]
    names = described()[name]["classes"]
    meta_key = kind.meta["key"]
    meta = write("meta", {meta_key: names})
    for attribute, value in {
        "test_list": test_list,
        "train_list": [],
        "meta": {"filename": meta[0], "key": meta_key, "md5": meta[1]},
    }.items():
        monkeypatch.setattr(kind, attribute, value)
    images = open_set(name, tmp_path)
    assert [images[i][1] for i in range(4)] == [(label,) for label in labels]
    assert np.array_equal(np.asarray(images[2][0]), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert len(images.classes) == len(described()[name]["classes"])


def test_fashion_mnist_in_its_own_format(tmp_path):
    pixels = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    write_fashion_mnist(tmp_path, (255 - pixels, [3, 3]), (pixels, [9, 4]))
    images = open_set("fashion-mnist", tmp_path)
    assert [images[i][1] for i in range(2)] == [(9,), (4,)]
    assert images.classes[9] == ["ankle boot"]
    assert np.array_equal(np.asarray(images[1][0]), pixels[1])
    trained_on = open_set("fashion-mnist", tmp_path, training=True)
    assert [trained_on[i][1] for i in range(2)] == [(3,), (3,)]


def test_named_sets_are_packed_as_they_are(tmp_path, command):
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (8, 28, 28), dtype=np.uint8)
    write_fashion_mnist(tmp_path, (pixels[:5], [0, 1, 2, 3, 9]), (pixels[5:], [7, 8, 9]))
    for split, first, labels in (("train", 0, [0, 1, 2, 3, 9]), ("test", 5, [7, 8, 9])):
        words = ("fashion-mnist", tmp_path / split, "--split", split, "--data-dir", tmp_path)
        assert command("pack", *words)[0] == 0
        shards = Shards(str(tmp_path / split))
        samples = [shards.read(i) for i in range(len(shards))]
        assert [sample.label for sample in samples] == labels
        for i, sample in enumerate(samples):
            grey = np.repeat(pixels[first + i][..., None], 3, axis=2)
            assert np.array_equal(np.asarray(decode(sample.image)), grey)
            templates = [t.format(shards.classes[sample.label][0]) for t in described()["fashion-mnist"]["templates"]]
            assert set(sample.captions) <= set(templates)
        assert command("pack", *words)[0] == 2  # what is there is not written over


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("fashion-mnist", "out"), 1, "fashion-mnist is not in data; download it, or give the folder"),
        (("fashion-mnist", "out", "--split", "heldout"), 2, "split is 'heldout'; fashion-mnist has train and test"),
        (("eurosat", "out"), 2, "eurosat has no training images that clipkit knows"),
        (
            ("fashion-mnits", "out"),
            2,
            "no folder or tar at fashion-mnits, nor a data set; did you mean 'fashion-mnist'?",
        ),
    ],
)
def test_named_sets_that_cannot_be_packed(words, code, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = command("pack", *words)
    assert found == code
    assert message in err
    assert err.count("\n") == 1


def test_sets_of_several_labels_are_not_packed():
    images = ImageSet(
        "csv:a.csv", [["a"], ["b"]], ["{}"], 1, lambda i: (Image.new("L", (2, 2)), (0, 1)), multilabel=True
    )
    with pytest.raises(UsageError, match="several labels"):
        as_source(images, seed=0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # urllib leaves a 404's socket open
def test_a_download_goes_through_and_a_failed_one_is_one_line(tmp_path, monkeypatch):
    """From a local server: Fashion-MNIST's four files with the checksums of what is served."""
    import functools
    import http.server
    import threading

    from torchvision import datasets

    served = tmp_path / "served"
    served.mkdir()
    resources = []
    for split in ("train", "t10k"):
        for kind, head, body in (
            ("images-idx3-ubyte", struct.pack(">iiii", 2051, 1, 28, 28), bytes(784)),
            ("labels-idx1-ubyte", struct.pack(">ii", 2049, 1), bytes([7])),
        ):
            buffer = io.BytesIO()
            with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
                file.write(head + body)
            (served / f"{split}-{kind}.gz").write_bytes(buffer.getvalue())
            resources.append((f"{split}-{kind}.gz", hashlib.md5(buffer.getvalue()).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    try:
        assert open_set("fashion-mnist", tmp_path / "data", download=True)[0][1] == (7,)
        for file in served.iterdir():
            file.unlink()
        with pytest.raises(DataError, match=r"fashion-mnist .*(download failed|could not be fetched)") as error:
            open_set("fashion-mnist", tmp_path / "other", download=True)
        assert "\n" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()
        gc.collect()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_the_registry_is_complete(name):
    entry = described()[name]
    assert len(entry["classes"]) == {"cifar10": 10, "cifar100": 100, "fashion-mnist": 10}[name]
    assert all(t.count("{}") == 1 for t in entry["templates"])
    assert entry["source"]


def read(images):
    """[label] of what can be read, and {reason: count} of what cannot."""
    labels, reasons = [], Counter()
    for i in range(len(images)):
        try:
            labels.append(images[i][1])
        except SampleError as error:
            reasons[error.reason] += 1
    return labels, dict(reasons)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_not_taken_is_counted(folder, tmp_path, kind, capsys):
    for name in ("boat/x.gif", "boat/y.txt", "gifs/0.gif", "boat/.hidden.gif"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"GIF89a")
    (folder / "boat" / "more").mkdir()
    (folder / "boat" / "0.jpg").rename(folder / "boat" / "more" / "0.JFIF")
    place = folder
    if kind == "tar":
        place = tmp_path / "set.tar"
        with tarfile.open(place, "w") as archive:
            archive.add(folder, "set")
    images = open_set(f"{kind}:{place}", tmp_path)
    check(images)
    assert images.skipped == {"other format": 2, "not an image": 1}
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"clipkit: {place}: no JPEG, PNG or WebP image in gifs; omitted from the classes"


def test_a_linked_subset(folder, tmp_path):
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "boat").symlink_to(folder / "boat")
    (tmp_path / "subset" / "cup").symlink_to(folder / "lost")
    images = open_set(f"folder:{tmp_path / 'subset'}", tmp_path)
    assert (len(images), images.classes, images.skipped) == (3, [["boat"]], {"broken link": 1})


def test_splits_are_refused(folder, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    with pytest.raises(
        DataError, match=r"holds several splits \(test, train\); give one of them, such as .*splits/test"
    ):
        open_set(f"folder:{tmp_path / 'splits'}", tmp_path)
    with tarfile.open(tmp_path / "splits.tar", "w") as archive:
        archive.add(tmp_path / "splits", "splits")
    with pytest.raises(DataError, match=r"give one of them, unpacked"):
        open_set(f"tar:{tmp_path / 'splits.tar'}", tmp_path)


def test_a_pack_with_samples_of_no_use(folder, tmp_path):
    pack(class_source(folder, None, ["a {}"], 0), tmp_path / "p")
    index = json.loads((tmp_path / "p" / "pack.json").read_text())
    index["classes"] = [["boat"]]
    (tmp_path / "p" / "pack.json").write_text(json.dumps(index))
    assert read(open_set(f"shards:{tmp_path / 'p'}", tmp_path)) == ([(0,)] * 3, {"bad metadata": 3})
    index["templates"] = ["{} or {}"]
    (tmp_path / "p" / "pack.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"/p: template '\{\} or \{\}' must hold exactly one"):
        open_set(f"shards:{tmp_path / 'p'}", tmp_path)


def test_labels_in_a_table(folder, tmp_path, monkeypatch):
    def opened(*rows):
        (tmp_path / "t.csv").write_text("image;Label\n" + "".join(f"{row}\n" for row in rows))
        return open_set(f"csv:{tmp_path / 't.csv'}", tmp_path)

    spaced = opened(
        "set/boat/0.jpg; boat", "set/boat/1.jpg;boat ", "set/boat/2.jpg;big  boat", "set/boat/2.jpg;big_boat"
    )
    assert (spaced.classes, spaced.multilabel) == ([["big boat"], ["boat"]], False)
    assert read(spaced) == ([(1,), (1,), (0,), (0,)], {})
    some = opened(
        "set/boat/0.jpg;boat", "set/boat/1.jpg;", ";boat", "set/boat/9.jpg;boat", "set;boat", "set/boat/1.jpg;boat|boat"
    )
    assert (some.multilabel, some.skipped) == (False, {"no label": 1, "no image": 1})
    assert read(some) == ([(0,), (0,)], {"image missing": 1, "unreadable file": 1})
    several = opened("set/boat/0.jpg;boat|", "set/boat/1.jpg; sea | boat")
    assert several.multilabel
    assert read(several) == ([(0,), (1, 0)], {})
    numbers = opened(*(f"set/boat/0.jpg;{i}" for i in range(12)))
    assert numbers.classes == [[str(i)] for i in range(12)]
    assert numbers.ordered
    with pytest.raises(DataError, match="has no labelled row"):
        opened("set/boat/0.jpg; ")


def test_a_table_in_a_pipe_has_paths_from_here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("image,label\nboat/0.jpg,boat\n",))
    writer.start()
    assert read(open_set(f"csv:{tmp_path / 'pipe'}", tmp_path)) == ([(0,)], {})
    writer.join()


def test_samples_of_a_webdataset_that_are_of_no_use(folder, tmp_path):
    jpeg = (folder / "boat" / "0.jpg").read_bytes()
    members = {
        "./._a.jpg": b"mac",
        "./a.jpg": jpeg,
        "./a.cls": b"0\n",
        "./a.json": b"{foreign",
        "v1.0/b.seg.png": b"no picture of the sample",
        "v1.0/b.JPG": jpeg,
        "v1.0/b.cls": b"1",
        "v1.0/c.cls": b"1",
        "v1.0/d.jpg": jpeg,
        "v1.0/e.jpg": jpeg,
        "v1.0/e.cls": b"cat",
        "f.png": b"broken",
        "f.cls": b"0",
        "g.jpg": jpeg,
        "g.cls": b"-1",
    }
    (tmp_path / "w").mkdir()
    with tarfile.open(tmp_path / "w" / "0.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "w" / "classnames.txt").write_text("cat\ndog\n")
    images = open_set(f"wds:{tmp_path / 'w'}", tmp_path)
    assert images.skipped == {"no image": 1, "no label": 3}
    assert read(images) == ([(0,), (1,)], {"not an image": 1})
    (tmp_path / "w" / "zeroshot_classification_templates.txt").write_text("a {c} in a {c}\n")
    with pytest.raises(UsageError, match=r"zeroshot_classification_templates\.txt: template 'a {c} in a {c}'"):
        open_set(f"wds:{tmp_path / 'w'}", tmp_path)


def test_bad_images_of_a_named_set_are_packed_as_bad_samples():
    def get(i):
        if i:
            raise SampleError("damaged image", "x")
        return Image.new("RGB", (4, 4)), (0,)

    source = as_source(ImageSet("x", [["a"]], ["{}"], 2, get, skipped={"other format": 3}), 0)
    good, bad = source.samples
    assert (good.captions, bad.reason) == (("a",) * 4, "damaged image")
    assert source.aside() == {"other format": 3}


def test_imagenet_in_deeper_folders(tmp_path):
    """Tiny ImageNet as it is published has n01443537/images/x.JPEG."""
    place = tmp_path / "imagenet" / "val"
    for wnid, name in (("n01443537", "images/x.JPEG"), ("n01440764", "y.JPEG"), ("n01440764", "z.gif")):
        (place / wnid / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / wnid / name)
    images = open_set("imagenet", tmp_path)
    assert read(images) == ([(0,), (1,)], {})
    assert images.skipped == {"other format": 1}
    assert images.renamed({"n01443537": ["b"], "n01440764": ["a"]}, "o").classes == [["a"], ["b"]]
    assert images.renamed([["x"], ["y"]], "o").classes == [["x"], ["y"]]  # in the order that everybody's lists have


def test_labels_of_a_table_that_prompts_do_not_tell_apart_are_named(tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text("image,label\n0.png,Cat\n1.png,cat\n2.png,dog\n")
    assert len(open_set(f"csv:{table}", tmp_path).classes) == 3
    assert capsys.readouterr().err == f"clipkit: {table}: several classes are called 'cat', the same in a prompt\n"


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """An installed package that registers the data set "birds"."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "feathers.py").write_text(BIRDS)
    about = tmp_path / "site" / "feathers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: feathers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[clipkit.datasets]\nbirds = feathers:birds\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(vars(DATASETS), "entries", raising=False)
    yield
    vars(DATASETS).pop("entries", None)
    sys.modules.pop("feathers", None)


BIRDS = """
from PIL import Image
from ranks import on_ranks
from clipkit.zeroshot.datasets import ImageSet

def birds(data_dir, download=False, training=False):
    def get(row):
        return Image.new("RGB", (24, 24), ("red", "brown")[row % 2]), (row % 2,)

    return ImageSet("birds", [["robin"], ["wren"]], ["a photo of a {}, a bird."], 4 if training else 6, get)
"""


@pytest.mark.usefixtures("other_package")
def test_a_data_set_of_another_package(command, chain, tmp_path):
    assert len(open_set("birds", tmp_path, training=True)) == 4
    code, out, err = command("zeroshot", "--model", chain, "--dataset", "birds", "--json")
    assert (code, json.loads(out)["n"], json.loads(out)["dataset"]) == (0, 6, "birds"), err
    code, out, err = command("pack", "birds", tmp_path / "packed", "--split", "test")
    assert (code, len(Shards(tmp_path / "packed"))) == (0, 6), err
    code, out, _ = command("zeroshot", "--help")
    assert re.search(r"birds +from feathers", out)
    with pytest.raises(UsageError, match="did you mean 'birds'"):
        open_set("bird", tmp_path)


def opened_on_this_rank(folder):
    """Which rank was asked to download, in the order of the opening."""
    from clipkit import distributed
    from clipkit.commands import evaluation

    def open_once(data_dir, download=False, training=False):
        if download:
            time.sleep(0.3)
            (data_dir / f"by-{distributed.rank()}").touch()
        return sorted(path.name for path in data_dir.iterdir())

    vars(DATASETS)["entries"] = {"birds": Entry("", "")}
    with mock.patch.object(Entry, "load", return_value=open_once):
        return distributed.rank_zero_first(lambda: evaluation._opened(["birds"], None, Path(folder), True))


def test_rank_0_downloads_before_the_others_open(tmp_path):
    assert on_ranks(2, opened_on_this_rank, str(tmp_path)) == [[["by-0"]], [["by-0"]]]


def failure_on_this_rank():
    from clipkit import distributed

    def work():
        raise DataError(f"failed on {distributed.rank()}")

    try:
        distributed.rank_zero_first(work)
    except ClipkitError as error:
        return f"{type(error).__name__}: {error}"


def test_a_failure_of_rank_0_ends_the_others_with_its_message():
    assert on_ranks(2, failure_on_this_rank) == ["DataError: failed on 0", "UsageError: failed on 0"]


def test_every_name_opens_a_data_set_of_its_own():
    assert list(DATASETS) == list(described())
    for name in DATASETS:
        assert callable(DATASETS[name])
        assert "openai/CLIP" not in DATASETS.entry(name).help


def test_a_place_without_its_kind_is_understood(folder, packs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(folder)
    (tmp_path / "pack").symlink_to(packs / "heldout")
    for name in ("table.csv", "all.tar.gz"):
        (tmp_path / name).touch()
    for name, meant in {"photos": "folder", "pack": "shards", "table.csv": "csv", "all.tar.gz": "tar"}.items():
        with pytest.raises(
            UsageError, match=f"unknown data set '{name}'; for the .* of this name, give {meant}:{name}"
        ):
            open_set(name, tmp_path)
