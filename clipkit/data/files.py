"""The pictures in a folder or a tar, in a fixed order, and the files beside them that are not taken, by reason."""

from __future__ import annotations

import hashlib
import importlib
import lzma
import os
import posixpath
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO

from clipkit.data.images import OTHER_SUFFIXES, SUFFIXES
from clipkit.data.tar_scan import StrictTarInfo, is_hidden
from clipkit.errors import DataError, SampleError, ShardError
from clipkit.log import remark

Aside = list[tuple[str, str]]
"""(name, reason) of files that are not taken."""
_MOST_LINKS = 40  # as Linux has it
_OPENERS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "lzma",
    b"\x5d\x00\x00\x80": "lzma",
    b"\x28\xb5\x2f\xfd": "compression.zstd",  # of Python 3.14
}


@dataclass(frozen=True, slots=True)
class File:
    """A picture: its path in the source with slashes, size and time, and its bytes, encoded.

    `read` raises SampleError ("unreadable file"). That of a tar's picture works until the next one is asked for.
    """

    name: str
    size: int
    time: int
    read: Callable[[], bytes]


class Files:
    """The pictures of a folder (sorted, links followed) or of a tar of any compression (in its order).

    What is hidden is none, nor what macOS puts beside files: `._photo.jpg`, and all in `__MACOSX`. Whatever else is not
    taken is in `aside`, once the pictures have been listed. Raises DataError for what is neither folder nor tar.
    """

    def __init__(self, source: Path) -> None:
        self.source, self.aside = source, Aside()
        self.is_folder = source.is_dir()
        if not self.is_folder and not source.is_file():
            what = "a pipe or device, which cannot be read twice; save it first" if source.exists() else "not there"
            raise DataError(f"{source} is {what}")
        self._listed = list(_walk(source, self.aside)) if self.is_folder else []

    def __iter__(self) -> Iterator[File]:
        if self.is_folder:
            yield from self._listed
            return
        aside = Aside()
        yield from _members(self.source, aside)
        self.aside = aside

    @cached_property
    def names(self) -> list[str]:
        """The pictures' paths in the source, in their order."""
        return [file.name for file in self]

    @cached_property
    def fingerprint(self) -> str:
        """What changes when a picture is added, removed or replaced: names, sizes and times; of a tar its own."""
        digest = hashlib.sha256()
        if not self.is_folder:
            about = self.source.stat()
            digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
        for file in self._listed:
            digest.update(f"{file.name}\0{file.size} {file.time}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def counts(self) -> Counter[str]:
        """How many files are not taken, by reason."""
        if not self.is_folder:
            _ = self.names
        return Counter(reason for _, reason in self.aside)


def counted(counts: Mapping[str, int]) -> str:
    """ "2 other format, 1 broken link"; "none" where there is nothing."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"


def say_counts(source: object, counts: Mapping[str, int]) -> None:
    """A line on stderr about what is not taken of a source, if there is any."""
    if any(counts.values()):
        remark(f"clipkit: {source}: not taken: {counted(counts)}")


def _refusal(name: str) -> str:
    """Why a file of this name is not taken; empty for a picture."""
    suffix = posixpath.splitext(name)[1].lower()
    return "" if suffix in SUFFIXES else "other format" if suffix in OTHER_SUFFIXES else "not a picture"


def _walk(folder: Path, aside: Aside) -> Iterator[File]:
    about = folder.stat()
    with os.scandir(folder) as found:  # what cannot be listed at all is an error, not a count
        entries = sorted(found, key=lambda e: e.name)
    yield from _descend(entries, "", ((about.st_dev, about.st_ino),), aside)


def _descend(
    entries: Sequence[os.DirEntry[str]], prefix: str, above: tuple[tuple[int, int], ...], aside: Aside
) -> Iterator[File]:
    """Files among `entries` and below; `above` are the folders on the way here, which a link must not lead back to."""
    for entry in entries:
        if is_hidden(entry.name):
            continue
        name = prefix + entry.name
        try:
            about = entry.stat()
            if stat.S_ISDIR(about.st_mode):
                with os.scandir(entry.path) as found:
                    below = sorted(found, key=lambda e: e.name)
        except OSError as error:
            broken = entry.is_symlink() and not isinstance(error, PermissionError)
            aside.append((name, "broken link" if broken else "unreadable file"))
            continue
        if not stat.S_ISDIR(about.st_mode):
            if reason := _refusal(name) or ("" if stat.S_ISREG(about.st_mode) else "unreadable file"):
                aside.append((name, reason))
            else:
                yield File(name, about.st_size, about.st_mtime_ns, partial(_read, entry.path))
        elif (about.st_dev, about.st_ino) in above:
            aside.append((name, "link in a circle"))
        elif below:
            yield from _descend(below, f"{name}/", (*above, (about.st_dev, about.st_ino)), aside)
        elif not _refusal(name):  # an empty folder, called like a picture
            aside.append((name, "unreadable file"))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SampleError("unreadable file", f"{path}: {error.strerror or error}") from None


def members(source: Path) -> Iterator[tuple[str, tarfile.TarInfo, Callable[[], bytes]]]:
    """(normalised name, header, bytes) of every member of a tar of any compression, or of several: `cat a.tar b.tar`.

    Raises DataError for what is no tar, is cut or damaged.
    """
    with _damage(source), _opened(source) as stream:
        while True:
            archive = tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictTarInfo)  # noqa: SIM115
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
                yield posixpath.normpath(member.name.lstrip("/")), member, partial(_extract, source, archive, member)
            stream.seek(archive.offset)
            if not _to_data(stream):
                return


@contextmanager
def _damage(source: Path) -> Iterator[None]:
    """Whatever the readers of tars and their compressions raise is a DataError."""
    try:
        yield
    except ImportError:
        raise DataError(f"{source} is compressed with zstd, which Python reads from 3.14 on; unpack it") from None
    except (tarfile.TarError, ShardError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.filename is not None:  # the tar itself cannot be opened
            raise
        raise DataError(f"{source} is neither a folder nor a readable tar: {error}") from None


def _opened(source: Path) -> IO[bytes]:
    with source.open("rb") as file:
        start = file.read(6)
    module = next((m for magic, m in _OPENERS.items() if start.startswith(magic)), None)
    if module is None:
        return source.open("rb")
    stream: IO[bytes] = importlib.import_module(module).open(source, "rb")
    return stream


def _to_data(stream: IO[bytes]) -> bool:
    """Pass over the zeros that end a tar; whether something lies behind them."""
    while block := stream.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            stream.seek(stream.tell() - len(block))
            return True
    return False


def _extract(source: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _damage(source):
        file = archive.extractfile(member)
        return b"" if file is None else file.read()


def _members(source: Path, aside: Aside) -> Iterator[File]:
    """Pictures of a tar; those that are links to others in it come last."""
    links: dict[str, str] = {}
    for name, member, read in members(source):
        if member.isdir():
            continue
        if name.startswith("../"):
            aside.append((name, "unsafe name"))
        elif is_hidden(name):
            continue
        elif member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            links[name] = posixpath.normpath(member.linkname.lstrip("/"))
        elif reason := _refusal(name) or ("" if member.isfile() else "unreadable file"):
            aside.append((name, reason))
        else:
            yield File(name, member.size, int(member.mtime), read)
    if links:
        yield from _linked(source, links, aside)


def _resolved(target: str, links: Mapping[str, str]) -> str:
    """Where a path in a tar leads, by way of links and linked folders; a circle ends somewhere in it."""
    for _ in range(_MOST_LINKS):
        parts = target.split("/")
        above = next((p for n in range(1, len(parts) + 1) if (p := "/".join(parts[:n])) in links), None)
        if above is None:
            break
        target = posixpath.normpath(links[above] + target[len(above) :])
    return target


def _inside_linked_folders(links: dict[str, str]) -> None:
    """Links in a folder are also in the folders that are links to it."""
    below: dict[str, list[str]] = {}
    for link in links:
        parts = link.split("/")
        for n in range(1, len(parts)):
            below.setdefault("/".join(parts[:n]), []).append(link)
    for folder, target in list(links.items()):
        for link in below.get(_resolved(target, links), ()):
            links.setdefault(folder + link[len(_resolved(target, links)) :], links[link])


def _linked(source: Path, links: Mapping[str, str], aside: Aside) -> Iterator[File]:
    """What links in a tar lead to, under the links' names: files, and whole folders."""
    wanted: dict[str, list[str]] = {}
    links = dict(links)
    _inside_linked_folders(links)
    for link, target in links.items():
        wanted.setdefault(_resolved(target, links), []).append(link)
    broken = set(links)
    for name, member, read in members(source):
        if not member.isfile():
            continue
        parts = name.split("/")
        for target in ("/".join(parts[:n]) for n in range(1, len(parts) + 1)):
            for link in wanted.get(target, ()):
                broken.discard(link)
                alias = link + name[len(target) :]
                if is_hidden(alias):
                    continue
                if reason := _refusal(alias):
                    aside.append((alias, reason))
                else:
                    yield File(alias, member.size, int(member.mtime), read)
    aside.extend((link, "broken link") for link in links if link in broken)
