"""Atomic checkpoints: a directory of safetensors and JSON, written aside, fsynced, listed in a manifest, then renamed.

A kill or a full disk at any moment leaves the previous checkpoint loadable; a flipped bit is found by its sha256 and
named. Nothing in here is pickled, so that loading never runs code. Runs write from a thread of their own while they go
on, and hold a lock on their folder.

    RUN/checkpoints/step-00000500/
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json         step, kind of model, recipe, versions, samples skipped so far
        manifest.json      size and sha256 of every other file
        tokenizer.json ... what else belongs to the model
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
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
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            raise CheckpointError(f"{self.path} has no {file.name}; it is a {self.state.get('kind')} checkpoint")
        try:
            tensors: dict[str, Tensor] = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not what its name says: {error}") from None
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
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint of `state["step"]` into RUN/checkpoints, then drop old ones.

    The newest `keep_last` stay, and those whose step `keep_every` divides, if it is not 0. Raises CheckpointError
    naming the path and the free space when it cannot be written; what was there before is untouched.
    """
    from safetensors import SafetensorError

    folder = run / "checkpoints"
    final = folder / f"{_STEP}{int(state['step']):08d}"
    aside = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.tmp"):  # by a run that was killed; this one holds the lock
            shutil.rmtree(left_over)
        aside.mkdir()
        _write_files(aside, {"format": FORMAT, **state}, tensors, texts)
        if final.exists():
            final.rename(folder / f".{final.name}.old.tmp")
        aside.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(run).free
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"could not save {final}: {reason} ({free / 1e6:.1f} MB free there); the checkpoints before it are whole"
        ) from error
    for old in [*_steps(folder)[:-keep_last], *folder.glob(".*.tmp")]:
        if old.name.startswith(".") or not keep_every or int(old.name.removeprefix(_STEP)) % keep_every:
            shutil.rmtree(old, ignore_errors=True)
    return final


class Saver:
    """Saves in the background: `save` copies the tensors and returns, a thread writes them. Leaving it waits."""

    def __init__(self, run: Path, keep_last: int, keep_every: int) -> None:
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
    ) -> None:
        """Begin to save, when the save before is done. Raises what that one raised."""
        self.wait()
        copies = {group: {n: _copy(t) for n, t in named.items()} for group, named in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(dict(state), copies, dict(texts)))
        self._thread.start()

    def _write(
        self, state: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
    ) -> None:
        try:
            save(self.run, state, tensors, texts, self.keep_last, self.keep_every)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what a finished save raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until everything is on the disk. Raises CheckpointError if it could not be put there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run's folder. Raises CheckpointError naming the process that already does; a dead one holds nothing."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise CheckpointError(
                f"{run} is being trained by {file.read().strip() or 'another process'}; wait for it, or give run.out "
                "another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
        if "state.json" not in manifest:
            raise CheckpointError(f"{path / 'manifest.json'} is damaged: it does not list state.json")
        for name, entry in manifest.items():
            file = path / Path(name).name
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
