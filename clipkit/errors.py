"""Every error clipkit raises on purpose, and the exit code the command line gives it.

    ClipkitError                exit 1   something clipkit could not do
    |-- UsageError              exit 2   an invalid request: an option, a name, a prompt
    |   `-- RecipeError         exit 2   a recipe or an override of it
    |-- DataError               exit 1   images, captions and packs
    |   |-- ShardError          exit 1   a damaged or missing shard, or its index
    |   `-- SampleError         exit 1   one bad sample; readers skip and count it by `reason`
    |-- CheckpointError         exit 1   a folder that is not a model, or a damaged one
    |-- RankError               exit 1   a rank that died or hangs
    |-- StoppedError            exit 0   SIGTERM, SIGHUP: the run has saved and ended (Ctrl-C: KeyboardInterrupt, 130)
    `-- NonFiniteError          exit 3   a loss or gradient that is NaN or infinite

A message is one line: the problem, the value found, the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipkitError(Exception):
    """Base of all errors for users; the command line prints it in one line, without a traceback."""

    exit_code = 1


class UsageError(ClipkitError, ValueError):
    """The request is invalid."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a wrong type or an invalid combination."""


class DataError(ClipkitError):
    """Input data cannot be used."""


class ShardError(DataError):
    """A shard or an index is missing or damaged."""


class SampleError(DataError):
    """One sample is unusable; `reason` is the short name under which it is counted, `detail` its file or the cause."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class CheckpointError(ClipkitError):
    """A checkpoint is missing, damaged, or of something else."""


class RankError(ClipkitError):
    """Another rank did not come to a step in time."""


class StoppedError(ClipkitError):
    """The run was stopped by SIGTERM or a closed terminal; it has saved a checkpoint."""

    exit_code = 0


class NonFiniteError(ClipkitError):
    """Training met a NaN or an infinity; no weight was touched."""

    exit_code = 3


def shown(argument: object) -> str:
    """A user's input for a message: on one line, at most 80 characters."""
    text = " ".join(str(argument).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: the closest known name after a prefix, or all of them when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {prefix + close[0]!r}?" if close else f"known: {', '.join(known)}"
