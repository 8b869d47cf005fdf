"""Real processes, and ways to kill them: at a step, at an access to a file, or between two system calls.

A test never asks how long something takes. A process stops itself where the test wants it (`held`), the test sees it
stopped, and lets it go on; whatever else is waited for has HANG seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import held

from clipkit import checkpoint, log

HANG = 600.0
"""Seconds after which what is waited for will never come, on any machine."""

Process = BaseProcess | subprocess.Popen

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clipkit.cli", "clipkit.train.pretrain", "timm", "clipkit.zeroshot.classify"])
_started: list[Process] = []


def _pretrain(words: Sequence[str], err: str, plan: held.Plan, access: int) -> None:
    import torch

    from clipkit.cli import main

    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # as when the command is run
    held.at_steps(plan)
    held.at_access(next(w.removeprefix("run.out=") for w in words if w.startswith("run.out=")), access)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    main(["pretrain", "drawings_clip", *words])


def training(words: Sequence[str], err: Path, plan: held.Plan = (), access: int = 0) -> BaseProcess:
    """`clipkit pretrain` in a process of its own, forked from one that has imported everything; stderr in `err`.

    It sends itself the signals of `plan`, and kills itself before its access number `access` to the run's folder.
    """
    process = _context.Process(target=_pretrain, args=(list(words), str(err), list(plan), access))
    process.start()
    _started.append(process)
    return process


def launched(command: Sequence[object], **options: object) -> subprocess.Popen:
    """A command in a process of its own, which is killed at the end of the test if it still runs."""
    process = subprocess.Popen([str(word) for word in command], **options)
    _started.append(process)
    return process


def end_all() -> None:
    """Kill what `training` and `launched` have started, and the processes below them."""
    for process in _started:
        if running(process):
            for pid in (*_descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        ended(process)
    _started.clear()


def tiny(packs: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Overrides that make the drawings recipe a run of milliseconds a step."""
    small = ["run.batch_size=16", "run.log_every=1", "run.save_every=5", "optim.warmup=2", "data.val="]
    tower = ["model.image_tower=clipkit_resnet", "model.image_kwargs={channels=[8], depths=[1]}"]
    text = ["model.embed_dim=16", "model.text_width=16", "model.text_layers=1", "model.text_heads=2"]
    paths = [f"data.shards={packs / 'train'}", f"run.out={out}", f"run.steps={steps}"]
    return [*small, *tower, *text, *paths, *more]


def steps_done(run: Path) -> int:
    """The last step in a run's log."""
    path = run / "log.jsonl"
    with contextlib.suppress(FileNotFoundError):
        return max((line["step"] for line in log.read(path)), default=0)
    return 0


def running(process: Process) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def until(condition: Callable[[], object], process: Process | None = None) -> None:
    """Wait for a condition, as long as the process lives."""
    limit = time.monotonic() + HANG
    while True:
        alive = process is None or running(process)  # asked before, for it may do its work and end between the two
        if condition():
            return
        assert alive, f"{process} ended"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)


def ended(process: Process) -> int:
    """Wait for the end of a process -> its exit code, or minus the signal that killed it."""
    if isinstance(process, subprocess.Popen):
        return process.wait(HANG)
    process.join(HANG)
    assert process.exitcode is not None, "waited too long"
    return process.exitcode


def state(pid: int) -> str:
    """The letter of /proc/PID/stat: R or S, T when stopped; "" when there is no such process, or its parent is late."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if letter in "ZX" else letter


def until_stopped(process: Process) -> None:
    """Wait until a process has stopped itself."""
    until(lambda: state(process.pid) == "T", process)


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal was sent to a process, which has not taken it yet."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    waiting = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(waiting, 16) >> (number - 1) & 1)


def children(pid: int, of: bytes = b"") -> list[int]:
    """Processes that a process has started, those with `of` in their command line."""
    found = []
    for task in _listed(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(p) for p in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return sorted(p for p in found if of in _read(f"/proc/{p}/cmdline"))


def loaders(process: Process) -> list[int]:
    """A run's loader processes."""
    return [p for p in children(process.pid) if b"resource_tracker" not in _read(f"/proc/{p}/cmdline")]


def _descendants(pid: int) -> Iterable[int]:
    for child in children(pid):
        yield from _descendants(child)
        yield child


def _listed(folder: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return os.listdir(folder)
    return []


def _read(file: str) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(file).read_bytes()
    return b""


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
    return [(line["step"], line["loss"]) for line in log.read(run / "log.jsonl") if "loss" in line]


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
