"""Data parallel training: a replica of the model on each rank (DDP), or a shard of it (FSDP2), with equal gradients.

Under FSDP, parameters, gradients, optimizer state and moving averages are DTensors, of which each rank holds a shard;
the parameters of an FSDP unit are gathered while it runs. The functions here also work under DDP and on one process.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from clipkit import distributed
from clipkit.errors import UsageError
from clipkit.train.task import Task


def wrap(task: Task, how: str, device: torch.device) -> nn.Module | None:
    """Wrap `task` for data parallel training, "ddp" or "fsdp" -> the module whose backward pass averages gradients.

    None on a single process. Raises UsageError for FSDP of a task without FSDP units.
    """
    if not distributed.active():
        return None
    if how == "ddp":  # buffers are averaged after the step: every rank's running statistics count
        with warnings.catch_warnings():  # torch 2.15 renames this argument; 2.10 knows only the old name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(task, broadcast_buffers=False)
    units = task.fsdp_units()
    if not units:
        raise UsageError(f"a {task.kind} has no FSDP units, so that run.parallel=fsdp cannot shard it; omit it")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    scalars = {p for p in task.parameters() if p.ndim == 0}  # FSDP shards the first dimension
    task.to(memory_format=torch.contiguous_format)  # the only format that FSDP shards; activations stay channels last
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=scalars)
    return task


def finish_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """All-reduce gradients that FSDP does not shard, then clip the global norm to `max_norm` -> the norm before.

    A `max_norm` of 0 does not clip.
    """
    max_norm = max_norm or math.inf
    with_gradient = [p for p in parameters if p.grad is not None]
    if not any(isinstance(p, DTensor) for p in with_gradient):
        return nn.utils.clip_grad_norm_(with_gradient, max_norm)
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    unsharded = [g for g in gradients if not isinstance(g, DTensor)]
    for gradient in unsharded:
        dist.all_reduce(gradient)
        gradient /= distributed.world_size()
    sharded = torch.stack([local(g).square().sum() for g in gradients if isinstance(g, DTensor)]).sum()
    total = distributed.sum_over_ranks(sharded) + sum(g.square().sum() for g in unsharded)
    norm = total.sqrt()
    torch._foreach_mul_([local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors, gathered from all ranks' shards, on the CPU of rank 0; every rank must call this."""
    found = {}
    for name, tensor in tensors.items():  # one by one: a device holds one full tensor at a time
        full = _full_tensor(tensor) if isinstance(tensor, DTensor) else tensor
        if distributed.rank() == 0:
            found[name] = full.cpu() if full is not tensor else full
    return found


def _full_tensor(tensor: DTensor) -> Tensor:
    """The full tensor, gathered on every rank.

    Not by `DTensor.full_tensor`, which can break the heap: gloo's two threads write the name of their last collective
    into one string without a lock (torch 2.15, ProcessGroupGloo::runLoop), and a name of 16 letters or more is freed
    twice. DTensor's is ALLGATHER_COALESCED.
    """
    most = -(-len(tensor) // distributed.world_size())  # as torch.chunk does it: the last ranks may have fewer rows
    rows = [len(range(len(tensor))[r * most : (r + 1) * most]) for r in range(distributed.world_size())]
    return distributed.gather_rows(local(tensor), rows)


def local_shards(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of named tensors; rank 0 also has those that are not sharded."""
    return {n: local(t) for n, t in tensors.items() if isinstance(t, DTensor) or distributed.rank() == 0}


def shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A full tensor that every rank has, sharded as `example` is."""
    if isinstance(example, DTensor):
        return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
    return tensor
