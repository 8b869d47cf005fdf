"""Atomic checkpoints: a directory of safetensors and JSON, written aside, fsynced, listed in a manifest, then renamed.

A kill or a full disk at any moment leaves the previous checkpoint loadable; a flipped bit is found by its sha256 and
named. Nothing in here is pickled, so that loading never runs code.

    RUN/checkpoints/step-00000500/
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json         step, kind of model, recipe, versions
        manifest.json      size and sha256 of every other file
        tokenizer.json ... what else belongs to the model
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import CheckpointError
from clipkit.shards import sha256

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
_STEP = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked against their manifest."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(self.path / f"{name}.safetensors")
        return tensors

    def text(self, name: str) -> str:
        """A text file of the checkpoint. Raises CheckpointError if it has none of that name."""
        if not (self.path / name).is_file():
            raise CheckpointError(f"{self.path} has no {name}; it is a {self.state.get('kind')} checkpoint")
        return (self.path / name).read_text(encoding="utf-8")


def save(
    run: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    keep: int,
) -> Path:
    """Write the checkpoint of `state["step"]` into RUN/checkpoints, then drop all but the newest `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_STEP}{int(state['step']):08d}"
    aside = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _write_files(aside, {"format": FORMAT, **state}, tensors, texts)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _fsync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise CheckpointError(f"could not save {final}: {error.strerror or error} ({free} bytes free)") from error
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_files(
    folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
) -> None:
    from safetensors.torch import save_file

    for name, group in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, folder / f"{name}.safetensors")
    for name, text in {**texts, "state.json": json.dumps(state, indent=1)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = sorted(folder.iterdir())
    manifest = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in [*files, folder / "manifest.json", folder]:
        _fsync(file)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_STEP}*") if p.is_dir())


def verify(path: Path) -> Checkpoint:
    """Check every file of one checkpoint directory against its manifest.

    Raises CheckpointError naming the file that is missing, cut or altered.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file} is damaged: {file.stat().st_size} bytes, {entry['bytes']} expected")
            if sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{file} is damaged: its sha256 is not that of the manifest")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}; this version of clipkit reads {FORMAT}")
    return Checkpoint(path, state)


def latest(run: Path) -> Checkpoint | None:
    """The newest valid checkpoint of a run, or None if it has none at all.

    A damaged one is skipped with a warning that names the damage. Raises CheckpointError if all are damaged.
    """
    damage: CheckpointError | None = None
    for path in reversed(_steps(run / "checkpoints")):
        try:
            return verify(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
            damage = error
    if damage is not None:
        raise damage
    return None
