"""Captions and labels of a sample, from its .txt and .json members."""

from __future__ import annotations

import json
from typing import Any

from clipkit.errors import SampleError

MAX_CAPTION = 4096
"""Longest caption, in characters."""


def clean_caption(text: str) -> str:
    """A caption that every tokenizer accepts: no NUL, no lone surrogates, at most `MAX_CAPTION` characters."""
    return text[: 2 * MAX_CAPTION].replace("\x00", " ").encode("utf-8", "replace").decode("utf-8").strip()[:MAX_CAPTION]


def parse(text: bytes, meta: bytes | None, classes: int, cleaned: bool = False) -> tuple[tuple[str, ...], int | None]:
    """Captions and label of a sample; `classes` is the pack's number of classes, without which there is no label.

    In order of preference: a list `captions` in the .json, the .txt, a text `caption` in the .json. They are cleaned
    here, except a list that `clipkit pack` wrote (`cleaned`).
    Raises SampleError ("bad metadata") for a .json that cannot be read though it is needed, or has a wrong label.
    """
    written = [text[: 8 * MAX_CAPTION].decode("utf-8", errors="replace")]
    record = {} if meta is None else _record(meta)
    if record is None and (classes or not clean_caption(written[0])):
        raise SampleError("bad metadata", repr((meta or b"")[:60]))
    record = record or {}
    label = _label(record, classes)
    listed = record.get("captions")
    listed = listed if isinstance(listed, list) and all(isinstance(c, str) for c in listed) else []
    if cleaned and listed:
        return tuple(listed), label
    single = record.get("caption")
    for found in (listed, written, [single] if isinstance(single, str) else []):
        if captions := tuple(filter(None, map(clean_caption, found))):
            return captions, label
    return (), label


def _label(record: dict[str, Any], classes: int) -> int | None:
    label = record.get("label") if classes else None
    if label is not None and not (type(label) is int and 0 <= label < classes):
        raise SampleError("bad metadata", f"label {label!r:.40} of {classes} classes")
    return label


def _record(meta: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(meta)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
