"""Atomic checkpoints: a directory of safetensors and JSON, written under another name, fsynced, hashed, then renamed.

A kill or a full disk at any moment leaves the previous checkpoint loadable; a flipped bit is found by the manifest's
sha256, and its file is named. Nothing is pickled, so that loading never runs code.

    RUN/checkpoints/step-00000500/
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json         step, kind of model, recipe, versions, samples skipped so far
        manifest.json      size and sha256 of every other file
        tokenizer.json ... other text files of the model

Under FSDP each rank writes its shard, as model-00001-of-00004.safetensors and so on. Any number of ranks can read them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.config import with_present_names
from clipkit.errors import CheckpointError, RecipeError
from clipkit.io import sha256, write_atomically
from clipkit.registry import TASKS

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
_STEP = "step-"
_WRITTEN = ".shard-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are checked against their manifest, at the latest when they are read."""

    path: Path
    state: dict[str, Any]
    unhashed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    """Manifest entries of the tensor files that were not hashed yet."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name` ("model", "ema", "optimizer"), on the CPU."""
        return dict(self.stream(name))

    def stream(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The same one by one, for tensors too large to hold twice; shards are concatenated.

        Raises CheckpointError for a file that is damaged, or that is no safetensors file.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        whole = self.path / f"{name}.safetensors"
        files = [whole] if whole.is_file() else sorted(self.path.glob(f"{name}-*-of-*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} has no {whole.name}; it is a {self.state.get('kind')} checkpoint")
        for file in files:
            if file.name in self.unhashed:
                _check_hash(file, self.unhashed[file.name])
        try:
            opened: list[Any] = [safe_open(file, framework="pt") for file in files]
            for key in opened[0].keys():  # noqa: SIM118 - not a dict; unsharded tensors are in the first alone
                shards = [file.get_tensor(key) for file in opened if key in file.keys()]  # noqa: SIM118
                yield key, shards[0] if len(shards) == 1 else torch.cat(shards)
        except SafetensorError as error:
            raise CheckpointError(f"{files[0]} is no safetensors file: {error}") from None

    def text(self, name: str, default: str | None = None) -> str:
        """A text file of the checkpoint. Raises CheckpointError if it has none of that name and there is no default."""
        if not (self.path / name).is_file():
            if default is not None:
                return default
            raise CheckpointError(f"{self.path} has no {name}; it is a {self.state.get('kind')} checkpoint")
        return (self.path / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Shard:
    """Which shard of a checkpoint a rank writes: all of it, or number `rank` of `of`."""

    rank: int = 0
    of: int = 1

    def file(self, name: str) -> str:
        """Name of the file of the tensors called `name`."""
        suffix = f"-{self.rank + 1:05d}-of-{self.of:05d}" if self.of > 1 else ""
        return f"{name}{suffix}.safetensors"


def begin(run: Path, step: int) -> Path:
    """An empty directory for the files of a step's checkpoint; remains of killed saves are deleted. Raises OSError."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.tmp"):
        shutil.rmtree(left_over)
    aside = _aside(run, step)
    aside.mkdir()
    return aside


def _aside(run: Path, step: int) -> Path:
    return run / "checkpoints" / f".{_STEP}{step:08d}.tmp"


def save(
    run: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    keep_last: int,
    keep_every: int = 0,
    shard: Shard | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]` into RUN/checkpoints, then drop old ones.

    The newest `keep_last` stay, and those whose step `keep_every` divides, if it is not 0. With a `shard`, every
    rank calls this with its own after the first has called `begin`; the first waits for the others and finishes.

    Raises CheckpointError naming the path and the free space when it cannot be written; earlier
    checkpoints are untouched.
    """
    from safetensors import SafetensorError

    step, shard = int(state["step"]), shard or Shard()
    folder = run / "checkpoints"
    aside = _aside(run, step)
    final = folder / f"{_STEP}{step:08d}"
    try:
        if shard.of == 1:
            begin(run, step)
        entries = _write_files(aside, {"format": FORMAT, **state}, tensors, texts, shard)
        if shard.rank:
            _report(aside, shard, {"files": entries})
            return final
        _finish(aside, final, {**entries, **_gathered(aside, shard)})
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if shard.rank:
            _report(aside, shard, {"error": reason})
        else:
            shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(run).free
        raise CheckpointError(
            f"could not save {final}: {reason} ({free / 1e6:.1f} MB free there); the checkpoints before it are whole"
        ) from error
    for old in [*_steps(folder)[:-keep_last], *folder.glob(".*.tmp")]:
        if old.name.startswith(".") or not keep_every or int(old.name.removeprefix(_STEP)) % keep_every:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _write_files(
    folder: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    shard: Shard,
) -> dict[str, Any]:
    """Write and fsync the files of this shard -> their entries in the manifest."""
    from safetensors.torch import save_file

    files = [folder / shard.file(name) for name in tensors]
    for file, group in zip(files, tensors.values(), strict=True):
        save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, file)
    if not shard.rank:
        for name, text in {**texts, "state.json": json.dumps(state, indent=1)}.items():
            (folder / name).write_text(text, encoding="utf-8")
            files.append(folder / name)
    for file in files:
        _fsync(file)
    return {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def _report(aside: Path, shard: Shard, report: Mapping[str, Any]) -> None:
    """Report to the first rank, through the file system they share, that this shard is written, or why not."""
    write_atomically(aside / f"{_WRITTEN}{shard.rank}", json.dumps(report))


def _gathered(aside: Path, shard: Shard, patience: float = 1800.0) -> dict[str, Any]:
    """The entries of the other ranks' shards, when all are written. Raises OSError when one fails or times out."""
    entries: dict[str, Any] = {}
    limit = time.monotonic() + patience
    for rank in range(1, shard.of):
        file = aside / f"{_WRITTEN}{rank}"
        while not file.is_file():
            if time.monotonic() > limit:
                raise OSError(f"rank {rank} did not write its shard in {patience:g} s")
            time.sleep(0.02)
        report = json.loads(file.read_text(encoding="utf-8"))
        if "error" in report:
            raise OSError(f"rank {rank}: {report['error']}")
        entries |= report["files"]
        file.unlink()
    return entries


def _finish(aside: Path, final: Path, entries: Mapping[str, Any]) -> None:
    (aside / "manifest.json").write_text(json.dumps(dict(sorted(entries.items())), indent=1), encoding="utf-8")
    _fsync(aside / "manifest.json")
    _fsync(aside)
    if final.exists():
        final.rename(final.with_name(f".{final.name}.old.tmp"))
    aside.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_STEP}*") if p.is_dir())


def verify(path: Path, tensors: Collection[str] | None = None) -> Checkpoint:
    """Check the files of one checkpoint directory against its manifest.

    All must be there in their size. Tensor files other than those called `tensors` are hashed when they are read;
    without `tensors` all are hashed now.
    Raises CheckpointError naming the file that is missing, cut or altered.
    """
    unhashed: dict[str, Mapping[str, Any]] = {}
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
            if tensors is None or file.suffix != ".safetensors" or _TENSORS.sub("", file.name) in tensors:
                _check_hash(file, entry)
            else:
                unhashed[file.name] = entry
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}; this version of clipkit reads {FORMAT}")
    if state.get("kind") in TASKS.own and "recipe" in state:  # of another package: its own keys
        try:
            state["recipe"], _ = with_present_names(state["recipe"])
        except (RecipeError, AttributeError) as error:
            raise CheckpointError(f"{path / 'state.json'} is damaged: {error}") from None
    return Checkpoint(path, state, unhashed)


_TENSORS = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors$")
"""End of the name of a file of tensors, after what they are called."""


def _check_hash(file: Path, entry: Mapping[str, Any]) -> None:
    if sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file} is damaged: its sha256 is not that of the manifest")


def latest(run: Path, tensors: Collection[str] | None = None) -> Checkpoint | None:
    """The newest valid checkpoint of a run, or None if it has none at all.

    `tensors` are the names of those that will be read, of which the files are hashed now; by default all are. A damaged
    checkpoint is skipped with a warning that names the damage. Raises CheckpointError if all are damaged.
    """
    damage: CheckpointError | None = None
    for path in reversed(_steps(run / "checkpoints")):
        try:
            return verify(path, tensors)
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
            damage = error
    if damage is not None:
        raise damage
    return None


def half(tensor: Tensor) -> Tensor:
    """Matrices and convolutions in half precision; norms, biases and statistics, which are small, keep theirs."""
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
