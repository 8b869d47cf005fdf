"""Settings of glibc's malloc: memory that one training step frees stays with the process for the next.

glibc takes a large tensor from the system when it is made and gives it back when it is freed, so that each activation
of each step begins with pages that the system has to find and to clear.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3) in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


@contextmanager
def keep_pages() -> Iterator[None]:
    """While it is entered, malloc gives nothing back to the system; afterwards, all that is free.

    Where the C library is not glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_TRIM_THRESHOLD, -1)  # never
    glibc.mallopt(_MMAP_MAX, 0)  # nothing is too large for the heap
    try:
        yield
    finally:
        glibc.mallopt(_TRIM_THRESHOLD, 64 << 20)  # as by glibc's own adjustment, which mallopt turns off
        glibc.mallopt(_MMAP_MAX, 65_536)  # the default
        glibc.malloc_trim(0)


def give_back_large_blocks() -> None:
    """From now on, what has 8 MiB or more goes back to the system when it is freed, whichever thread had it.

    By itself glibc raises this limit to 32 MiB, and keeps smaller blocks in a heap of each thread: those of pictures,
    which Pillow takes 16 MiB at a time, would stay for good.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 8 << 20)
