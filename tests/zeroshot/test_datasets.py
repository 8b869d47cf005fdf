import gc
import gzip
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipkit.errors import DataError, UsageError
from clipkit.zeroshot.datasets import known, open_set


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
        ("cifar100", DataError, "cifar100 is not in .*; download it with --download"),
        ("fashion-mnist", DataError, "fashion-mnist is not in .*; download it with --download"),
    ],
)
def test_what_is_not_there(tmp_path, name, error, message):
    with pytest.raises(error, match=message) as found:
        open_set(name, tmp_path)
    assert "\n" not in str(found.value)


def test_an_image_that_is_not_one(folder, tmp_path):
    (folder / "boat" / "0.jpg").write_text("hello")
    images = open_set(f"folder:{folder}", tmp_path)
    with pytest.raises(DataError, match="not an image"):
        _ = images[0]


def test_a_folder_without_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="no <class>/<image> files"):
        open_set(f"folder:{tmp_path}", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_its_own_format(name, tmp_path, monkeypatch):
    """The python version's pickles, with checksums of the files that this test makes."""
    from torchvision import datasets

    kind = getattr(datasets, known()[name]["torchvision"])
    pixels = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
    labels = [3, 1, 0, 2]
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    test_list = [write("test", {"data": pixels, key: labels})]
    names = known()[name]["classes"]
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
    assert len(images.classes) == len(known()[name]["classes"])


def test_fashion_mnist_in_its_own_format(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, 2, 28, 28) + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 2) + bytes([9, 4]))
    images = open_set("fashion-mnist", tmp_path)
    assert [images[i][1] for i in range(2)] == [(9,), (4,)]
    assert images.classes[9] == ["ankle boot"]
    assert np.array_equal(np.asarray(images[1][0]), pixels[1])


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
    entry = known()[name]
    assert len(entry["classes"]) == {"cifar10": 10, "cifar100": 100, "fashion-mnist": 10}[name]
    assert all(t.count("{}") == 1 for t in entry["templates"])
    assert entry["source"]
