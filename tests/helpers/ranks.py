"""Run a function on several gloo ranks; what it returns on each comes back as a list."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def _entry(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple, out: str) -> None:
    from clipkit import distributed

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), timeout_minutes=1):
        torch.save(function(*arguments), f"{out}/{rank}.pt")


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(_entry, (world_size, port, function, arguments, out), nprocs=world_size)
        return [torch.load(Path(out) / f"{r}.pt", weights_only=True) for r in range(world_size)]
