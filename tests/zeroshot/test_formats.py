"""Every named data set, read from small files in its own layout on disk, which these tests write."""

import csv
import hashlib
import json
import struct

import numpy as np
import pytest
from PIL import Image

from clipkit.errors import DataError, SampleError, UsageError
from clipkit.zeroshot import datasets
from clipkit.zeroshot.datasets import open_set
from clipkit.zeroshot.named import described

scipy_io = pytest.importorskip("scipy.io")
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def picture(path, label):
    """An image that shows its label: of the colour with that number, modulo three."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), COLOURS[label % 3]).save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def mnist(root, monkeypatch):
    for split in ("train", "t10k"):
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, 2, 28, 28) + bytes(2 * 784))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 2) + bytes([7, 2]))
    return [7, 2]


def svhn(root, monkeypatch):
    from torchvision.datasets import SVHN

    pixels = np.zeros((32, 32, 3, 3), dtype=np.uint8)
    labels = [1, 10, 5]  # 10 stands for the digit 0
    for i, label in enumerate(labels):
        pixels[:, :, :, i] = COLOURS[label % 10 % 3]
    root.mkdir(exist_ok=True)
    scipy_io.savemat(root / "test_32x32.mat", {"X": pixels, "y": np.array(labels)[:, None]})
    monkeypatch.setitem(SVHN.split_list, "test", ["", "test_32x32.mat", md5(root / "test_32x32.mat")])
    return [1, 0, 5]


def stl10(root, monkeypatch):
    from torchvision.datasets import STL10

    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    labels = [0, 4]
    pixels = np.stack([np.broadcast_to(np.array(COLOURS[n % 3], np.uint8)[:, None, None], (3, 96, 96)) for n in labels])
    (folder / "test_X.bin").write_bytes(pixels.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([1, 5]))  # from 1
    text(folder / "class_names.txt", *described()["stl10"]["classes"])
    monkeypatch.setattr(STL10, "train_list", [])
    files = [["test_X.bin", md5(folder / "test_X.bin")], ["test_y.bin", md5(folder / "test_y.bin")]]
    monkeypatch.setattr(STL10, "test_list", files)
    return labels


def oxford_pets(root, monkeypatch):
    folder = root / "oxford-iiit-pet"
    rows = [("Abyssinian_1", 1), ("american_bulldog_7", 2), ("Abyssinian_2", 1)]
    for name, label in rows:
        picture(folder / "images" / f"{name}.jpg", label - 1)
    text(folder / "annotations" / "test.txt", *(f"{name} {label} 1 1" for name, label in rows))
    return [0, 1, 0], {0: "Abyssinian", 1: "American Bulldog"}


def flowers102(root, monkeypatch):
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    for number, label in ((1, 1), (2, 0), (3, 2)):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", label)
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.array([[2, 1, 3]])})
    scipy_io.savemat(folder / "setid.mat", {"tstid": np.array([[3, 1]]), "trnid": [[2]], "valid": [[2]]})
    names = {"label": "imagelabels.mat", "setid": "setid.mat"}
    files = {**Flowers102._file_dict, **{k: (n, md5(folder / n)) for k, n in names.items()}}
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    return [2, 1], {0: "pink primrose", 1: "hard-leaved pocket orchid", 2: "canterbury bells"}


def food101(root, monkeypatch):
    folder = root / "food-101"
    found = {"apple_pie": ["apple_pie/1"], "baby_back_ribs": ["baby_back_ribs/3", "baby_back_ribs/2"]}
    for label, name in enumerate(sorted(found)):
        for path in found[name]:
            picture(folder / "images" / f"{path}.jpg", label)
    text(folder / "meta" / "test.json", json.dumps(found))
    return [0, 1, 1], {0: "apple pie", 1: "baby back ribs"}


def dtd(root, monkeypatch):
    folder = root / "dtd" / "dtd"
    rows = ["banded/banded_1.jpg", "blotchy/blotchy_9.jpg"]
    for label, row in enumerate(rows):
        picture(folder / "images" / row, label)
    text(folder / "labels" / "test1.txt", *rows)
    return [0, 1], {0: "banded", 1: "blotchy"}


def eurosat(root, monkeypatch):
    for label, name in enumerate(["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"]):
        picture(root / "eurosat" / "2750" / name / f"{name}_1.jpg", label)
    for label, name in enumerate(["PermanentCrop", "Residential", "River", "SeaLake"], 6):
        picture(root / "eurosat" / "2750" / name / f"{name}_1.jpg", label)
    return list(range(10))


def gtsrb(root, monkeypatch):
    folder = root / "gtsrb"
    rows = [("00000.ppm", 16), ("00001.ppm", 1)]
    for name, label in rows:
        picture(folder / "GTSRB" / "Final_Test" / "Images" / name, label)
    with (folder / "GT-final_test.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Filename", "Width", "ClassId"), *((n, 12, c) for n, c in rows)])
    return [16, 1]


def caltech101(root, monkeypatch):
    for label, name in enumerate(["BACKGROUND_Google", "Faces", "airplanes", "crab"], -1):
        picture(root / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg", label)
    return [0, 1, 2], {0: "off-center face", 1: "airplane", 2: "crab"}


def fgvc_aircraft(root, monkeypatch):
    folder = root / "fgvc-aircraft-2013b" / "data"
    text(folder / "variants.txt", "707-320", "Falcon 2000", "F/A-18")
    rows = [("0001", "Falcon 2000", 1), ("0002", "F/A-18", 2)]
    for name, _, label in rows:
        picture(folder / "images" / f"{name}.jpg", label)
    text(folder / "images_variant_test.txt", *(f"{name} {variant}" for name, variant, _ in rows))
    return [1, 2], {0: "707-320", 1: "Falcon 2000", 2: "F A-18"}


def stanford_cars(root, monkeypatch):
    folder = root / "stanford_cars"
    kind = [("class", "O"), ("fname", "O")]
    rows = np.array([(2, "00001.jpg"), (1, "00002.jpg")], dtype=kind)
    for row in rows:
        picture(folder / "cars_test" / row["fname"], row["class"] - 1)
    (folder / "devkit").mkdir()
    scipy_io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})
    names = np.array(["AM General Hummer SUV 2000", "Audi S4 Sedan 2012"], dtype=object)
    scipy_io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return [1, 0], {0: "2000 AM General Hummer SUV", 1: "2012 Audi S4 Sedan"}


def sun397(root, monkeypatch):
    text(root / "SUN397" / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    picture(root / "SUN397" / "a" / "apartment_building" / "outdoor" / "sun_aaa.jpg", 1)
    return [1], {0: "abbey", 1: "apartment building outdoor"}


def wordnet(root, folders, labels):
    for folder, label in zip(folders, labels, strict=True):
        picture(root / folder / "x.jpg", label)
    return labels


def imagenet(root, monkeypatch):
    labels = wordnet(root / "imagenet" / "val", ["n01440764", "n01443537"], [0, 1])
    return labels, {0: "tench", 1: "goldfish"}


def imagenet_v2(root, monkeypatch):
    return wordnet(root / "imagenet-v2", ["0", "1", "10"], [0, 1, 2]), {0: "tench", 1: "goldfish", 2: "brambling"}


def imagenet_r(root, monkeypatch):
    return wordnet(root / "imagenet-r", ["n01443537", "n01484850"], [0, 1]), {0: "goldfish", 1: "great white shark"}


def imagenet_a(root, monkeypatch):
    return wordnet(root / "imagenet-a", ["n01498041"], [0]), {0: "stingray"}


def imagenet_sketch(root, monkeypatch):
    return wordnet(root / "imagenet-sketch", ["n01440764"], [0]), {0: "tench"}


WRITERS = {n.__name__.replace("_", "-"): n for n in [
    mnist, svhn, stl10, oxford_pets, flowers102, food101, dtd, eurosat, gtsrb, caltech101, fgvc_aircraft, stanford_cars,
    sun397, imagenet, imagenet_v2, imagenet_r, imagenet_a, imagenet_sketch,
]}  # fmt: skip


def test_every_name_has_a_format_here():
    assert {*WRITERS, "cifar10", "cifar100", "fashion-mnist"} == set(described())  # those three: test_datasets.py


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_in_its_own_format(name, tmp_path, monkeypatch):
    written = WRITERS[name](tmp_path, monkeypatch)
    labels, names = written if isinstance(written, tuple) else (written, {})
    images = open_set(name, tmp_path)
    shown = [images[i] for i in range(len(images))]
    assert sorted(label for _, (label,) in shown) == sorted(labels)
    for image, (label,) in shown:
        if name != "mnist":  # grey
            assert int(np.asarray(image.convert("RGB"))[5, 5].argmax()) == label % 3
    for label, word in names.items():
        assert images.classes[label] == [word]
    assert all(template.count("{}") == 1 for template in images.templates)
    assert described()[name]["source"]


def test_a_damaged_file_of_a_named_set_is_one_bad_image(tmp_path, monkeypatch):
    food101(tmp_path, monkeypatch)
    (tmp_path / "food-101" / "images" / "apple_pie" / "1.jpg").write_bytes(b"hello")
    images = open_set("food101", tmp_path)
    with pytest.raises(SampleError, match="damaged image: food101, image 0: cannot identify"):
        images[0]
    assert images[1][1] == (1,)


@pytest.mark.parametrize("name", sorted(described()))
def test_without_its_files_a_set_says_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match=f"{name} is not in|pip install scipy") as found:
        open_set(name, tmp_path / "nothing")
    assert "\n" not in str(found.value)


def test_listed_classes_are_as_many_as_the_set_has():
    sizes = {"cifar10": 10, "cifar100": 100, "fashion-mnist": 10, "mnist": 10, "svhn": 10, "stl10": 10, "eurosat": 10}
    for name, count in {**sizes, "gtsrb": 43}.items():
        assert len(described()[name]["classes"]) == count
    names = datasets.packaged("imagenet.json")
    assert (len(names), len(set(names.values()))) == (1000, 998)  # "missile" and "sunglasses" are two classes each


def test_a_csv(tmp_path):
    for i in range(2):
        picture(tmp_path / "pictures" / f"{i}.png", i)
    text(tmp_path / "a.csv", "image,label", "pictures/0.png,red_thing", "pictures/1.png,green")
    images = open_set(f"csv:{tmp_path / 'a.csv'}", tmp_path)
    assert (images.classes, images.multilabel) == ([["green"], ["red thing"]], False)
    assert [images[i][1] for i in range(2)] == [(1,), (0,)]
    text(tmp_path / "b.csv", "image,label", "pictures/0.png,red|thing", "pictures/1.png,thing", "pictures/2.png,red")
    several = open_set(f"csv:{tmp_path / 'b.csv'}", tmp_path)
    assert several.multilabel
    assert several[0][1] == (0, 1)
    with pytest.raises(SampleError, match=r"image missing: .*b\.csv, row 4: "):
        several[2]
    text(tmp_path / "c.csv", "file,label", "x,y")
    with pytest.raises(DataError, match="has the columns file, label; it needs image,label"):
        open_set(f"csv:{tmp_path / 'c.csv'}", tmp_path)


def test_a_webdataset_of_the_hub(tmp_path):
    import tarfile

    picture(tmp_path / "a.png", 1)
    (tmp_path / "a.cls").write_text("1")
    (tmp_path / "wds" / "test").mkdir(parents=True)
    with tarfile.open(tmp_path / "wds" / "test" / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "s1.png")
        archive.add(tmp_path / "a.cls", "s1.cls")
    text(tmp_path / "wds" / "classnames.txt", "red", "green")
    text(tmp_path / "wds" / "zeroshot_classification_templates.txt", "a photo of a {c}.")
    images = open_set(f"wds:{tmp_path / 'wds'}", tmp_path)
    assert (images.classes, images.templates, len(images)) == ([["red"], ["green"]], ["a photo of a {}."], 1)
    assert images[0][1] == (1,)
    text(tmp_path / "wds" / "classnames.txt", "red")
    with pytest.raises(DataError, match=r"has label 1; classnames\.txt has 1 names"):
        open_set(f"wds:{tmp_path / 'wds'}", tmp_path)
    with pytest.raises(DataError, match=r"holds no \.tar"):
        open_set(f"wds:{tmp_path / 'none'}", tmp_path)


def test_an_unknown_kind():
    with pytest.raises(UsageError, match="KIND one of folder, tar, csv, shards, wds"):
        open_set("zip:x", None)
