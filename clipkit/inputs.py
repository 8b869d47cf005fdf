"""Arguments that may be text or the name of a file, and output folders: decided the same way by every command."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from clipkit.errors import UsageError, shown
from clipkit.images import SUFFIXES

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv")


def file_of(argument: str, what: str) -> Path | None:
    """The file that `argument` names, or None when it is text.

    What exists is a file, pipes such as `<(...)` included. What looks like a path and does not exist is a mistake, not
    text: it begins with `/`, `./`, `../` or `~/`, or is one item with the suffix of a text file or an image. `what`
    names the argument in the error.

    Raises UsageError for a path that does not exist, and for the path of a folder.
    """
    if os.path.exists(argument) and not os.path.isdir(argument):
        return Path(argument)
    suffixed = argument.lower().endswith((*TEXT_SUFFIXES, *SUFFIXES)) and not any(c in argument for c in ",\n")
    if not suffixed and not argument.startswith(("/", "./", "../", "~/")):
        return None
    if os.path.isdir(argument):
        raise UsageError(f"{what} {shown(argument)} is a folder; give a file, or text")
    raise UsageError(f"{what} {shown(argument)} does not exist; it looks like the path of a file")


def check_writable(folder: Path) -> None:
    """Check that files can be written into `folder`, before the work whose result goes there.

    A folder that does not exist is created and removed again. Raises UsageError with the path and the reason.
    """
    created: list[Path] = []
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir()
                created.append(place)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write into {folder}: {reason}") from None
    finally:
        for place in reversed(created):
            with suppress(OSError):
                place.rmdir()


def check_new(folder: Path) -> None:
    """Check that `folder` can be written into, and holds nothing yet with which the result would be mixed.

    Raises UsageError otherwise.
    """
    if os.path.isdir(folder) and (names := sorted(path.name for path in folder.iterdir())):
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise UsageError(f"{folder} is not empty: it holds {shown(names[0])}{more}; give a new folder")
    check_writable(folder)
