"""Train a diffusion denoiser on the images of a pack, alone or with their classes or captions ([condition]).

torchrun --nproc_per_node 2 train/denoiser.py tiny_imagenet_denoiser.toml
clipkit denoiser drawings_denoiser.toml run.steps=200      # the same on one process
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clipkit import distributed
from clipkit.config import Recipe
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
from clipkit.guidance.loading import load_autoencoder
from clipkit.guidance.networks.autoencoder import LatentConfig
from clipkit.guidance.networks.condition import (
    ClassCondition,
    Condition,
    ConditionConfig,
    Conditioner,
    TextCondition,
    words_of,
)
from clipkit.guidance.networks.dit import DiTConfig
from clipkit.guidance.networks.unet import UNetConfig
from clipkit.guidance.schedule import add_noise, later_log_snr, sample_log_snr
from clipkit.models.pretrained import TRAINED_WITH, identity, load
from clipkit.train.launch import launch
from clipkit.train.step import Features, Task


@dataclass(frozen=True)
class DenoiserRecipe(Recipe):
    """Everything that decides what a denoiser's training does; its network is the section [unet] or [dit]."""

    diffusion: DiffusionConfig
    condition: ConditionConfig
    latent: LatentConfig
    unet: UNetConfig | None = None
    dit: DiTConfig | None = None

    def __post_init__(self) -> None:
        if (self.unet is None) == (self.dit is None):
            raise RecipeError("a denoiser needs one network: give the recipe a section [unet] or [dit], not both")
        if self.condition.kind != "none" and self.condition.drop == 1:
            raise RecipeError("condition.drop is 1, so that no description would be learned; it must be below 1")

    @property
    def network(self) -> NetworkConfig:
        """The section that is there."""
        found = self.unet or self.dit
        assert found is not None
        return found


class Denoising(Task):
    """A denoiser, by default under the simple loss: squared error of what it predicts (Ho et al. 2020, eq. 14)."""

    kind = "denoiser"

    def __init__(self, recipe: DenoiserRecipe, shards: Shards) -> None:
        super().__init__()
        self.condition, where = recipe.condition, recipe.latent.autoencoder
        self.autoencoder = load_autoencoder(where) if where else None
        self.image_size, channels = recipe.network.image_size, 0
        if self.autoencoder is not None:
            shape = self.autoencoder.config
            self.image_size, channels = shape.image_size, shape.latent_channels
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

    def forward(self, batch: Batch) -> Features:
        """Each image's loss [b], at noise levels stratified over the batch."""
        x0 = batch.images.float() / 127.5 - 1
        if self.autoencoder is not None:
            x0 = self.autoencoder.encode(x0)
        config = self.model.diffusion
        drawn, eps = sample_log_snr(config.schedule, len(x0)), torch.randn_like(x0)
        lam = drawn.to(x0.device)
        x = add_noise(x0, eps, lam)
        output, fraction = self.model.output(x, lam, self._described(batch))
        errors = loss_of(config, output, target(config.prediction, x0, eps, lam), lam)
        if fraction is not None:  # the hybrid loss: 0.001 of the bound, whose 1,000 terms one level stands for
            later = later_log_snr(config.schedule, drawn)  # in float64, which not every device has
            said = from_output(config.prediction, output, x, lam).x0
            errors = errors + variational_loss(x0, said, fraction, drawn, later)
        return (errors,)

    def _described(self, batch: Batch) -> Condition | None:
        """Classes or captions, a share of them dropped."""
        conditioner = self.model.conditioner
        if conditioner is None:
            return None
        dropped = torch.rand(len(batch)) < self.condition.drop
        if isinstance(conditioner, ClassCondition):
            return conditioner.of_labels(batch.groups, dropped.to(batch.groups.device))
        kept = ["" if gone else c for c, gone in zip(batch.captions, dropped.tolist(), strict=True)]
        condition: Condition = conditioner(kept)
        return condition

    def networks(self) -> Sequence[nn.Module]:
        """The network; its parametrisation is a few products."""
        return [self.model.network]

    def texts(self) -> Mapping[str, str]:
        """What descriptions and latents need beside the weights."""
        found = dict(self.model.conditioner.texts()) if self.model.conditioner is not None else {}
        if self.autoencoder is not None:
            found["latent.json"] = json.dumps({"channels": self.model.latent_channels})
        return {**found, TRAINED_WITH: json.dumps(self.trained_with)}

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the images of all ranks."""
        (errors,) = features
        # Ranks may hold different numbers of images: weighted so that the mean over ranks is the mean over all images.
        sizes = distributed.batch_sizes(len(errors))
        return errors.sum() * (len(sizes) / sum(sizes)), {}


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


run = partial(launch, DenoiserRecipe, Denoising)
"""Run a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["denoiser", *sys.argv[1:]])
