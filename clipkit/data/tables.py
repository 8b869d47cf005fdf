"""CSV and TSV tables, as people and spreadsheet programs write them."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import DataError

_SEPARATORS = (",", ";", "\t")
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order mark -> encoding."""


@dataclass(frozen=True)
class Row:
    """A row: its number (the header is row 1) and its values by column, stripped."""

    number: int
    values: dict[str, str]


def decoded(path: Path) -> str:
    """A text file or pipe in UTF-8, or in UTF-16 with its byte order mark. Raises OSError, DataError for others."""
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in {encoding.removesuffix('-sig').upper()} ({error}); save it as UTF-8"
        ) from None


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV, of which only `columns` are kept; other columns, case and spaces of their names do not matter.

    The separator is the one of `,`, `;` and tab with which the header has the columns. Empty rows are skipped.
    Raises DataError for a table that cannot be read or has other columns, and for rows that have not one field for each
    column: a comma in a text that is not quoted would cut it.
    """
    try:
        text = decoded(path).replace("\0", " ")  # Python 3.10 reads no NUL
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if text[:4].lower() == "sep=":  # written for Excel
        text = text.partition("\n")[2]
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        separator = _separator(path, text, columns)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        try:
            (_, header), *rows = _filled(reader)
        except csv.Error as error:
            raise DataError(f"{path} is not a readable CSV: {error}, in line {reader.line_num}") from None
    finally:
        csv.field_size_limit(limit)
    while not header[-1].strip():  # of a separator at the end of the line
        header.pop()
    if bad := [(n, row) for n, row in rows if len(row) < len(header) or any(map(str.strip, row[len(header) :]))]:
        number, row = bad[0]
        more = f", and {len(bad) - 1} more are wrong" if len(bad) > 1 else ""
        raise DataError(
            f"{path}, row {number} has {len(row)} where the header has {len(header)} fields{more}; put quotes around a "
            f"text that holds {separator!r}"
        )
    places = {_plain(name): i for i, name in enumerate(header)}
    return [Row(number, {c: row[places[c]].strip() for c in columns}) for number, row in rows]


def _filled(reader: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Numbered rows, without empty ones."""
    return ((number, row) for number, row in enumerate(reader, 1) if any(map(str.strip, row)))


def _plain(name: str) -> str:
    return name.strip().lower()


def _separator(path: Path, text: str, columns: Sequence[str]) -> str:
    found: list[str] = []
    for separator in _SEPARATORS:
        _, header = next(_filled(csv.reader(io.StringIO(text, newline=""), delimiter=separator)), (0, []))
        names = [_plain(name) for name in header]
        if set(columns) <= set(names):
            if twice := [c for c in columns if names.count(c) > 1]:
                raise DataError(f"{path} has two columns {twice[0]!r}; keep one of them")
            return separator
        found = max(found, names, key=len)
    raise DataError(f"{path} has the columns {', '.join(found) or '(none)'}; it needs {','.join(columns)}")
