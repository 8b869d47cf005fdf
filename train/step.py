"""The gradient of a training step: of the whole batch at once, or by exact gradient accumulation (GradCache).

`backward` takes the place of `loss.backward()` in a loop of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from clipkit import distributed
from clipkit._renamed import former_name
from clipkit.data.loader import Batch
from clipkit.train.batchnorm import keep_running_stats
from clipkit.train.task import Task


def __getattr__(name: str) -> Any:  # PEP 562: names of version 0.1
    return former_name(__name__, name)


def backward(
    task: Task,
    batch: Batch,
    micro_batches: int = 1,
    parallel: nn.Module | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the batch's gradient to the parameters' gradients -> the loss, and scalars that the task logs.

    With `micro_batches` > 1, gradient accumulation by GradCache (Gao et al. 2021, arXiv 2101.06983), in the memory of
    one micro-batch: the features of all micro-batches are computed without a graph, the loss gives their gradients, and
    each micro-batch is forwarded once more, with the random numbers it had, to carry them to the weights. The result is
    that of the whole batch, dropout included. BatchNorm normalises each micro-batch by itself (batchnorm.py says why),
    and running statistics are those of one pass over the micro-batches.

    parallel: `task` as `parallel.wrap` returns it; gradients are averaged over ranks once.
    precision: makes the autocast context in which the features are computed (mixed precision).
    """
    module = parallel or task
    if micro_batches > 1:  # as many on every rank, for collectives match: the one with the fewest samples decides
        micro_batches = max(1, min(micro_batches, *distributed.batch_sizes(len(batch))))
    parts = batch.split(micro_batches)
    if len(parts) > 1:
        return _grad_cache(task, module, batch, parts, precision)
    with precision():
        features = module(batch)
    loss, values = task.loss(features, batch)
    with keep_running_stats(task):  # gradient checkpointing calls blocks again
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), values


def _grad_cache(
    task: Task,
    module: nn.Module,
    batch: Batch,
    parts: Sequence[Batch],
    precision: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient accumulation over micro-batches; `module` is `task`, wrapped for data parallel training."""
    device = batch.images.device
    states = []
    cached = []
    with keep_running_stats(task):
        for part in parts:
            states.append(_random_state(device))
            with torch.no_grad(), precision():
                cached.append(task(part))
    leaves = tuple(torch.cat(column).requires_grad_() for column in zip(*cached, strict=True))
    loss, values = task.loss(leaves, batch)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    of_parts = zip(*(torch.split(g, [len(part) for part in parts]) for g in gradients), strict=True)
    for i, (part, state, of_part) in enumerate(zip(parts, states, of_parts, strict=True)):
        _set_random_state(state, device)
        last = i == len(parts) - 1
        if isinstance(task, FSDPModule):
            task.set_requires_gradient_sync(last)
        with precision():
            features = (module if last else task)(part)
        with keep_running_stats(task):
            _backward_from(features, of_part)
    return loss.detach(), values


def _backward_from(features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Backward from the features that have a graph; a frozen tower's have none."""
    pairs = [(f, g) for f, g in zip(features, gradients, strict=True) if f.requires_grad]
    torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the random number generators that a model on `device` may use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
