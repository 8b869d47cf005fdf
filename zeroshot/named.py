"""Published data sets by name, with the class names and prompt templates of CLIP's authors where they have some.

`data/datasets.json` describes them: the torchvision class that reads one, or the folders of ImageNet and its variants.
An attribute of this module opens one of them: `named.cifar10(data_dir)`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.data.classes import class_name
from clipkit.data.files import File, Files
from clipkit.data.orientation import upright
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.zeroshot.datasets import ImageSet, OpenDataset, labelled_files, packaged
from clipkit.zeroshot.heads import ensembles


@cache
def described() -> dict[str, dict[str, Any]]:
    """Name -> class names, templates, source, and the torchvision class with its arguments or the folders' list."""
    found: dict[str, dict[str, Any]] = packaged("datasets.json")
    return found


def __getattr__(name: str) -> OpenDataset:
    if name not in described():
        raise AttributeError(name)
    return partial(_open, name)


def _open(name: str, data_dir: Path, download: bool = False, training: bool = False) -> ImageSet:
    about = described()[name]
    if training and "training" not in about:
        raise UsageError(f"{name} has no training images that clipkit knows; give their folder as folder:DIR")
    if "folders" in about:
        return _from_imagenet(name, about, data_dir)
    arguments = {**about["arguments"], **(about["training"] if training else {})}
    return _from_torchvision(name, f"{name}:train" if training else name, arguments, data_dir, download)


def _from_imagenet(name: str, about: Mapping[str, Any], data_dir: Path) -> ImageSet:
    """Folders by WordNet id, or by number (ImageNet-V2); of the thousand classes those that are there."""
    names: dict[str, str] = packaged(f"{about['folders']}.json")
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
    classes = sorted(set(ids.values()))
    found, skipped = list[tuple[File, int]](), Counter[str]()
    for directory in sorted(ids):
        inside = Files(place / directory)
        label = classes.index(ids[directory])
        found += [(dataclasses.replace(file, name=f"{directory}/{file.name}"), label) for file in inside]
        skipped += inside.counts()
    return labelled_files(
        name, found, [[names[c]] for c in classes], ensembles()[about["templates"]], classes, True, skipped
    )


def _is_index(directory: str) -> bool:
    return directory.isdecimal() and int(directory) < 1000


def _from_torchvision(name: str, shown: str, arguments: Mapping[str, Any], data_dir: Path, download: bool) -> ImageSet:
    from torchvision import datasets

    about = described()[name]
    kind = getattr(datasets, about["torchvision"])
    try:
        data = kind(str(data_dir), **arguments, download=download)
        classes = [[c] if isinstance(c, str) else list(c) for c in _class_names(about, data)]
    except (ImportError, RuntimeError) as error:
        if "scipy" in str(error).lower():
            raise DataError(f"{name} keeps its labels in MATLAB files; pip install scipy reads them") from None
        how = "download it, or give the folder that holds it"
        if download:
            how = f"the download failed: {str(error).splitlines()[0][:120]}"
        raise DataError(f"{name} is not in {data_dir}; {how}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{name} could not be fetched or read ({error}); put its files in {data_dir} by hand") from None

    def get(i: int) -> tuple[Image.Image, tuple[int, ...]]:
        try:
            image, label = data[i]
        except (OSError, ValueError, SyntaxError, EOFError) as error:  # torchvision decodes files one at a time
            raise SampleError("damaged image", f"{name}, image {i}: {error}") from None
        return upright(image), (int(label),)

    return ImageSet(shown, classes, about["templates"], len(data), get)


def _class_names(about: Mapping[str, Any], data: Any) -> Sequence[str | Sequence[str]]:
    """Class names as words of a prompt: those of datasets.json, or the data set's own."""
    if not isinstance(about["classes"], str):
        listed: Sequence[str | Sequence[str]] = about["classes"]
        return listed
    renamed: dict[str, str] = about.get("renamed", {})
    found = [class_name(renamed.get(c, c)) for c in getattr(data, about["classes"])]
    return [_year_first(name) for name in found] if about.get("year_first") else found


def _year_first(name: str) -> str:
    """A car as people say it: "2012 Audi S4 Sedan"."""
    words = name.split()
    return " ".join([words[-1], *words[:-1]]) if words[-1].isdecimal() else name
