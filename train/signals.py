"""Signals that end a training run: SIGTERM, SIGHUP and Ctrl-C, after a checkpoint is saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from clipkit import distributed
from clipkit.errors import StoppedError
from clipkit.log import say


class Interruption:
    """Context in which SIGTERM, Ctrl-C and SIGHUP are noted, so that the run saves before it ends.

    A second Ctrl-C ends it at once. Under nohup SIGHUP is ignored.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # the only one that Python delivers signals to
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # writing to a terminal that is gone fails
            null = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(null, terminal)
            os.close(null)
        self.signal = number

    @staticmethod
    def obey(number: int, step: int) -> NoReturn:
        """End the run: KeyboardInterrupt for Ctrl-C, StoppedError for the other signals."""
        done = f"saved at step {step}; the same command resumes" if step else "no step was done, nothing is saved"
        if number == signal.SIGINT:
            if distributed.rank() == 0:
                say(done)
            raise KeyboardInterrupt
        raise StoppedError(f"stopped by {signal.Signals(number).name}, {done}")
