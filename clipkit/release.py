"""A run's weights to give away: their average in half precision, and what the model needs beside it; nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit import checkpoint, inputs
from clipkit.checkpoint import Checkpoint
from clipkit.errors import CheckpointError
from clipkit.records import written_whole

KINDS = ("clip", "autoencoder", "denoiser", "noisy_clip")


def release(runs: Path, out: Path) -> list[Path]:
    """Write the newest weights of the run `runs`, or of each run in the folder `runs`, into `out` -> the folders.

    They load by `out`'s name as the runs do by theirs, and cannot be trained on: the optimizer's state stays behind. So
    do the folders in which absolute paths of its record lay.
    Raises CheckpointError when there is no run, UsageError when `out` holds something or cannot be written.
    """
    folders = [folder for folder in (runs, *(runs / kind for kind in KINDS)) if (folder / "checkpoints").is_dir()]
    found = [latest for folder in folders if (latest := checkpoint.latest(folder)) is not None]
    if not found:
        raise CheckpointError(f"{runs} is not a run and holds none ({', '.join(KINDS)})")
    inputs.check_new(out)
    with written_whole(out) as aside:
        written = [_write(part, aside / part.state["kind"]).relative_to(aside) for part in found]
    return [out / folder for folder in written]


def _write(found: Checkpoint, out: Path) -> Path:
    texts = {p.name: p.read_text(encoding="utf-8") for p in found.path.iterdir() if _belongs(p)}
    averaged = {name: half(tensor) for name, tensor in found.stream("ema")}
    out.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(out, _without_folders(found.state), {"ema": averaged}, texts, keep_last=1)


def _without_folders(value: Any) -> Any:
    """A checkpoint's state, or what is in it, with the names alone of absolute paths."""
    if isinstance(value, dict):
        return {_without_folders(key): _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _belongs(file: Path) -> bool:
    return file.suffix == ".json" and file.name not in ("state.json", "manifest.json")


def half(tensor: Tensor) -> Tensor:
    """Matrices and convolutions in half precision; norms, biases and statistics weigh nothing and keep theirs."""
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
