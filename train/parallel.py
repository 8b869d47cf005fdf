"""How ranks share a model: a copy each (DDP), or a piece each (FSDP2). Losses and gradients are the same.

With pieces, parameters, gradients, optimizer state and averages are DTensors, of which a rank holds its share; blocks
and towers are put together while they run. The functions here are right for both, and for a single process.
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


def share(task: Task, how: str, device: torch.device) -> nn.Module | None:
    """Spread `task` over the ranks, "ddp" or "fsdp" -> the module whose backward pass averages gradients over them.

    None on a single process. Raises UsageError for a task that cannot be cut in pieces.
    """
    if not distributed.active():
        return None
    if how == "ddp":  # buffers are averaged after the step, so that statistics of each rank by itself count too
        with warnings.catch_warnings():  # torch 2.15 renames this argument; 2.10 knows only the old name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(task, broadcast_buffers=False)
    if not (pieces := task.fsdp_units()):
        raise UsageError(f"run.parallel=fsdp cannot cut a {task.kind} in pieces; omit it")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    scalars = {p for p in task.parameters() if p.ndim == 0}  # nothing to cut
    task.to(memory_format=torch.contiguous_format)  # FSDP cuts nothing else; activations stay channels last
    for piece in pieces:
        fully_shard(piece, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=scalars)
    return task


def finish_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Average over ranks what sharding left alone, then scale the whole gradient to `max_norm` -> its norm before.

    At a `max_norm` of 0 it stays as it is.
    """
    max_norm = max_norm or math.inf
    with_gradient = [p for p in parameters if p.grad is not None]
    if not any(isinstance(p, DTensor) for p in with_gradient):
        return nn.utils.clip_grad_norm_(with_gradient, max_norm)
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    for gradient in whole:
        dist.all_reduce(gradient)
        gradient /= distributed.world_size()
    mine = torch.stack([local(g).square().sum() for g in gradients if isinstance(g, DTensor)]).sum()
    total = distributed.sum_over_ranks(mine) + sum(g.square().sum() for g in whole)
    norm = total.sqrt()
    torch._foreach_mul_([local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, in the memory of the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors put together from all ranks' shares, on rank 0 and its CPU; every rank must call this."""
    found = {}
    for name, tensor in tensors.items():  # one by one: a device has one of them at a time to hold whole
        full = _joined(tensor) if isinstance(tensor, DTensor) else tensor
        if distributed.rank() == 0:
            found[name] = full.cpu() if full is not tensor else full
    return found


def _joined(tensor: DTensor) -> Tensor:
    """All ranks' rows of a tensor, on every rank.

    Not by `DTensor.full_tensor`, which can break the heap: gloo's two threads note the collective that each did last in
    one string, without a lock (torch 2.15, ProcessGroupGloo::runLoop), and where its name has 16 letters or more two of
    them free the same memory. DTensor's is ALLGATHER_COALESCED.
    """
    share = -(-len(tensor) // distributed.world_size())  # FSDP's, as torch.chunk cuts: the last ranks may have less
    rows = [len(range(len(tensor))[r * share : (r + 1) * share]) for r in range(distributed.world_size())]
    return distributed.gather_rows(local(tensor), rows)


def shares(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shares of named tensors; what is not cut belongs to rank 0."""
    return {n: local(t) for n, t in tensors.items() if isinstance(t, DTensor) or distributed.rank() == 0}


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor that every rank has, cut as `example` is."""
    if isinstance(example, DTensor):
        return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
    return tensor
