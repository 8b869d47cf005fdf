"""Release of trained weights: their moving average in half precision, and the text files that the model needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clipkit import checkpoint, inputs
from clipkit.checkpoint import Checkpoint, half
from clipkit.errors import CheckpointError, UsageError
from clipkit.io import written_whole
from clipkit.registry import TASKS


def release(runs: Path, out: Path) -> list[Path]:
    """Write the newest weights of the run `runs`, or of each run in the folder `runs`, into `out` -> the folders.

    `out` is new, or holds other releases; those of the same kinds are replaced.

    They load as the runs do. Training cannot be resumed from them, as the optimizer's state is left out; so are the
    folders of absolute paths in their recipes.
    Raises CheckpointError when there is no run, UsageError when `out` holds something else or cannot be written.
    """
    folders = [folder for folder in (runs, *(runs / kind for kind in TASKS)) if (folder / "checkpoints").is_dir()]
    found = [latest for folder in folders if (latest := checkpoint.latest(folder, ["ema"])) is not None]
    if not found:
        raise CheckpointError(f"{runs} is not a run and holds none ({', '.join(TASKS)})")
    _check_place(out, [part.state["kind"] for part in found])
    with written_whole(out) as aside:
        written = [_write(part, aside / part.state["kind"]).relative_to(aside) for part in found]
    return [out / folder for folder in written]


def _check_place(out: Path, kinds: list[str]) -> None:
    """Only other releases, and their README.md, may be in `out`; those of these kinds are replaced.

    Raises UsageError.
    """
    there = sorted(path for path in out.iterdir() if path.name != "README.md") if os.path.isdir(out) else []
    for path in there:
        if path.name not in {*TASKS, *kinds} or not _is_release(path):
            raise UsageError(f"{out} holds {path.name}, which is no release; give a new folder, or one of releases")
    inputs.check_writable(out)


def _is_release(folder: Path) -> bool:
    """Whether a folder holds averaged weights and nothing of a run; a run has its recipe, log and training weights."""
    files = {path.name for path in folder.glob("checkpoints/*/*.safetensors")}
    return files == {"ema.safetensors"} and [path.name for path in folder.iterdir()] == ["checkpoints"]


def _write(found: Checkpoint, out: Path) -> Path:
    texts = {p.name: p.read_text(encoding="utf-8") for p in found.path.iterdir() if _belongs(p)}
    averaged = {name: half(tensor) for name, tensor in found.stream("ema")}
    out.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(out, _without_folders(found.state), {"ema": averaged}, texts, keep_last=1)


def _without_folders(value: Any) -> Any:
    """A checkpoint's state, or a value in it, with absolute paths reduced to their names."""
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _belongs(file: Path) -> bool:
    return file.suffix == ".json" and file.name not in ("state.json", "manifest.json")
