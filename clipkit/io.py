"""Files and JSON: atomic writing, checksums, strict reading."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipkit.errors import CheckpointError, shown


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a failure leaves the former file, and no temporary one.

    Lone surrogates in a text (bytes of a file name that are not UTF-8) are escaped; JSON reads them back unchanged.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content)
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder whose content is moved into `folder` at the end; a failure leaves nothing.

    Files and folders of the same names, if any, are replaced.
    """
    place = next(there for there in (folder, *folder.absolute().parents) if there.is_dir())
    with tempfile.TemporaryDirectory(prefix=".clipkit-", dir=place) as aside:
        yield Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(aside).iterdir()):
            if (folder / path.name).is_dir():
                os.replace(folder / path.name, path.with_name(f".former-{path.name}"))
            os.replace(path, folder / path.name)


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises CheckpointError when it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must be a JSON object; it is a {type(found).__name__}")
    return found


def only_known(
    given: object,
    where: str,
    used: Mapping[str, Any],
    fixed: Mapping[str, Sequence[Any]] | None = None,
    free: Collection[str] = (),
) -> dict[str, Any]:
    """Read a section of another library's configuration strictly -> the values of `used`.

    `used` are the keys that are read, with that library's defaults; `fixed` those that change the computation, with the
    values that clipkit implements; `free` those without effect. Raises CheckpointError naming a key that is none of
    these, or has another value or type.
    """
    fixed, prefix = fixed or {}, f"{where}." if where else ""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} is {shown(repr(given))}; it must be a JSON object")
    found = dict(used)
    for key, value in given.items():
        what = f"{prefix}{shown(key)} = {shown(repr(value))}"
        if key in used:
            if not _alike(value, used[key]):
                raise CheckpointError(f"{what} must be of the type of {used[key]!r}")
            found[key] = value
        elif key in fixed and value not in fixed[key]:
            raise CheckpointError(f"{what} asks for an architecture that clipkit does not have")
        elif key not in fixed and key not in free and value is not None:
            raise CheckpointError(f"{what} is unknown to clipkit, and may change what the model computes")
    return found


def _alike(value: Any, default: Any) -> bool:
    """Whether a value has the type of the default: whole and not negative, finite, true or false, text."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, int):
        return isinstance(value, int) and value >= 0
    if isinstance(default, float):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, type(default)) or (isinstance(default, tuple) and isinstance(value, list))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
