"""Freed memory: kept while it is asked for, given back afterwards."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from clipkit.malloc import keep_pages

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
MIB = 1 << 20


def faults_of_a_large_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * MIB, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_tensors_come_to_take_the_pages_of_those_before():
    with keep_pages():
        taken = [faults_of_a_large_tensor() for _ in range(12)]
    assert max(taken[-3:]) < 100, taken  # of 16,384 pages of 4 KiB


def test_they_go_back_at_the_end():
    with keep_pages():
        faults_of_a_large_tensor()
        within = resident()
    assert resident() < within - 48 * MIB
