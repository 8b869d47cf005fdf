"""Distributed training: the process group of torchrun, and collectives (all-reduce, all-gather, ring exchange).

Everything here also works on a single process, where it does nothing.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit._renamed import former_name
from clipkit.errors import RankError, UsageError

T = TypeVar("T")


def __getattr__(name: str) -> Any:  # PEP 562: names of version 0.1
    return former_name(__name__, name)


def active() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if active() else 1


def choose_device(wanted: str = "auto") -> torch.device:
    """ "auto" -> cuda, mps or cpu, whichever is there first; under torchrun each rank takes its own GPU.

    Raises UsageError for a device that is not here.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda" and "LOCAL_RANK" in os.environ:
        wanted = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # "meta" holds no number
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {wanted!r} is not available here: {str(error).splitlines()[0][:100]}") from None
    return device


@cache
def computes_in_bf16(device_type: str) -> bool:
    """Whether bf16 is done in hardware: elsewhere it is emulated, and slower than fp32."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu" and platform.system() == "Linux" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 10) -> Iterator[None]:
    """Join the group that torchrun describes in the environment (nccl on GPUs, gloo on CPUs); leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, number, world = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    # After a restart torchrun's store is the same one, and torch (2.15) does not keep the attempts apart in it: a rank
    # would look for the others at the addresses of the dead.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout)
    _Group.store = store
    dist.barrier()  # a rank that fails at once would end the others while they connect to it
    try:
        yield
    finally:
        _Group.store = None
        dist.destroy_process_group()


class _Group:
    """The store through which ranks communicate when their collectives fail."""

    store: Any = None


def all_reduce_max(value: int) -> int:
    """The largest value of any rank; on the CPU, so that no GPU is waited for."""
    if not active():
        return value
    values = torch.tensor([value])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def explain(error: Exception, step: int, timeout_minutes: float) -> Exception:
    """A RankError that names the ranks which do not answer, if that is what `error` is about."""
    if not active() or not any(word in str(error) for word in _LOST):
        return error
    silent = _silent_ranks()
    who = f"rank {', '.join(map(str, silent))} does not answer" if silent else "the connection was lost"
    return RankError(
        f"step {step}: {who} (run.timeout_minutes = {timeout_minutes:g}); rank {rank()} stops. The same command "
        "resumes from the last checkpoint"
    )


_LOST = ("gloo", "NCCL", "ProcessGroup", "Timed out", "Connection closed", "Connection reset", "Broken pipe")
_PATIENCE = 3.0


def _silent_ranks() -> list[int]:
    """Ranks that do not report within `_PATIENCE` seconds that they failed too."""
    others = [r for r in range(world_size()) if r != rank()]
    try:
        _Group.store.set(f"gave_up_{rank()}", "1")
        limit = time.monotonic() + _PATIENCE
        while others and time.monotonic() < limit:
            others = [r for r in others if not _Group.store.check([f"gave_up_{r}"])]
            time.sleep(0.05)
    except RuntimeError:  # the store is gone with the rank that kept it
        return others
    return others


def gather_json(value: Any) -> list[Any]:
    """A value that JSON can hold, of each rank, on every rank."""
    if not active():
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = batch_sizes(len(mine))
    return [json.loads(text.numpy().tobytes()) for text in torch.split(gather_rows(mine, sizes), sizes)]


def sum_counts(counts: Mapping[str, int]) -> Counter[str]:
    """Named counts added up over all ranks, on every rank."""
    if not active():
        return Counter(counts)
    return sum(map(Counter, gather_json(counts)), Counter[str]())


def rank_zero_first(work: Callable[[], T]) -> T:
    """Call `work` on rank 0, and then on the others, which find the files that rank 0 has fetched.

    If it fails on rank 0, the others raise UsageError with the same message.
    """
    found: list[T] = []
    failure = ""
    try:
        if rank() == 0:
            found.append(work())
    except Exception as error:
        failure = str(error) or type(error).__name__
        raise
    finally:
        failure = gather_json(failure)[0]
    if failure:
        raise UsageError(failure)
    return found[0] if found else work()


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce: the elementwise sum over all ranks, on every rank; no gradient."""
    if active():
        values = values.clone()
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """All-reduce floating-point buffers (running statistics of each rank) to their mean."""
    buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
    if not active() or not buffers:
        return
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    for buffer, mean in zip(buffers, torch.split(flat / world_size(), [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def batch_sizes(local: int) -> list[int]:
    """Rows of the batch on each rank; ranks may differ when samples were skipped.

    Gathered on the CPU, so that no GPU is waited for.
    """
    if not active():
        return [local]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([local]))
    return [int(n) for n in torch.cat(sizes).tolist()]


def mean_weight(sizes: Sequence[int]) -> float:
    """W / B for `batch_sizes`: a sum over a rank's samples times this has the batch's mean as its mean over ranks."""
    return len(sizes) / sum(sizes)


def mean_over_batch(*terms: Tensor) -> Tensor:
    """Losses of this rank's samples, each [b, ...] -> a scalar whose mean over ranks is the mean over all samples.

    Summed over the terms and over all dimensions but the first. Ranks may hold different numbers of samples; DDP and
    FSDP average gradients over ranks.
    """
    total = reduce(operator.add, (term.sum() for term in terms))
    return total * mean_weight(batch_sizes(len(terms[0])))


def gather_rows(local: Tensor, sizes: list[int]) -> Tensor:
    """All-gather: [b_r, ...] of each rank -> [sum b_r, ...] on every rank; no gradient."""
    if len(sizes) == 1:
        return local
    # Collectives want equal shapes: ranks with fewer rows are padded, and the padding dropped again.
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:n] for rows, n in zip(gathered, sizes, strict=True)])


def all_gather(local: Tensor) -> Tensor:
    """[b_r, ...] of each rank -> [sum b_r, ...] on every rank, with gradients.

    For losses that compare samples across ranks. A row's gradient is summed over the losses of all ranks, so that DDP's
    mean of the parameters' gradients is the gradient of the mean loss.
    """
    return _Gather.apply(local, batch_sizes(len(local))) if active() else local


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return gather_rows(local, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.split(sum_over_ranks(gradients[0]), ctx.sizes)[rank()], None


def blocks(held: Tensor, sizes: list[int], gathered: bool) -> Iterator[tuple[slice, Tensor, Callable[..., Tensor]]]:
    """The rows of all ranks: in one block if `held` is the result of `gather_rows`, else one rank's rows at a time.

    Each block comes with its slice of all rows, and a function: it takes this rank's contribution to the block's rows
    and returns other ranks' contributions to this rank's rows. Blocks are passed around a ring: rank r starts with its
    own rows, and receives those of r + 1 while it uses them.
    """
    if gathered:
        yield slice(0, len(held)), held, lambda sums: torch.split(sum_over_ranks(sums), sizes)[rank()]
        return
    block = held
    for k in range(len(sizes)):
        owner, following = (rank() + k) % len(sizes), (rank() + k + 1) % len(sizes)
        arrived = _exchange(held, k + 1, sizes[following])
        start = sum(sizes[:owner])
        yield slice(start, start + len(block)), block, lambda sums, k=k: _exchange(sums, -k, len(held))()
        block = arrived()


def _exchange(values: Tensor, by: int, rows: int) -> Callable[[], Tensor]:
    """Send `values` to rank - by -> a function that waits for `rows` rows from rank + by."""
    if by % world_size() == 0:
        return lambda: values
    found = values.new_empty(rows, *values.shape[1:])
    to, source = (rank() - by) % world_size(), (rank() + by) % world_size()
    messages = [dist.P2POp(dist.isend, values.contiguous(), to)] if values.numel() else []
    messages += [dist.P2POp(dist.irecv, found, source)] if found.numel() else []
    under_way = dist.batch_isend_irecv(messages) if messages else []

    def arrived() -> Tensor:
        for message in under_way:
            message.wait()
        return found

    return arrived


def logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Elementwise log of the sum over ranks of exp(values)."""
    if not active():
        return values
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return sum_over_ranks((values - largest).exp()).log() + largest
