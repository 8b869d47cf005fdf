"""Data sets for zero-shot evaluation: named ones through torchvision, and anyone's folder, tar or pack.

Class names and templates of the named sets are data files; a folder's or tar's class is the directory's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.errors import DataError, SampleError, UsageError, did_you_mean
from clipkit.images import decode
from clipkit.shards import Shards
from clipkit.sources import DEFAULT_TEMPLATES, image_files


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images[i]` is (RGB image, label), labels index `classes`."""

    name: str
    classes: Sequence[Sequence[str]]
    templates: Sequence[str]
    _length: int
    _get: Callable[[int], tuple[Image.Image, int]]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self._get(i)


@cache
def known() -> dict[str, dict[str, Any]]:
    """The registry: name -> {"torchvision", "arguments", "classes", "templates", "source"}."""
    text = files("clipkit.zeroshot").joinpath("data/datasets.json").read_text(encoding="utf-8")
    registry: dict[str, dict[str, Any]] = json.loads(text)
    return registry


def open_set(name: str, data_dir: Path, download: bool = False) -> ImageSet:
    """A data set by its name in the registry, or `folder:DIR`, `tar:FILE`, `shards:DIR`.

    Named sets are looked for in `data_dir` and fetched there only with `download`.
    Raises UsageError for an unknown name, DataError (saying how to get it) for missing or unreadable data.
    """
    kind, colon, where = name.partition(":")
    if colon and kind in ("folder", "tar"):
        return _from_files(name, Path(where), kind)
    if colon and kind == "shards":
        return from_shards(name, Shards(where))
    if name not in known():
        raise UsageError(
            f"unknown data set {name!r}; {did_you_mean(name, known())} (or folder:DIR, tar:FILE, shards:DIR)"
        )
    return _from_torchvision(name, known()[name], data_dir, download)


def _from_files(name: str, source: Path, kind: str) -> ImageSet:
    if not (source.is_dir() if kind == "folder" else source.is_file()):
        raise DataError(f"no {kind} at {source}")
    found = [(path.parent.name, data) for path, data in image_files(source)]
    classes = sorted({directory for directory, _ in found})
    if not found or "" in classes:
        raise DataError(f"{source} holds no <class>/<image> files (JPEG, PNG or WebP)")
    label = {directory: i for i, directory in enumerate(classes)}
    names = [[c.replace("_", " ")] for c in classes]

    def get(i: int) -> tuple[Image.Image, int]:
        return _decode(found[i][1], f"{name}, image {i}"), label[found[i][0]]

    return ImageSet(name, names, DEFAULT_TEMPLATES, len(found), get)


def from_shards(name: str, shards: Shards) -> ImageSet:
    """A pack as a data set, with its own classes and templates. Raises DataError if it was packed without classes."""
    if not shards.classes:
        raise DataError(f"{shards.source} was packed without classes; zero-shot needs a classed pack")

    def get(i: int) -> tuple[Image.Image, int]:
        sample = shards.read(i)
        if sample.label is None:
            raise DataError(f"{shards.source}: sample {i} has no label")
        return _decode(sample.image, f"{name}, image {i}"), sample.label

    return ImageSet(name, shards.classes, shards.templates or DEFAULT_TEMPLATES, len(shards), get)


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        return decode(data)
    except SampleError as error:
        raise DataError(f"{where}: {error}; remove it or replace it") from None


def _from_torchvision(name: str, entry: dict[str, Any], data_dir: Path, download: bool) -> ImageSet:
    from torchvision import datasets

    kind = getattr(datasets, entry["torchvision"])
    try:
        data = kind(str(data_dir), **entry["arguments"], download=download)
    except RuntimeError as error:
        how = f"download it with --download, or put it in {data_dir} with --data-dir"
        if download:
            how = f"the download failed: {str(error).splitlines()[0][:120]}"
        raise DataError(f"{name} is not in {data_dir}; {how}") from None
    except OSError as error:
        raise DataError(f"{name} could not be fetched or read ({error}); put its files in {data_dir} by hand") from None

    def get(i: int) -> tuple[Image.Image, int]:
        image, label = data[i]
        return image, int(label)

    return ImageSet(name, entry["classes"], entry["templates"], len(data), get)
