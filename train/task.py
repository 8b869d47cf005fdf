"""What a training task is: a model, the features of each sample, a loss of the features of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clipkit.data.loader import Batch
from clipkit.models.tokenizer import AnyTokenizer

Features = tuple[Tensor, ...]


class Task(nn.Module, ABC):
    """A model, the features it computes for each sample, and the loss of the features of a batch.

    Subclasses set `kind`, `model` and `image_size`, and define `forward` and `loss`; the rest has defaults. Checkpoints
    hold the weights of `model` and nothing else of the task.
    """

    kind: str
    """The task's name in the registry `clipkit.registry.TASKS`."""
    model: nn.Module
    image_size: int
    """Side of the images that `forward` is called with, in pixels."""
    tokenizers: Sequence[AnyTokenizer] = ()
    """Tokenizers that the data loader applies to captions, for `Batch.ids`."""
    progressive = False
    """Whether the model takes smaller images too (data.progressive_size)."""

    @abstractmethod
    def forward(self, batch: Batch) -> Features:
        """Features of each sample: tensors [b, ...] whose rows depend on nothing but their own sample."""

    @abstractmethod
    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, a function of features alone, and scalars to log.

        Its mean over ranks is minimised: `distributed.mean_over_batch` gives the mean over all samples.
        """

    def fsdp_units(self) -> Sequence[nn.Module]:
        """Modules that FSDP shards one by one, inner ones first; each must be used by calling it."""
        return ()

    def compile_targets(self) -> Sequence[nn.Module]:
        """Modules to compile with torch.compile: those whose inputs have few shapes in a whole run."""
        return [self.model]

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def lr_scales(self) -> Mapping[str, float]:
        """Parameter name -> multiple of the learning rate, for parameters of `model` with another than 1."""
        return {}

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Scores of the averaged weights, the same on every rank; called on all of them."""
        return {}

    def extra_files(self) -> Mapping[str, str]:
        """Text files of a checkpoint beside the weights: name -> contents."""
        return {}
