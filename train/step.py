"""The gradient of one step: of a batch at once, or of its parts one after the other, with the same result.

Users' own loops may call `backward` in place of `loss.backward()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from clipkit import distributed
from clipkit.data.loader import Batch
from clipkit.models.tokenizer import AnyTokenizer
from clipkit.train.batchnorm import undisturbed

Features = tuple[Tensor, ...]

EARLY = 0.6
"""Share of the steps that see smaller pictures, in a task that has an `early_size`."""


class Task(nn.Module, ABC):
    """What is trained: a model, the features it makes of each sample, and the loss of the features of a batch.

    Subclasses set these three, and define `forward` and `loss`; the rest has defaults. Only `model` is saved.
    """

    kind: str
    model: nn.Module
    image_size: int
    tokenizers: Sequence[AnyTokenizer] = ()
    """Tokenizers that the loader runs on captions, for `Batch.ids`."""
    early_size: int = 0
    """Side of the pictures in the first EARLY of the steps, if not image_size."""

    @abstractmethod
    def forward(self, batch: Batch) -> Features:
        """What the loss needs of each sample: tensors [b, ...] whose rows depend on nothing but their own sample."""

    @abstractmethod
    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, of features alone, and scalars to log; the mean over ranks is what counts."""

    def pieces(self) -> Sequence[nn.Module]:
        """Modules that FSDP may cut, inner ones first; each must be used by calling it."""
        return ()

    def networks(self) -> Sequence[nn.Module]:
        """What torch.compile compiles: modules whose inputs have few shapes in a whole run."""
        return [self.model]

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def lr_scales(self) -> Mapping[str, float]:
        """Names of the model's parameters whose learning rate is a share of the recipe's, with that share."""
        return {}

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Scores of the averaged weights, the same on every rank; called on all of them."""
        return {}

    def texts(self) -> Mapping[str, str]:
        """Text files that belong beside the weights."""
        return {}


def backward(
    task: Task,
    batch: Batch,
    micro_batches: int = 1,
    parallel: nn.Module | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the batch to the parameters' -> the loss, and what else the task logs.

    With `micro_batches` > 1 memory is that of one part: the features of all parts are made without a graph, the loss
    gives their gradients, and each part is done again, with the random numbers it had, to carry them to the weights
    (GradCache, Gao et al. 2021, arXiv 2101.06983). The result is that of the whole batch, dropout and all. BatchNorm
    normalises each part by itself (batchnorm.py says why): the result is exact for that, and running statistics are
    those of one pass over the parts. `parallel` is `task` spread over ranks by `parallel.share`; they average once.
    `precision` makes the autocast context of the towers.
    """
    module = parallel or task
    if micro_batches > 1:  # as many on every rank, for ranks meet in each: the one with the fewest samples decides
        micro_batches = max(1, min(micro_batches, *distributed.batch_sizes(len(batch))))
    parts = batch.split(micro_batches)
    if len(parts) == 1:
        with precision():
            features = module(batch)
        loss, values = task.loss(features, batch)
        with undisturbed(task):  # gradient checkpointing calls blocks again
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), values
    states, cached = [], []
    with undisturbed(task):
        for part in parts:
            states.append(_random_state(batch.images.device))
            with torch.no_grad(), precision():
                cached.append(task(part))
    leaves = tuple(torch.cat(column).requires_grad_() for column in zip(*cached, strict=True))
    loss, values = task.loss(leaves, batch)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    shares = zip(*(torch.split(g, [len(part) for part in parts]) for g in gradients), strict=True)
    for i, (part, state, share) in enumerate(zip(parts, states, shares, strict=True)):
        _set_random_state(state, batch.images.device)
        if isinstance(task, FSDPModule):
            task.set_requires_gradient_sync(i == len(parts) - 1)
        with precision():
            again = (module if i == len(parts) - 1 else task)(part)
        with undisturbed(task):
            _carry(again, share)
    return loss.detach(), values


def _carry(features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Backward from those features that have a graph; a frozen tower's have none."""
    pairs = [(f, g) for f, g in zip(features, gradients, strict=True) if f.requires_grad]
    torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """States of the generators that a tower on `device` may draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
