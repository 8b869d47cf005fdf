"""Run a function on several gloo ranks; what it returns on each comes back as a list."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple, out: str) -> None:
    from clipkit import distributed

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is there
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu"), timeout_minutes=10):  # which only a hang takes
        torch.save(function(*arguments), f"{out}/{rank}.pt")


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    # The store that ranks meet in is made here, as torchrun makes it: a port that is looked for and given up again
    # may be another's when rank 0 comes to it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(_entry, (world_size, store.port, function, arguments, out), nprocs=world_size)
        return [torch.load(Path(out) / f"{r}.pt", weights_only=True) for r in range(world_size)]
