"""Training of a diffusion denoiser on a pack: unconditional, or conditional on classes or captions ([condition]).

# Launch command, on two processes and on one:
#   torchrun --nproc_per_node 2 train/denoiser.py tiny_imagenet_denoiser.toml
#   clipkit denoiser drawings_denoiser.toml run.steps=200
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipkit import distributed
from clipkit.config import Recipe
from clipkit.data.images import to_signed
from clipkit.data.loader import Batch, packs_of
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError
from clipkit.guidance.denoiser import (
    Denoiser,
    DiffusionConfig,
    NetworkConfig,
    from_output,
    loss_of,
    target,
    variational_loss,
)
from clipkit.guidance.loading import load_autoencoder, load_denoiser
from clipkit.guidance.networks.autoencoder import LatentConfig
from clipkit.guidance.networks.condition import (
    ClassCondition,
    Condition,
    ConditionConfig,
    Conditioner,
    TextCondition,
)
from clipkit.guidance.networks.dit import DiTConfig
from clipkit.guidance.networks.unet import UNetConfig
from clipkit.guidance.schedule import add_noise, later_log_snr, sample_log_snr
from clipkit.models.pretrained import TRAINED_WITH, identity, load
from clipkit.models.words import words_of
from clipkit.train.launch import TaskSpec
from clipkit.train.task import Features, Task


@dataclass(frozen=True)
class DenoiserRecipe(Recipe):
    """Recipe of a denoiser; its network is the section [unet] or [dit]."""

    diffusion: DiffusionConfig
    condition: ConditionConfig
    latent: LatentConfig
    unet: UNetConfig | None = None
    dit: DiTConfig | None = None

    def __post_init__(self) -> None:
        if (self.unet is None) == (self.dit is None):
            raise RecipeError("a denoiser needs one network: give the recipe a section [unet] or [dit], not both")
        if self.condition.kind != "none" and self.condition.dropout == 1:
            raise RecipeError("condition.dropout is 1, so that no description would be learned; it must be below 1")

    @property
    def network(self) -> NetworkConfig:
        """The section that the recipe has."""
        network = self.unet or self.dit
        assert network is not None
        return network


class Denoising(Task):
    """A denoiser, by default under the simple loss: the squared error of its prediction (Ho et al. 2020, eq. 14)."""

    kind = "denoiser"

    def __init__(self, recipe: DenoiserRecipe, shards: Shards) -> None:
        super().__init__()
        self.condition = recipe.condition
        where = recipe.latent.autoencoder
        self.autoencoder = load_autoencoder(where) if where else None
        self.image_size = recipe.network.image_size
        channels = 0  # pixels
        if self.autoencoder is not None:
            shape = self.autoencoder.config
            self.image_size = shape.image_size
            channels = shape.latent_channels
            if recipe.network.image_size != shape.latent_size:
                raise RecipeError(
                    f"the network's image_size is {recipe.network.image_size}; the latents of {where} have a side of "
                    f"{shape.latent_size}"
                )
        conditioner = _conditioner(recipe, shards)
        self.model: Denoiser = Denoiser(recipe.network, recipe.diffusion, conditioner, channels)
        self.trained_with: dict[str, str] = {}
        if self.autoencoder is not None:
            self.trained_with["latent.autoencoder"] = identity(self.autoencoder)
        if isinstance(conditioner, TextCondition):
            self.trained_with["condition.clip"] = identity(conditioner.tower)
            self.tokenizers = (conditioner.tokenizer,)
            (self.no_caption,) = conditioner.tokenizer.encode([""])

    def forward(self, batch: Batch) -> Features:
        """Each image's loss [b], at noise levels stratified over the batch."""
        x0 = to_signed(batch.images)
        if self.autoencoder is not None:
            x0 = self.autoencoder.encode(x0)
        config = self.model.diffusion
        drawn, eps = sample_log_snr(config.schedule, len(x0)), torch.randn_like(x0)
        lam = drawn.to(x0.device)
        x = add_noise(x0, eps, lam)
        output, fraction = self.model.output(x, lam, self._condition(batch))
        errors = loss_of(config, output, target(config.prediction, x0, eps, lam), lam)
        if fraction is not None:  # the hybrid loss: 0.001 of the bound, whose 1,000 terms one level stands for
            later = later_log_snr(config.schedule, drawn)  # in float64, which not every device has
            said = from_output(config.prediction, output, x, lam).x0
            errors = errors + variational_loss(x0, said, fraction, drawn, later)
        return (errors,)

    def _condition(self, batch: Batch) -> Condition | None:
        """Classes or captions, with condition dropout (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1)."""
        conditioner = self.model.conditioner
        if conditioner is None:
            return None
        dropped = torch.rand(len(batch)) < self.condition.dropout
        if isinstance(conditioner, ClassCondition):
            return conditioner.of_labels(batch.groups, dropped.to(batch.groups.device))
        captions = batch.token_ids(conditioner.tokenizer)
        kept = [self.no_caption if gone else ids for ids, gone in zip(captions, dropped.tolist(), strict=True)]
        return conditioner.of_tokens(conditioner.tokenizer.pad(kept))

    def compile_targets(self) -> Sequence[nn.Module]:
        """The network."""
        return [self.model.network]

    def extra_files(self) -> Mapping[str, str]:
        """The conditioner's files, the latents' shape, and the identities of the frozen models."""
        found = dict(self.model.conditioner.texts()) if self.model.conditioner is not None else {}
        if self.autoencoder is not None:
            found["latent.json"] = json.dumps({"channels": self.model.latent_channels})
        return {**found, TRAINED_WITH: json.dumps(self.trained_with)}

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the images of all ranks."""
        (errors,) = features
        return distributed.mean_over_batch(errors), {}


def _conditioner(recipe: DenoiserRecipe, shards: Shards) -> Conditioner | None:
    config = recipe.condition
    if config.kind == "text":
        clean = load(config.clip, "cpu")
        return TextCondition(clean.model, clean.tokenizer, words_of(packs_of(shards, recipe.data)))
    if config.kind == "class":
        if not shards.classes or recipe.data.mix:
            raise RecipeError(
                f"{recipe.data.shards} has no classes, or data.mix adds others; use condition.kind = text"
            )
        return ClassCondition(shards.classes, config.width)
    return None


SPEC = TaskSpec(DenoiserRecipe, Denoising, load_denoiser)

run = SPEC.run
"""Train a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["denoiser", *sys.argv[1:]])
