"""What is given to commands in files: lists of words, class names, templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.errors import UsageError

MODEL_HELP = "A run's folder, others' weights, or a published name (see clipkit models)."


def read_class_names(path: Path) -> dict[str, list[str]]:
    """A JSON object of names, or lists of names, by key. Raises UsageError for anything else."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path} must map each class folder to its names; found a {type(data).__name__}")
    return {str(k): [v] if isinstance(v, str) else list(v) for k, v in data.items()}


def read_json(path: Path) -> Any:
    """Raises UsageError for a file that is not there or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON: {error}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises UsageError when there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable text file: {error}") from None
    if not lines:
        raise UsageError(f"{path} is empty; it needs one entry a line")
    return lines


def read_templates(given: str, ensembles: dict[str, list[str]]) -> list[str]:
    """A set of templates by its name, or the lines of a file. Raises UsageError for what is neither."""
    if given not in ensembles and not Path(given).is_file():
        raise UsageError(f"--templates {given!r} is neither a file nor one of {', '.join(ensembles)}")
    return ensembles.get(given) or read_lines(Path(given))


def read_class_list(path: Path, found: Sequence[Sequence[str]]) -> list[list[str]]:
    """Names that replace the data set's own: in its order, or keyed by its directory names."""
    data = read_json(path) if path.suffix == ".json" else read_lines(path)
    if isinstance(data, dict):
        missing = [c[0] for c in found if c[0] not in data and c[0].replace(" ", "_") not in data]
        if missing:
            raise UsageError(f"{path} has no names for class {missing[0]!r} ({len(missing)} missing)")
        data = [data.get(c[0], data.get(c[0].replace(" ", "_"))) for c in found]
    if not isinstance(data, list) or len(data) != len(found):
        size = len(data) if isinstance(data, list) else type(data).__name__
        raise UsageError(f"{path} lists {size} classes; the data set has {len(found)}")
    return [[entry] if isinstance(entry, str) else [str(n) for n in entry] for entry in data]
