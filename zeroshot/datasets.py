"""Labelled images for zero-shot evaluation and linear probes: a folder, tar, CSV, pack, webdataset or named data set.

Named data sets are the entries of `clipkit.registry.DATASETS`. In a folder or tar the class is the directory's name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clipkit._renamed import former_name
from clipkit.data.classes import Names, are_consecutive, checked_templates, class_name, fit_names, in_order, say_alike
from clipkit.data.files import File, Files, members
from clipkit.data.images import SUFFIXES, decode
from clipkit.data.manifest import tar_files
from clipkit.data.shards import Shards
from clipkit.data.sources import DEFAULT_TEMPLATES, RawSample, Source, class_layout, draw_captions, encode_png
from clipkit.data.tables import decoded, read_table
from clipkit.data.tar_scan import is_hidden, split_key
from clipkit.errors import DataError, SampleError, UsageError, did_you_mean, shown
from clipkit.registry import DATASETS

KINDS = DATASETS.reserved
"""Kinds of KIND:PLACE."""


def __getattr__(name: str) -> Any:  # PEP 562: names of version 0.1
    return former_name(__name__, name)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images[i]` is (RGB image, its labels), which index `classes`; one label unless `multilabel`.

    get: row -> image and labels; raises SampleError for an image that cannot be read. keys: the classes' folders, where
    these are not their first names. ordered: whether a list of names made elsewhere has this order. skipped: counts of
    files that are not taken, by reason.
    """

    name: str
    classes: Sequence[Sequence[str]]
    templates: Sequence[str]
    length: int
    get: Callable[[int], tuple[Image.Image, tuple[int, ...]]]
    multilabel: bool = False
    keys: Sequence[str] = ()
    ordered: bool = True
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Image.Image, tuple[int, ...]]:
        return self.get(i)

    def only(self, rows: Sequence[int]) -> ImageSet:
        """The set of these images alone."""
        return dataclasses.replace(self, length=len(rows), get=lambda i: self.get(rows[i]))

    def renamed(self, names: Mapping[str, Names] | Sequence[Names], what: str) -> ImageSet:
        """The set with other class names. Raises UsageError as `fit_names` does; `what` is the names' source."""
        first = [c[0] for c in self.classes]
        classes = fit_names(names, self.keys or first, first, self.ordered, what)
        return dataclasses.replace(self, classes=classes)


def packaged(name: str) -> Any:
    """A JSON file of zeroshot/data."""
    return json.loads(files("clipkit.zeroshot").joinpath(f"data/{name}").read_text(encoding="utf-8"))


class OpenDataset(Protocol):
    """Opens a named data set: an entry of `registry.DATASETS`, clipkit's own or another package's."""

    def __call__(self, data_dir: Path, download: bool = False, training: bool = False) -> ImageSet:
        """The test images below `data_dir`, or the training images; fetched there if `download`.

        Raises DataError for missing or unreadable data, UsageError where there are no training images.
        """
        ...


def open_set(
    name: str, data_dir: Path, download: bool = False, training: bool = False, folders: Collection[str] = ()
) -> ImageSet:
    """A data set by its name in `registry.DATASETS`, or folder:DIR, tar:FILE, csv:FILE, shards:DIR or wds:DIR.

    Named sets are looked for in `data_dir` and fetched there only with `download`: their test images, or with
    `training` their training images. `folders` are those of classes, where a layout leaves that open. Raises UsageError
    for an unknown name or a set without training images, DataError for missing or unreadable data.
    """
    kind, colon, where = name.partition(":")
    if colon and kind in KINDS:
        if kind == "shards":
            return from_shards(name, Shards(where))
        if kind in ("folder", "tar"):
            return _from_files(name, Path(where), kind, folders)
        return (_from_csv if kind == "csv" else _from_webdataset)(name, Path(where))
    if name not in DATASETS:
        raise UsageError(f"unknown data set {shown(name)!r}; {_suggestion(name)}")
    return DATASETS[name](data_dir, download, training)


def _suggestion(name: str) -> str:
    """Advice on a name that is no data set: the kind of an existing place, or a similar name."""
    place = Path(name)
    with suppress(OSError, ValueError):
        if place.is_dir():
            return f"for the folder of this name, give {'shards' if tar_files(place) else 'folder'}:{name}"
        if place.is_file():
            return f"for the file of this name, give {'csv' if place.suffix in ('.csv', '.tsv') else 'tar'}:{name}"
    kind, colon, rest = name.partition(":")
    if colon and (close := get_close_matches(kind, KINDS, n=1)):
        return f"did you mean {close[0] + colon + rest!r}?"
    return f"{did_you_mean(name, DATASETS)} (or KIND:PLACE, KIND one of {', '.join(KINDS)})"


def as_source(images: ImageSet, seed: int) -> Source:
    """A data set to be packed, as PNG, its captions from its own templates. Raises UsageError for a multi-label one."""
    if images.multilabel:
        raise UsageError(f"{images.name} has pictures of several labels; pack it from a table of images and captions")

    def samples() -> Iterator[RawSample | SampleError]:
        rng = np.random.default_rng(seed)
        for i in range(len(images)):
            try:
                image, (label,) = images[i]
            except SampleError as error:
                yield error
                continue
            yield RawSample(encode_png(image), draw_captions(images.classes[label], images.templates, rng), label)

    identity = repr((images.name, len(images), [list(c) for c in images.classes], list(images.templates), seed))
    classes, templates = [list(c) for c in images.classes], list(images.templates)
    return Source(samples(), lambda: len(images), identity, classes, templates, lambda: images.skipped)


def dataset_source(source: str | Path, split: str, seed: int, data_dir: Path, download: bool) -> Source:
    """A split, "train" or "test", of a data set that `open_set` knows, to be packed.

    Raises UsageError for another split, and as `as_source` does.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split is {split!r}; {source} has train and test")
    return as_source(open_set(str(source), data_dir, download, training=split == "train"), seed)


def _from_files(name: str, source: Path, kind: str, folders: Collection[str]) -> ImageSet:
    if not (source.is_dir() if kind == "folder" else source.is_file()):
        raise DataError(f"no {kind} at {source}")
    found = Files(source)
    layout = class_layout(found, folders)
    keys, skipped, kept = list(layout.classes), found.counts(), list[tuple[File, int]]()
    for file in found:
        if (label := layout.label_of(file.name)) is None:
            skipped["unknown class"] += 1
        else:
            kept.append((file if found.is_folder else _held(file), label))
    ordered = are_consecutive(keys) or set(keys) == packaged("imagenet.json").keys()
    return labelled_files(name, kept, [[class_name(k)] for k in keys], DEFAULT_TEMPLATES, keys, ordered, skipped)


def _held(file: File) -> File:
    """A file of a tar, kept in memory."""
    return dataclasses.replace(file, read=functools.partial(bytes, file.read()))


def labelled_files(
    name: str,
    found: Sequence[tuple[File, int]],
    classes: list[Names],
    templates: Sequence[str],
    keys: Sequence[str],
    ordered: bool,
    skipped: Mapping[str, int],
) -> ImageSet:
    """A data set of encoded files with one label each; the other arguments are those of `ImageSet`."""

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        file, label = found[i]
        return _decode(file.read(), f"{name}, {file.name}"), (label,)

    return ImageSet(name, classes, templates, len(found), get, keys=keys, ordered=ordered, skipped=skipped)


def _from_csv(name: str, table: Path) -> ImageSet:
    """A table with the columns image and label, paths counted from its folder; labels joined by | make it multi-label.

    Of a table in a pipe, paths are counted from the current folder.
    """
    beside, skipped = table.parent if table.is_file() else Path(), Counter[str]()
    rows: list[tuple[int, Path, list[str]]] = []
    for row in read_table(table, ("image", "label")):
        labels = [*dict.fromkeys(filter(None, map(class_name, row.values["label"].split("|"))))]
        if not labels or not row.values["image"]:
            skipped["no image" if labels else "no label"] += 1
        else:
            rows.append((row.number, beside / row.values["image"], labels))
    if not rows:
        raise DataError(f"{table} has no labelled row")
    classes = in_order(label for _, _, labels in rows for label in labels)
    place = {c: i for i, c in enumerate(classes)}
    say_alike(table, classes)

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        number, path, labels = rows[i]
        try:
            data = path.read_bytes()
        except OSError as error:
            reason = "image missing" if isinstance(error, FileNotFoundError) else "unreadable file"
            raise SampleError(reason, f"{table}, row {number}: {path}: {error.strerror or error}") from None
        return _decode(data, f"{table}, row {number}"), tuple(place[x] for x in labels)

    return ImageSet(
        name,
        [[c] for c in classes],
        DEFAULT_TEMPLATES,
        len(rows),
        get,
        multilabel=any(len(labels) > 1 for _, _, labels in rows),
        ordered=are_consecutive(classes),
        skipped=skipped,
    )


def from_shards(name: str, shards: Shards) -> ImageSet:
    """A pack as a data set, with its own classes and templates. Raises DataError if it was packed without classes."""
    if not shards.classes:
        raise DataError(f"{shards.source} was packed without classes; zero-shot needs a classed pack")
    classes, templates = shards.classes, checked_templates(shards.templates or DEFAULT_TEMPLATES, shards.source)

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        sample = shards.read(i)
        if sample.label is None:
            raise SampleError("no label", shards.name(i))
        if sample.label >= len(classes):
            raise SampleError("unknown class", f"{shards.name(i)}: {sample.label}")
        return _decode(sample.image, shards.name(i)), (sample.label,)

    return ImageSet(name, classes, templates, len(shards), get)


def _from_webdataset(name: str, folder: Path) -> ImageSet:
    """CLIP_benchmark's layout on the hub: tars of <key>.<image> and <key>.cls, classnames.txt and templates beside."""
    tars = tar_files(folder, "**/*.tar")
    if not tars:
        raise DataError(f"{folder} holds no .tar; fetch the data set with `hf download --repo-type dataset`")
    classes = _lines_of(folder, "classnames.txt")
    listed = "zeroshot_classification_templates.txt"
    templates = checked_templates(_lines_of(folder, listed, optional=True), f"{folder}, {listed}")
    found: list[tuple[str, bytes, int]] = []
    skipped = Counter[str]()
    for path in tars:
        for key, parts in _samples(path).items():
            try:
                found.append((f"{path}, {key}", *_pair(parts)))
            except SampleError as error:
                skipped[error.reason] += 1
    if bad := [label for _, _, label in found if label >= len(classes)]:
        raise DataError(f"{folder} has label {bad[0]}; classnames.txt has {len(classes)} names")

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        where, data, label = found[i]
        return _decode(data, where), (label,)

    names = [[c] for c in classes]
    return ImageSet(name, names, templates or DEFAULT_TEMPLATES, len(found), get, skipped=skipped)


def _samples(path: Path) -> dict[str, dict[str, bytes]]:
    """Images and labels in a tar, by key and suffix; other members are none of ours."""
    found: dict[str, dict[str, bytes]] = {}
    for name, member, read in members(path):
        if member.isfile() and not is_hidden(name):
            key, suffix = split_key(name)
            parts = found.setdefault(key, {})
            if suffix.lower() in (*SUFFIXES, ".cls"):
                parts[suffix.lower()] = read()
    return found


def _pair(parts: Mapping[str, bytes]) -> tuple[bytes, int]:
    image = next((data for suffix, data in parts.items() if suffix in SUFFIXES), None)
    if image is None:
        raise SampleError("no image")
    try:
        label = int(parts[".cls"])
    except (KeyError, ValueError):
        label = -1
    if label < 0:
        raise SampleError("no label")
    return image, label


def _lines_of(folder: Path, name: str, optional: bool = False) -> list[str]:
    path = next((p for p in (folder / name, folder.parent / name) if p.is_file()), None)
    if path is None:
        if optional:
            return []
        raise DataError(f"{folder} has no {name}")
    return [line.strip() for line in decoded(path).splitlines() if line.strip()]


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        return decode(data)
    except SampleError as error:
        detail = str(error).removeprefix(f"{error.reason}: ")
        raise SampleError(error.reason, f"{where}: {detail}") from None
