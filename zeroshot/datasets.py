"""Data sets for zero-shot evaluation: named ones, and anyone's folder, tar, CSV, pack or webdataset.

Class names and templates of the named sets are data files, or read from the set itself; in a folder or tar the class is
the directory's name.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from clipkit.errors import DataError, SampleError, ShardError, UsageError, did_you_mean
from clipkit.images import SUFFIXES, decode
from clipkit.shards import Shards, StrictTarInfo
from clipkit.sources import (
    DEFAULT_TEMPLATES,
    RawSample,
    Source,
    class_name,
    draw_captions,
    encode_png,
    image_files,
    images_of,
)
from clipkit.zeroshot.heads import ensembles

KINDS = ("folder", "tar", "csv", "shards", "wds")
"""What may stand before the colon of KIND:PLACE."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images[i]` is (RGB image, its labels), which index `classes`; one label unless `multilabel`."""

    name: str
    classes: Sequence[Sequence[str]]
    templates: Sequence[str]
    _length: int
    _get: Callable[[int], tuple[Image.Image, tuple[int, ...]]]
    multilabel: bool = False

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[Image.Image, tuple[int, ...]]:
        return self._get(i)


@cache
def known() -> dict[str, dict[str, Any]]:
    """The registry: name -> its classes, templates and source, and the torchvision data set that reads it."""
    found: dict[str, dict[str, Any]] = _data("datasets.json")
    return found


def _data(name: str) -> Any:
    return json.loads(files("clipkit.zeroshot").joinpath(f"data/{name}").read_text(encoding="utf-8"))


def open_set(name: str, data_dir: Path, download: bool = False, training: bool = False) -> ImageSet:
    """A data set by its name in the registry, or folder:DIR, tar:FILE, csv:FILE, shards:DIR or wds:DIR.

    Named sets are looked for in `data_dir` and fetched there only with `download`; they are what is tested on, or with
    `training` what is trained on. Raises UsageError for an unknown name or one without training part, DataError (saying
    how to get it) for missing or unreadable data.
    """
    kind, colon, where = name.partition(":")
    if colon and kind in KINDS:
        if kind == "shards":
            return from_shards(name, Shards(where))
        opener = {"folder": _from_folder, "tar": _from_tar, "csv": _from_csv, "wds": _from_webdataset}[kind]
        return opener(name, Path(where))
    if name not in known():
        raise UsageError(
            f"unknown data set {name!r}; {did_you_mean(name, known())} (or KIND:PLACE, KIND one of {', '.join(KINDS)})"
        )
    entry = known()[name]
    if training and "training" not in entry:
        raise UsageError(f"{name} has no training part that clipkit knows; give its files as folder:DIR")
    if "folders" in entry:
        return _from_imagenet(name, entry, data_dir)
    arguments = {**entry["arguments"], **(entry["training"] if training else {})}
    return _from_torchvision(name, f"{name}:train" if training else name, arguments, data_dir, download)


def as_source(images: ImageSet, seed: int) -> Source:
    """A data set to be packed, as PNG, its captions from its own templates. Raises UsageError for a multi-label one."""
    if images.multilabel:
        raise UsageError(f"{images.name} has pictures of several labels; pack it with --csv and captions")

    def samples() -> Iterator[RawSample | SampleError]:
        rng = np.random.default_rng(seed)
        for i in range(len(images)):
            image, (label,) = images[i]
            yield RawSample(encode_png(image), draw_captions(images.classes[label], images.templates, rng), label)

    identity = repr((images.name, len(images), [list(c) for c in images.classes], list(images.templates), seed))
    return Source(samples(), lambda: len(images), identity, [list(c) for c in images.classes], list(images.templates))


def _from_folder(name: str, folder: Path) -> ImageSet:
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}")
    found = images_of(folder)
    return _from_directories(name, folder, [p.relative_to(folder) for p in found], lambda i: found[i].read_bytes())


def _from_tar(name: str, archive: Path) -> ImageSet:
    if not archive.is_file():
        raise DataError(f"no tar at {archive}")
    found = list(image_files(archive))
    return _from_directories(name, archive, [path for path, _ in found], lambda i: found[i][1])


def _from_directories(name: str, source: Path, paths: Sequence[PurePath], read: Callable[[int], bytes]) -> ImageSet:
    classes = sorted({path.parent.name for path in paths})
    if not classes or "" in classes:
        raise DataError(f"{source} holds no <class>/<image> files (JPEG, PNG or WebP)")
    label = {directory: i for i, directory in enumerate(classes)}

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        return _decode(read(i), f"{name}, {paths[i]}"), (label[paths[i].parent.name],)

    return ImageSet(name, [[class_name(c)] for c in classes], DEFAULT_TEMPLATES, len(paths), get)


def _from_csv(name: str, table: Path) -> ImageSet:
    """A CSV with the columns image and label, paths counted from its folder; labels joined by | make it multi-label."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not {"image", "label"} <= set(reader.fieldnames):
                raise DataError(f"{table} has the columns {reader.fieldnames}; image and label are needed")
            rows = [(table.parent / r["image"], [x for x in (r["label"] or "").split("|") if x]) for r in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not a readable CSV: {error}") from None
    classes = sorted({label for _, labels in rows for label in labels})
    place = {c: i for i, c in enumerate(classes)}
    multilabel = any(len(labels) != 1 for _, labels in rows)
    if not classes:
        raise DataError(f"{table} has no labelled row")

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        path, labels = rows[i]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{table}, row {i + 1}: cannot read {path}: {error.strerror or error}") from None
        return _decode(data, f"{table}, row {i + 1}"), tuple(place[x] for x in labels)

    return ImageSet(name, [[class_name(c)] for c in classes], DEFAULT_TEMPLATES, len(rows), get, multilabel)


def from_shards(name: str, shards: Shards) -> ImageSet:
    """A pack as a data set, with its own classes and templates. Raises DataError if it was packed without classes."""
    if not shards.classes:
        raise DataError(f"{shards.source} was packed without classes; zero-shot needs a classed pack")

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        sample = shards.read(i)
        if sample.label is None:
            raise DataError(f"{shards.source}: sample {i} has no label")
        return _decode(sample.image, f"{name}, image {i}"), (sample.label,)

    return ImageSet(name, shards.classes, shards.templates or DEFAULT_TEMPLATES, len(shards), get)


def _from_webdataset(name: str, folder: Path) -> ImageSet:
    """CLIP_benchmark's layout on the hub: tars of <key>.<image> and <key>.cls, classnames.txt and templates beside."""
    tars = sorted(folder.rglob("*.tar"))
    if not tars:
        raise DataError(f"{folder} holds no .tar; fetch the data set with `hf download --repo-type dataset`")
    classes = _lines_of(folder, "classnames.txt")
    lines = _lines_of(folder, "zeroshot_classification_templates.txt", optional=True)
    templates = [line.replace("{c}", "{}") for line in lines]
    found = [pair for path in tars for pair in _pairs(path)]
    if bad := [label for _, label in found if not 0 <= label < len(classes)]:
        raise DataError(f"{folder} has label {bad[0]}; classnames.txt has {len(classes)} names")

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        data, label = found[i]
        return _decode(data, f"{name}, image {i}"), (label,)

    return ImageSet(name, [[c] for c in classes], templates or DEFAULT_TEMPLATES, len(found), get)


def _pairs(path: Path) -> Iterator[tuple[bytes, int]]:
    parts: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)) is not None:
                    key, _, kind = member.name.partition(".")
                    parts.setdefault(key, {})[kind.lower()] = file.read()
        for key, sample in parts.items():
            image = next((data for kind, data in sample.items() if f".{kind}" in SUFFIXES), None)
            if image is None or "cls" not in sample:
                raise DataError(f"{path}: sample {key!r} has no image (JPEG, PNG or WebP), or no .cls")
            yield image, int(sample["cls"])
    except (tarfile.TarError, ShardError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def _lines_of(folder: Path, name: str, optional: bool = False) -> list[str]:
    path = next((p for p in (folder / name, folder.parent / name) if p.is_file()), None)
    if path is None:
        if optional:
            return []
        raise DataError(f"{folder} has no {name}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _from_imagenet(name: str, entry: Mapping[str, Any], data_dir: Path) -> ImageSet:
    """Folders by WordNet id, or by number (ImageNet-V2); of the thousand classes those that are there."""
    names: dict[str, str] = _data(f"{entry['folders']}.json")
    wordnet = sorted(names)
    places = [p for p in (data_dir / name / "val", data_dir / name, data_dir) if p.is_dir()]
    for place in places:
        directories = {p.name for p in place.iterdir() if p.is_dir()}
        ids = {d: d if d in names else wordnet[int(d)] for d in directories if d in names or _is_index(d)}
        if ids:
            break
    else:
        how = "unpack it there, into folders by WordNet id (n01440764 ...)"
        raise DataError(f"{name} is not in {data_dir / name}; {how}")
    found = [p for p in images_of(place) if p.parent.name in ids]
    classes = sorted(set(ids.values()))
    label = {directory: classes.index(wnid) for directory, wnid in ids.items()}

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        return _decode(found[i].read_bytes(), str(found[i])), (label[found[i].parent.name],)

    return ImageSet(name, [[names[c]] for c in classes], ensembles()[entry["templates"]], len(found), get)


def _is_index(directory: str) -> bool:
    return directory.isdecimal() and int(directory) < 1000


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        return decode(data)
    except SampleError as error:
        raise DataError(f"{where}: {error}; remove it or replace it") from None


def _from_torchvision(name: str, shown: str, arguments: Mapping[str, Any], data_dir: Path, download: bool) -> ImageSet:
    from torchvision import datasets

    entry = known()[name]
    kind = getattr(datasets, entry["torchvision"])
    try:
        data = kind(str(data_dir), **arguments, download=download)
        classes = [[c] if isinstance(c, str) else list(c) for c in _class_names(entry, data)]
    except (ImportError, RuntimeError) as error:
        if "scipy" in str(error).lower():
            raise DataError(f"{name} keeps its labels in MATLAB files; pip install scipy reads them") from None
        how = f"download it with --download, or put it in {data_dir} with --data-dir"
        if download:
            how = f"the download failed: {str(error).splitlines()[0][:120]}"
        raise DataError(f"{name} is not in {data_dir}; {how}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{name} could not be fetched or read ({error}); put its files in {data_dir} by hand") from None

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        image, label = data[i]
        return image, (int(label),)

    return ImageSet(shown, classes, entry["templates"], len(data), get)


def _class_names(entry: Mapping[str, Any], data: Any) -> Sequence[str | Sequence[str]]:
    """The registry's, or the data set's own where it has them, in the words of a prompt."""
    if not isinstance(entry["classes"], str):
        listed: Sequence[str | Sequence[str]] = entry["classes"]
        return listed
    renamed: dict[str, str] = entry.get("renamed", {})
    found = [class_name(renamed.get(c, c)) for c in getattr(data, entry["classes"])]
    return [_year_first(name) for name in found] if entry.get("year_first") else found


def _year_first(name: str) -> str:
    """A car as people say it: "2012 Audi S4 Sedan"."""
    words = name.split()
    return " ".join([words[-1], *words[:-1]]) if words[-1].isdecimal() else name
