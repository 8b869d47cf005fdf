"""Pictures with names in a fixed order, to be embedded: files, folders, packs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from clipkit.data.files import Files, say_counts
from clipkit.data.images import decode
from clipkit.data.manifest import is_pack, tar_files
from clipkit.data.shards import Shards
from clipkit.errors import DataError, SampleError
from clipkit.models.pretrained import Pretrained
from clipkit.zeroshot.embedding import Embedded, Encoder, embed


class Gallery(Protocol):
    """Pictures with names, in a fixed order."""

    @property
    def source(self) -> str:
        """The folder or URL as it was given."""

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """Hash of all keys and marks."""

    def key(self, i: int) -> str:
        """The picture's name."""

    def mark(self, i: int) -> str:
        """A mark that changes with the picture: a file's size and time, or the sha256 of a sample's shard."""

    def image(self, i: int) -> bytes:
        """Its bytes, encoded. Raises SampleError or ShardError."""


class Folder:
    """Every image file below a folder; a key is the path in it. Unless `quietly`, stderr counts other files."""

    def __init__(self, folder: Path, quietly: bool = False) -> None:
        found = Files(folder)
        self.source, self._files = str(folder), list(found)
        if not quietly:
            say_counts(folder, found.counts())

    def __len__(self) -> int:
        return len(self._files)

    def identity(self) -> str:
        files = [(file.name, file.size, file.time) for file in self._files]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def key(self, i: int) -> str:
        return self._files[i].name

    def mark(self, i: int) -> str:
        return f"{self._files[i].size}-{self._files[i].time}"

    def image(self, i: int) -> bytes:
        return self._files[i].read()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError("unreadable file", error.strerror or str(error)) from None


class Pack:
    """The images of a pack; a key is shard and sample."""

    def __init__(self, source: str) -> None:
        self.source, self.shards = source, Shards(source, verify=False)

    def __len__(self) -> int:
        return len(self.shards)

    def identity(self) -> str:
        digests = [entry["sha256"] for entry in self.shards.entries]
        return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]

    def key(self, i: int) -> str:
        return self.shards.name(i)

    def mark(self, i: int) -> str:
        shard, number = self.shards.locate(i)
        return f"{self.shards.entries[shard]['sha256'][:16]}-{number}"

    def image(self, i: int) -> bytes:
        return self.shards.read(i).image


def open_gallery(source: str, quietly: bool = False) -> Gallery:
    """A folder of images, or a pack (folder or URL). Raises DataError for a folder with neither images nor shards.

    Unless `quietly`, a line on stderr counts the files that are not taken.
    """
    folder = Path(source)
    if is_pack(source):
        return Pack(source)
    if not folder.is_dir():
        raise DataError(f"no folder at {source}")
    gallery = Folder(folder, quietly)
    if not len(gallery):
        if tar_files(folder):  # shards that nobody has indexed yet
            return Pack(source)
        raise DataError(f"{source} holds no images (JPEG, PNG or WebP)")
    return gallery


@dataclass(frozen=True)
class _Picture:
    name: str
    path: Path | None
    """Its file, for one that was named itself."""
    gallery: Gallery | None = None
    row: int = 0


class Pictures:
    """Files, and the pictures of folders and packs, in the order given, each once. Keys are paths."""

    def __init__(self, sources: Sequence[str]) -> None:
        """Raises DataError naming all files that do not exist, and for a folder without images."""
        found: list[_Picture] = []
        for source in sources:
            if "://" in source or Path(source).is_dir():
                found += _all_of(open_gallery(source))
            else:
                found.append(_Picture(source, Path(source)))
        if missing := [p.name for p in found if p.path is not None and not p.path.exists()]:
            raise DataError(f"no picture at {', '.join(missing)}")
        self._pictures = list({picture.name: picture for picture in found}.values())

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, i: int) -> str:
        """The file's path, as it was given."""
        return self._pictures[i].name

    def named(self, i: int) -> bool:
        """Whether it was given by its own path, not by a folder or pack."""
        return self._pictures[i].path is not None

    def image(self, i: int) -> bytes:
        """Its bytes, encoded. Raises SampleError or ShardError."""
        picture = self._pictures[i]
        if picture.path is not None:
            return _read(picture.path)
        assert picture.gallery is not None
        return picture.gallery.image(picture.row)


def _all_of(gallery: Gallery) -> list[_Picture]:
    at = Path(gallery.source) if isinstance(gallery, Folder) else None
    names = (gallery.key(i) if at is None else str(at / gallery.key(i)) for i in range(len(gallery)))
    return [_Picture(name, None, gallery, i) for i, name in enumerate(names)]


def embed_pictures(
    clip: Pretrained, pictures: Gallery | Pictures, rows: Sequence[int], batch_size: int = 64, workers: int = 0
) -> Embedded:
    """Embed these rows on this rank, holding one batch of pixels at a time. Raises ShardError."""
    read = partial(_decoded, pictures)
    return embed(Encoder.of(clip.model), read, rows, batch_size, workers, "pictures", shared=False)


def _decoded(pictures: Gallery | Pictures, row: int) -> tuple[Image.Image, None]:
    return decode(pictures.image(row)), None
