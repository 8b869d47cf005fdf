"""Stores of a pack's files: a folder, or a URL from which whole files are downloaded, resumed, checked and cached.

http and https are implemented here: interrupted downloads resume by Range requests, and stalled servers time out.
Every other URL (s3://, gs://, hf:// ...) goes through fsspec. No program is run: `pipe:` URLs are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clipkit.errors import ShardError, UsageError
from clipkit.io import sha256

ATTEMPTS = 3
"""Attempts in a row without progress after which a file is given up."""
STALL_SECONDS = 6.0
"""A connection that delivers less than `STALL_BYTES` in this time is dropped: 3 attempts take 20 s."""
STALL_BYTES = 16 << 10
_PROGRESS = 1 << 20
_CHUNK = 256 << 10


class NotFoundError(ShardError):
    """There is no file behind a URL."""


class Store(Protocol):
    """A folder of files, local or remote."""

    @property
    def source(self) -> str:
        """The folder or URL as it was given."""

    @property
    def remote(self) -> bool:
        """Whether files must be fetched."""

    def get(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        """A local file with the content of `name`. Raises ShardError if it is missing or has another size."""


def open_store(source: str | Path, cache: Cache | None = None) -> Store:
    """A folder or the URL of one -> its store. Raises UsageError for a URL that would run a program."""
    text = str(source)
    if text.startswith("pipe:"):
        raise UsageError(f"{text.split(':', 1)[0]}: would run a program; give an http(s) or fsspec URL")
    if "://" in text:
        return _Remote(text.rstrip("/"), cache or Cache())
    return _Folder(text)


@dataclass(frozen=True)
class _Folder:
    source: str
    remote: bool = False

    def get(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        path = Path(self.source) / name
        if not path.is_file():
            raise ShardError(f"shard {path} is missing")
        if size is not None and path.stat().st_size != size:
            raise ShardError(f"shard {path} is damaged: {path.stat().st_size} bytes found, {size} expected")
        return path


@dataclass(frozen=True)
class _Remote:
    source: str
    cache: Cache
    remote: bool = True

    def get(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        return self.cache.get(f"{self.source}/{name}", size, digest)


@dataclass(frozen=True)
class Cache:
    """Fetched files under `folder`, at most `limit` bytes of them; the least recently used are removed first.

    Processes share it: one of them fetches a file while the others wait.
    """

    folder: Path = Path("~/.cache/clipkit")
    limit: int = 100 << 30

    @property
    def root(self) -> Path:
        """`folder`, with XDG_CACHE_HOME for `~/.cache` where it is set."""
        if (home := os.environ.get("XDG_CACHE_HOME")) and self.folder.parts[:2] == ("~", ".cache"):
            return Path(home, *self.folder.parts[2:])
        return self.folder.expanduser()

    def get(self, url: str, size: int | None, digest: str | None) -> Path:
        """The file behind `url`, fetched if need be; without a known size it is fetched every time."""
        place = self.root / hashlib.sha256(url.rpartition("/")[0].encode()).hexdigest()[:16]
        path = place / url.rpartition("/")[2]
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / f".{path.name}.lock"):
            if size is None or not path.is_file() or path.stat().st_size != size:
                self._make_room(size or 0)
                fetch(url, path, size, digest)
            os.utime(path)
        return path

    def _make_room(self, needed: int) -> None:
        root = self.root
        with _locked(root / ".lock"):
            files = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in root.glob("*/*.tar"))
            total = sum(size for _, size, _ in files) + needed
            for _, size, file in files:
                if total <= self.limit:
                    break
                file.unlink(missing_ok=True)  # a process that has it open keeps it
                total -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Failure(Exception):
    """A failed attempt.

    final: another attempt would fail, too. missing: there is no such file. discard: the received bytes are useless.
    """

    def __init__(self, cause: str, final: bool = False, missing: bool = False, discard: bool = False) -> None:
        super().__init__(cause)
        self.final = final or missing
        self.missing = missing
        self.discard = discard


def fetch(url: str, path: Path, size: int | None = None, digest: str | None = None) -> None:
    """Fetch `url` to `path`, which appears only when it is complete, with this size and sha256.

    Partial downloads are resumed, also those of a killed process. Raises NotFoundError for a missing file, ShardError
    naming URL and cause after `ATTEMPTS` attempts in a row without progress.
    """
    part = path.with_name(f".{path.name}.part")
    failed, furthest = 0, 0
    while True:
        try:
            _receive(url, part, size)
            _check(part, size, digest)
            os.replace(part, path)
            return
        except _Failure as failure:
            cause, final = str(failure), failure.final
            if failure.missing:
                raise NotFoundError(f"{url} could not be fetched: {cause}") from None
            if failure.discard:
                part.unlink(missing_ok=True)
        except (OSError, http.client.HTTPException) as error:
            cause, final = f"{type(error).__name__}: {error}", False
        have = part.stat().st_size if part.is_file() else 0
        failed = 1 if have >= furthest + _PROGRESS else failed + 1
        furthest = max(furthest, have)
        if final or failed >= ATTEMPTS:
            raise ShardError(f"{url} could not be fetched: {cause}" + ("" if final else f" ({failed} attempts)"))
        time.sleep(0.5 * failed)


def _check(part: Path, size: int | None, digest: str | None) -> None:
    found = part.stat().st_size
    if size is not None and found < size:
        raise _Failure(f"{found} bytes came, {size} expected")
    if (size is not None and found > size) or (digest is not None and sha256(part) != digest):
        what = f"{found} bytes, {size} expected" if size is not None and found > size else "another sha256 than listed"
        raise _Failure(f"what came is not the file: {what}", discard=True)


def _receive(url: str, part: Path, size: int | None) -> None:
    """Append what is still missing of `url` to `part`."""
    have = part.stat().st_size if part.is_file() and size is not None else 0
    if have and have == size:
        return
    chunks = _http(url, have, size) if url.startswith(("http://", "https://")) else _fsspec(url, have)
    start = next(chunks)
    with part.open("r+b" if start else "wb") as file:
        file.seek(int(start))
        file.truncate()
        for chunk in chunks:
            assert isinstance(chunk, bytes)
            file.write(chunk)


def _http(url: str, have: int, size: int | None) -> Iterator[int | bytes]:
    """First the position from which the server sends, then its bytes."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        final = 400 <= error.code < 500 and error.code not in (408, 416, 425, 429)
        missing = error.code in (403, 404, 410)  # object stores answer 403 for a missing file that may not be listed
        raise _Failure(f"the server answered {error.code} {error.reason}", final, missing) from None
    with response:
        start = have
        if have and response.status != 206:
            start = 0  # the server ignores Range and starts over
        elif have and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            sent = response.headers.get("Content-Range")
            raise _Failure(f"asked for bytes {have}-, the server sent {sent!r}", discard=True)
        length = response.headers.get("Content-Length")
        kind = response.headers.get_content_type()
        if kind == "text/html":
            raise _Failure("the server sent an HTML page", missing=True)
        if size is not None and length is not None and start + int(length) != size:
            raise _Failure(f"the server offers {start + int(length)} bytes, {size} expected", final=True)
        yield start
        yield from _timely(response, None if length is None else int(length))


def _timely(response: http.client.HTTPResponse, length: int | None) -> Iterator[bytes]:
    """The body; a stalled connection is a failure."""
    mark, lately, received = time.monotonic(), 0, 0
    while chunk := response.read1(_CHUNK):
        yield chunk
        received, lately = received + len(chunk), lately + len(chunk)
        if time.monotonic() - mark > STALL_SECONDS:
            if lately < STALL_BYTES:
                raise _Failure(f"only {lately} bytes came in {STALL_SECONDS:g} s")
            mark, lately = time.monotonic(), 0
    if length is not None and received < length:
        raise _Failure(f"the connection closed after {received} of {length} bytes")


def _fsspec(url: str, have: int) -> Iterator[int | bytes]:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            file.seek(have)
            yield have
            while chunk := file.read(_CHUNK):
                yield chunk
    except ImportError as error:
        raise _Failure(f"{url.split(':', 1)[0]}:// needs another package: {error}", final=True) from None
    except (FileNotFoundError, PermissionError, ValueError) as error:
        missing = not isinstance(error, ValueError)
        raise _Failure(f"{type(error).__name__}: {error}", final=True, missing=missing) from None
