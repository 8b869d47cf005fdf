"""A process that sends itself signals at chosen steps of its run, so that no test depends on when a signal arrives.

As a program, `held.py STEP:SIGNAL,... COMMAND ...` is `clipkit COMMAND ...` with these signals (as numbers).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence

Plan = Sequence[tuple[int, int]]
"""(step, signal) pairs, the steps in ascending order."""

_CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "os.truncate", "shutil.rmtree")


def at_steps(plan: Plan) -> None:
    """Raise each signal when the log has reached its step, before the log's next line is written.

    A process that torchrun has restarted is left alone.
    """
    due = list(plan) if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else []

    def watch(event: str, arguments: tuple) -> None:
        if due and event == "open" and arguments[1] == "a" and str(arguments[0]).endswith("log.jsonl"):
            with open(arguments[0], encoding="utf-8") as file:
                done = max((json.loads(line)["step"] for line in file), default=0)
            if done >= due[0][0]:
                signal.raise_signal(due.pop(0)[1])

    sys.addaudithook(watch)


def at_access(folder: str, number: int) -> None:
    """SIGKILL before Python's access number `number`, counted from 1, to a file in `folder`."""
    left = [number]

    def watch(event: str, arguments: tuple) -> None:
        if event in _CHANGES and str(arguments[0]).startswith(folder):
            left[0] -= 1
            if not left[0]:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(watch)


def words(plan: Plan) -> str:
    """`plan` as this program's first argument."""
    return ",".join(f"{step}:{int(number)}" for step, number in plan)


if __name__ == "__main__":
    pairs = (pair.split(":") for pair in sys.argv.pop(1).split(","))
    at_steps([(int(step), int(number)) for step, number in pairs])
    runpy.run_module("clipkit", run_name="__main__", alter_sys=True)
