"""Strict reading of webdataset tars: headers, and the byte ranges of each sample's members.

Python's tarfile silently stops at a damaged header; here every cut or damaged archive is a ShardError.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from clipkit.data.images import SUFFIXES
from clipkit.errors import ShardError

PICKLES = (".pkl", ".pickle", ".pyd", ".pt", ".pth", ".joblib")
IMAGE, TEXT, META = range(3)
"""Columns of `Scan.offsets`, in pairs of offset and size."""
_COLUMNS = ("image", "caption", "metadata")


class StrictTarInfo(tarfile.TarInfo):
    """A header that only the end-of-archive block may end.

    Python's tarfile takes a damaged or missing header after the first member for the end of the archive and silently
    drops the rest; here each of these is a ShardError.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> StrictTarInfo:
        """Parse the next header, with those that extend it. Raises ShardError for anything else but the end block."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise ShardError(f"damaged tar header ({error}) at byte {archive.offset}") from None


def split_key(name: str) -> tuple[str, str]:
    """A member's sample and suffix: the key ends before the first dot of the base name, as webdataset has it.

    "a.b/000.seg.png" -> ("a.b/000", ".seg.png").
    """
    folder, slash, base = str(PurePosixPath(name)).rpartition("/")  # PurePosixPath drops "./"
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}"


@dataclass(frozen=True)
class Scan:
    """The samples of a tar.

    offsets: int64 [samples, 6], offset and size of image, caption and metadata (-1: none). refused: number of members
    that are never read, by reason.
    """

    offsets: npt.NDArray[np.int64]
    refused: Counter[str]

    def incomplete(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Masks [samples] of unusable samples, by reason."""
        image, text, meta = (self.offsets[:, 2 * column] < 0 for column in (IMAGE, TEXT, META))
        return {"no image": image, "no caption": ~image & text & meta}


def scan(shard: Path) -> Scan:
    """Read every header of a tar. Raises ShardError naming the shard when it is cut or damaged.

    As in webdataset, members of one key that are not adjacent are separate samples; they are counted.
    """
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:", tarinfo=StrictTarInfo) as archive:
            found = _samples(archive, size)
            check_end(archive)
    except PermissionError as error:
        raise ShardError(f"shard {shard} cannot be read: {error.strerror}") from None
    except (tarfile.TarError, ShardError, OSError, ValueError) as error:
        raise ShardError(f"{shard} is damaged: {error}; pack or fetch it again") from None
    return found


def _samples(archive: tarfile.TarFile, size: int) -> Scan:
    """The samples of an open archive of `size` bytes. Raises ShardError when it ends inside a member."""
    rows: list[list[int]] = []
    refused: Counter[str] = Counter()
    last_key: str | None = None
    keys: set[str] = set()
    for member in archive:
        if member.offset_data + member.size > size:
            raise ShardError(f"cut inside member {member.name!r}")
        if reason := _refusal(member):
            refused[reason] += 1
            continue
        if member.isdir() or is_hidden(member.name):
            continue
        key, suffix = split_key(member.name)
        if key != last_key:
            refused["members of a key apart"] += key in keys
            rows.append([-1] * 6)
            keys.add(key)
            last_key = key
        if (column := _column(suffix)) is None:
            continue
        if rows[-1][2 * column] >= 0:
            refused[f"second {_COLUMNS[column]} of a key"] += 1
            continue
        rows[-1][2 * column : 2 * column + 2] = [member.offset_data, member.size]
    return Scan(np.array(rows, dtype=np.int64).reshape(-1, 6), +refused)


def check_end(archive: tarfile.TarFile) -> None:
    """Check that only zeros follow the end of an archive whose headers have all been read.

    Raises ShardError with the position. Tars joined by `cat`, or with a zeroed header, would seem to end early.
    """
    assert archive.fileobj is not None
    while chunk := archive.fileobj.read(1 << 20):
        if chunk.count(0) < len(chunk):
            raise ShardError(
                f"data after the end of the archive (byte {archive.offset}); "
                "if it was joined by `cat`, keep the parts as separate shards or join them by `tar --concatenate`"
            )


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or macOS metadata (`._photo.jpg`, `__MACOSX/`)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _refusal(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\x00" in member.name:
        return "unsafe name"
    if member.isdir():
        return None
    if not member.isfile() or member.issparse():
        return "link or device"
    return "pickle" if path.suffix.lower() in PICKLES else None


def _column(suffix: str) -> int | None:
    if suffix.lower() in SUFFIXES:
        return IMAGE
    return {".txt": TEXT, ".json": META}.get(suffix.lower())
