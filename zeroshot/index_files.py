"""Files of an embedding index: its description, and the vectors and labels of its parts."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipkit.data import manifest
from clipkit.errors import CheckpointError
from clipkit.io import read_object, write_atomically

FORMAT = 1
FILE = manifest.EMBEDDINGS
"""Name of an index's description."""
FORMER_FILE = manifest.FORMER
"""Its name in version 0.1."""
FIRST = "part"
"""Series of the parts of an index that was never updated."""
PART_FILE = re.compile(r"(part(?:-[0-9a-f]{8})?)-\d{5}\.(?:json|npy|texts\.npy)")

Array = np.ndarray[Any, np.dtype[np.float16]]
Places = Mapping[tuple[str, str], tuple[Path, int]]
"""(key, mark) of a picture -> a part, and the row of its vector in it."""


def description_of(folder: Path) -> Path | None:
    """The file that describes the index in a folder, or None."""
    former = folder / FORMER_FILE
    if (folder / FILE).is_file():
        return folder / FILE
    return former if former.is_file() and "weights" in read_object(former) else None


def description_file(folder: Path) -> Path:
    """The file that describes the index in a folder. Raises CheckpointError for a pack, and where there is none."""
    if (found := description_of(folder)) is not None:
        return found
    if is_pack(folder):
        raise CheckpointError(f"{folder} is a pack, not an embedding index; `clipkit index {folder} OUT` embeds it")
    raise CheckpointError(f"{folder} is not an embedding index; `clipkit index IMAGES {folder}` makes one")


def is_pack(folder: Path) -> bool:
    """Whether a folder that is no index holds a pack, or shards."""
    return manifest.is_pack(folder) or bool(manifest.tar_files(folder))


def part_file(folder: Path, series: str, number: int, kind: str) -> Path:
    """A file of a part; kind: json, npy or texts.npy."""
    return folder / f"{series}-{number:05d}.{kind}"


@dataclass(frozen=True)
class Labels:
    """Labels of a part: rows in the gallery, keys, marks (none in older versions), and the skipped pictures."""

    rows: list[int]
    keys: list[str]
    marks: list[str]
    skipped: Counter[str]
    unread: list[tuple[str, str]]

    @classmethod
    def read(cls, path: Path) -> Labels:
        """Read the JSON file of a part. Raises CheckpointError for any other file."""
        found = read_object(path)
        try:
            labels = cls(
                [int(row) for row in found["rows"]],
                [str(key) for key in found["keys"]],
                [str(mark) for mark in found.get("marks", ())],
                Counter({str(k): int(n) for k, n in found["skipped"].items()}),
                [(str(key), str(mark)) for key, mark in found.get("unread", ())],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from None
        if len(labels.rows) != len(labels.keys) or len(labels.marks) not in (0, len(labels.keys)):
            raise CheckpointError(f"{path} is damaged: {len(labels.rows)} rows and {len(labels.keys)} keys")
        return labels


def marks_of(folder: Path, series: str) -> dict[str, str]:
    """Marks by key of the pictures in the parts of a series; parts of older versions have no marks."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob(f"{series}-[0-9][0-9][0-9][0-9][0-9].json")):
        labels = Labels.read(path)
        found |= dict(zip(labels.keys, labels.marks or [""] * len(labels.keys), strict=True))
    return found


def places_of(folder: Path) -> Places:
    """Where the vector of each picture is, in the parts of any series, those of interrupted updates included."""
    found: dict[tuple[str, str], tuple[Path, int]] = {}
    for path in sorted(folder.glob("part-*.json")):
        labels = Labels.read(path)
        found |= {place: (path, i) for i, place in enumerate(zip(labels.keys, labels.marks, strict=False))}
    return found


def write_array(path: Path, values: Tensor) -> None:
    """Write a tensor as .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, values.numpy())
    write_atomically(path, buffer.getvalue())


def read_array(path: Path) -> Array:
    """Map a .npy file into memory. Raises CheckpointError for a damaged one."""
    try:
        found: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return found
