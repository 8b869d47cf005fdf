"""Logging of a run: log.jsonl, TensorBoard if asked, a progress bar; and messages on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from clipkit.errors import UsageError
from clipkit.io import write_atomically

T = TypeVar("T")


def progress(things: Iterable[T], total: int | None, what: str) -> Iterable[T]:
    """Wrap an iterable in a progress bar on stderr; silent when stderr is not a terminal."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(things, total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)
    return bar


def say(message: str) -> None:
    """Print a message on stderr: stdout is for results. A terminal that is gone is ignored."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def remark(message: str) -> None:
    """`say` on rank 0 a message that is the same on all ranks."""
    if os.environ.get("RANK", "0") == "0":
        say(message)


class Records:
    """Log lines of one run, on rank 0; other ranks make one with `enabled=False`.

    A resumed run drops the lines of steps that it repeats, so that the log reads as that of one uninterrupted run.
    """

    def __init__(self, folder: Path, start: int, steps: int, name: str, tensorboard: bool, enabled: bool) -> None:
        from tqdm import tqdm

        self.path = folder / "log.jsonl"
        self.enabled = enabled
        self._name = name
        self._board = None
        self._quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, desc=name, disable=not enabled or self._quiet, unit="step")
        if enabled:
            self._rewind(start)
            if tensorboard:
                self._board = _summary_writer(folder / "tensorboard", start)

    def _rewind(self, start: int) -> None:
        kept = [line for line in read(self.path) if line["step"] <= start] if self.path.is_file() else []
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; show it in the progress bar, or in a plain line when there is no terminal."""
        if not self.enabled:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, (int, float)))
        if self._quiet:
            say(f"{self._name} {step}: {shown}")
        else:
            self.bar.set_postfix_str(shown)
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, step)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("run.tensorboard needs TensorBoard: pip install 'clipkit[track]'") from None
    return SummaryWriter(str(folder), purge_step=start)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a line cut by a kill is skipped."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
