"""Inputs and outputs of commands: a text or the file that holds it, lists, JSON, and places to write to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from clipkit.errors import DataError, UsageError, shown

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv")


def file_of(argument: str, what: str) -> Path | None:
    """The file that `argument` names, or None when it is text.

    Anything that exists is a file, pipes such as `<(...)` included. A path that does not exist is a mistake, not text:
    it begins with `/`, `./`, `../` or `~/`, or is one item with the suffix of a text file or an image. The name of a
    folder is text when it is a single word. `what` names the argument in the error.

    Raises UsageError for a path that does not exist, and for the path of a folder.
    """
    from clipkit.data.images import SUFFIXES

    place = os.path.expanduser(argument) if argument.startswith("~/") else argument
    folder = os.path.isdir(place)
    if os.path.exists(place) and not folder:
        return Path(place)
    suffixed = argument.lower().endswith((*TEXT_SUFFIXES, *SUFFIXES)) and not any(c in argument for c in ",\n")
    rooted = argument.startswith(("/", "./", "../", "~/")) or (folder and "/" in argument)
    if not suffixed and not rooted:
        return None
    if folder:
        raise UsageError(f"{what} {shown(argument)} is a folder; give a file, or text")
    raise UsageError(f"{what} {shown(argument)} does not exist; it looks like the path of a file")


def items_of(argument: str, what: str, separator: str | None = None) -> list[str]:
    """A list of texts: the lines of a file, or the argument itself, split at `separator` if there is one.

    A JSON list is read as such, in a file and as text. Raises UsageError as `file_of` does, for a file without text,
    and for items that are empty or repeated: two equal labels would each get half of the probability.
    """
    file = file_of(argument, what)
    if file is not None and file.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        raise UsageError(f"{what} {file} is a table; give a text file, one entry a line, or a JSON list")
    text = argument if file is None else read_text(file)
    if text.lstrip().startswith("{") and (file is None or file.suffix.lower() != ".json"):
        raise UsageError(f"{what} must be a list of texts; found what looks like a JSON object")
    if text.lstrip().startswith("[") or (file is not None and file.suffix.lower() == ".json"):
        items = _json_items(text, what)
    elif file is not None or (separator and "\n" in text):
        items = lines_of(text, f"{what} {file or 'list'}")
    else:
        items = text.split(separator) if separator else [text]
    items = [" ".join(item.split()) for item in items]
    if not items:
        raise UsageError(f"{what} {file or 'list'} is empty; give one entry a line")
    if "" in items:
        raise UsageError(f"{what}: entry {items.index('') + 1} of {len(items)} is empty")
    seen = set[str]()
    if twice := [item for item in items if item.casefold() in seen or seen.add(item.casefold())]:  # type: ignore[func-returns-value]
        named = ", ".join(map(repr, twice[:5])) + (" ..." if len(twice) > 5 else "")
        raise UsageError(f"{what} has {named} twice; keep one of each")
    return items


def _json_items(text: str, what: str) -> list[str]:
    items = parsed_json(text, what)
    if not isinstance(items, list):
        raise UsageError(f"{what} must be a JSON list of texts; found a {type(items).__name__}")
    if strange := [i for i, item in enumerate(items) if not isinstance(item, str)]:
        raise UsageError(
            f"{what}: entry {strange[0] + 1} of the JSON list is {json.dumps(items[strange[0]])[:40]}, not text"
        )
    return items


def lines_of(text: str, what: str) -> list[str]:
    """The lines of a text that are not empty, without spaces around them. Raises UsageError when there are none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{what} is empty; give one entry a line")
    return lines


def parsed_json(text: str, what: str) -> Any:
    """The value of a JSON text. Raises UsageError, which names `what`, for other texts."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} is not readable JSON: {error}") from None


def read_text(path: Path) -> str:
    """A text file or pipe, decoded as `tables.decoded` does. Raises UsageError for one that cannot be read."""
    from clipkit.data.tables import decoded

    try:
        return decoded(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except DataError as error:
        raise UsageError(str(error)) from None


def check_writable(folder: Path) -> None:
    """Check that files can be written into `folder`, before the work whose result goes there.

    Nothing is created: of a folder that does not exist, the nearest above it that does is tried. Raises UsageError
    with the path and the reason.
    """
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if _is_there(place))):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write into {folder}: {getattr(error, 'strerror', None) or error}") from None


def _is_there(place: Path) -> bool:
    """Anything of that name, broken links included. Raises OSError for a name that nothing can have."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file of this name can be written, before the work: its suffix is one of `suffixes`, its place free.

    Raises UsageError with the path and the reason.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"cannot write {path}: its name must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    check_writable(path.parent)


def plural(count: int, noun: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_json(found: Any) -> None:
    """One JSON object, or list, on stdout. NaN and infinities, which JSON does not have, become null."""
    click.echo(json.dumps(_finite(found), allow_nan=False))


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def check_new(folder: Path) -> None:
    """Check that `folder` can be written into, and holds nothing yet with which the result would be mixed.

    Raises UsageError otherwise.
    """
    if os.path.isdir(folder) and (names := sorted(path.name for path in folder.iterdir())):
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise UsageError(f"{folder} is not empty: it holds {shown(names[0])}{more}; give a new folder")
    check_writable(folder)
