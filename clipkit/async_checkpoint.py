"""Async checkpointing: a thread writes checkpoints while the run continues; and the lock of a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit import checkpoint, distributed
from clipkit.checkpoint import Shard
from clipkit.errors import CheckpointError


class Saver:
    """Saves in the background: `save` copies the tensors and returns, a thread writes them. On exit it waits."""

    def __init__(self, run: Path, keep_last: int, keep_every: int) -> None:
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        sharded: bool = False,
    ) -> None:
        """Start to save once the previous save is done: on one rank, or `sharded`, on all ranks, each its shard.

        Raises the error of the previous save.
        """
        self.wait()
        shard = Shard(distributed.rank(), distributed.world_size()) if sharded else Shard()
        if shard.of > 1:
            if not shard.rank:
                checkpoint.begin(self.run, int(state["step"]))
            distributed.barrier()
        copies = {group: {n: _copy(t) for n, t in named.items()} for group, named in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(dict(state), copies, dict(texts), shard))
        self._thread.start()

    def _write(
        self,
        state: dict[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        shard: Shard,
    ) -> None:
        try:
            checkpoint.save(self.run, state, tensors, texts, self.keep_last, self.keep_every, shard)
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
        """Raise the error of a finished save."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until everything is on the disk. Raises CheckpointError if it cannot be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Lock a run's folder. Raises CheckpointError naming the process that holds it, or if the file system has no locks.

    A POSIX lock of the process: a dead process holds none, and loader processes forked from it do not inherit it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # some network file systems have no locks
                raise CheckpointError(
                    f"cannot lock {file.name}: {error.strerror}; give run.out another folder"
                ) from None
            file.seek(0)
            raise CheckpointError(
                f"{run} is being trained by {file.read().strip() or 'another process'}; wait for it, or give run.out "
                "another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
