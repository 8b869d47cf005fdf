"""Real processes, and ways to kill them: at a moment, or between two system calls."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from clipkit import checkpoint, records

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clipkit.cli", "clipkit.train.pretrain", "timm", "clipkit.zeroshot.classify"])


def _pretrain(words: Sequence[str], err: str) -> None:
    import torch

    from clipkit.cli import main

    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # as when the command is run
    with open(err, "w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        main(["pretrain", "drawings_clip", *words])


def training(words: Sequence[str], err: Path) -> BaseProcess:
    """`clipkit pretrain` in a process of its own, forked from one that has imported everything; stderr in `err`."""
    process = _context.Process(target=_pretrain, args=(list(words), str(err)))
    process.start()
    return process


def tiny(packs: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Overrides that make the drawings recipe a run of milliseconds a step."""
    small = ["run.batch_size=16", "run.log_every=1", "run.save_every=5", "optim.warmup=2", "data.val="]
    tower = ["model.image_tower=clipkit_resnet", "model.image_kwargs={channels=[8], depths=[1]}"]
    text = ["model.embed_dim=16", "model.text_width=16", "model.text_layers=1", "model.text_heads=2"]
    paths = [f"data.shards={packs / 'train'}", f"run.out={out}", f"run.steps={steps}"]
    return [*small, *tower, *text, *paths, *more]


def steps_done(run: Path) -> int:
    """The last step in a run's log."""
    log = run / "log.jsonl"
    with contextlib.suppress(FileNotFoundError):
        return max((line["step"] for line in records.read(log)), default=0)
    return 0


def until(condition: Callable[[], object], process: BaseProcess | None = None, seconds: float = 120) -> None:
    """Wait for a condition, as long as the process lives."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)


def final(run: Path) -> dict[str, dict]:
    found = checkpoint.latest(run)
    return {name: found.tensors(name) for name in ("model", "ema", "optimizer")}


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits and the same losses."""
    one, other = final(a), final(b)
    return _losses(a) == _losses(b) and all(
        one[group][k].equal(other[group][k]) and one[group].keys() == other[group].keys()
        for group in one
        for k in one[group]
    )


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in records.read(run / "log.jsonl") if "loss" in line]


def killed_before_call(function: Callable[[], object], call: int) -> bool:
    """Run `function` in a forked process, SIGKILL it before its system call number `call` -> whether it came to that.

    The process is traced (ptrace), and stops before and after each of its system calls.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    traceme, syscall = 0, 24
    with warnings.catch_warnings():  # of threads that a forked process lacks; what runs in it needs none
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        try:
            libc.ptrace(traceme, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            function()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    stops = 0
    while os.WIFSTOPPED(status):
        if stops == 2 * call:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        deliver = os.WSTOPSIG(status) if os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP) else 0
        if libc.ptrace(syscall, pid, None, deliver) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        _, status = os.waitpid(pid, 0)
        stops += 1
    return False
