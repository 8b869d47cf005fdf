"""Training of an autoencoder (VAE or VQGAN), whose latents a denoiser can learn instead of pixels.

# Launch command, on two processes and on one:
#   torchrun --nproc_per_node 2 train/autoencoder.py emoji_autoencoder.toml
#   clipkit autoencoder emoji_autoencoder.toml run.batch_size=8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit import DEFAULT_MODEL, distributed
from clipkit.config import Recipe, require
from clipkit.data.images import decode, preprocess, to_signed, to_unit
from clipkit.data.loader import Batch, validation_of
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError
from clipkit.guidance.loading import load_autoencoder
from clipkit.guidance.metrics.extractors import activations
from clipkit.guidance.metrics.pairwise import lpips, mean_psnr, psnr
from clipkit.guidance.networks.autoencoder import SMALLEST, Autoencoder, AutoencoderConfig, Discriminator, frozen_scores
from clipkit.models.pretrained import TRAINED_WITH, identity, load
from clipkit.train.launch import TaskSpec
from clipkit.train.task import Features, Task

_EVALUATED = 200


@dataclass(frozen=True)
class ReconstructionConfig:
    """Terms of the reconstruction loss."""

    perceptual: float = 1.0
    """Weight of the perceptual loss: the distance between features of a CLIP's image tower (unlearned LPIPS)."""
    features: str = DEFAULT_MODEL
    """CLIP of the perceptual loss."""
    regularisation: float = 1e-4
    """Weight of the KL term, or of a codebook's commitment loss (there 0.25 is usual)."""
    adversarial: float = 0.5
    """Weight of the discriminator's score, times the adaptive weight; 0 trains no discriminator."""
    adversarial_from: int = 1000
    """Step from which the discriminator is trained and used."""

    def __post_init__(self) -> None:
        names = ("perceptual", "regularisation", "adversarial", "adversarial_from")
        require("at least 0", "reconstruction", self, *names)
        if self.perceptual and not self.features:
            raise RecipeError(
                "reconstruction.features names no CLIP for reconstruction.perceptual; give one, or 0 to it"
            )


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """Recipe of an autoencoder."""

    autoencoder: AutoencoderConfig
    reconstruction: ReconstructionConfig

    def __post_init__(self) -> None:
        judged = self.reconstruction
        if not judged.adversarial:
            return
        if judged.adversarial_from >= self.run.steps:
            raise RecipeError(
                f"reconstruction.adversarial_from is {judged.adversarial_from}, and run.steps {self.run.steps}: the "
                "discriminator would never come in; give an earlier step, or reconstruction.adversarial=0"
            )
        if self.autoencoder.image_size < SMALLEST:
            raise RecipeError(
                f"pictures of {self.autoencoder.image_size} pixels are too small for the discriminator, which needs "
                f"{SMALLEST}; give reconstruction.adversarial=0"
            )


class Adversaries(nn.Module):
    """The autoencoder, its discriminator, and the steps that they have been trained."""

    steps: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.autoencoder, self.discriminator = Autoencoder(config), Discriminator(image_size=config.image_size)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class Reconstruction(Task):
    """Pixels, features, a discriminator and a prior, as in VQGAN (Esser et al. 2021, arXiv 2012.09841, section 3.1).

    Autoencoder and discriminator are trained in the same step, on the same images: neither's loss has a gradient to the
    other.
    """

    kind = "autoencoder"

    def __init__(self, recipe: AutoencoderRecipe, shards: Shards) -> None:
        super().__init__()
        self.recipe = recipe
        self.image_size = recipe.autoencoder.image_size
        self.weights = recipe.reconstruction
        self.model: Adversaries = Adversaries(recipe.autoencoder)
        clip = load(self.weights.features, "cpu").model if self.weights.perceptual else None
        self.seen_size = clip.config.image_size if clip is not None else 0
        self.tower = clip.image.requires_grad_(False).eval() if clip is not None else None
        self.trained_with = {"reconstruction.features": identity(clip.image)} if clip is not None else {}
        self._variance = torch.ones(())
        self._logged: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Reconstruction:
        """Training mode, except for the perceptual loss's tower."""
        super().train(mode)
        if self.tower is not None:
            self.tower.eval()
        return self

    def forward(self, batch: Batch) -> Features:
        """Of each image the autoencoder's loss, the discriminator's loss and the reconstruction loss: [b] each."""
        x = to_signed(batch.images)
        model = self.model.autoencoder
        z, regularising = model.embed(x)
        if torch.is_grad_enabled():
            self._variance = z.detach().var()
        hidden = model.decoder.before_head(model.after(z))
        y = model.decoder.head(hidden).float()
        loss = self.distance(y, x)
        total = loss + self.weights.regularisation * regularising
        # Zero, with a graph to every weight of the discriminator: DDP expects a gradient of each.
        judged = torch.zeros_like(total) + sum(0.0 * p.sum() for p in self.model.discriminator.parameters())
        if self.weights.adversarial and self.model.steps >= self.weights.adversarial_from:
            weight = self.weights.adversarial * self._balance(hidden, x)
            total = total - weight * frozen_scores(self.model.discriminator, y)
            real, made = (self.model.discriminator(images).flatten(1) for images in (x, y.detach()))
            judged = (F.relu(1 - real).mean(dim=1) + F.relu(1 + made).mean(dim=1)) / 2  # the hinge
        return total, judged, loss.detach()

    def compile_targets(self) -> Sequence[nn.Module]:
        """The encoder and the discriminator; the decoder is called in two parts."""
        return [self.model.autoencoder.encoder, self.model.discriminator]

    def distance(self, y: Tensor, x: Tensor) -> Tensor:
        """Reconstruction loss of images y [b, 3, S, S] for x: absolute difference, and perceptual loss -> [b]."""
        apart = (y - x).abs().flatten(1).mean(dim=1)
        if self.tower is None:
            return apart
        size = (self.seen_size, self.seen_size)
        views = (to_unit(F.interpolate(p, size=size, mode="bilinear", antialias=True)) for p in (y, x))
        return apart + self.weights.perceptual * lpips(*(activations(self.tower, view) for view in views))

    def _balance(self, hidden: Tensor, x: Tensor) -> Tensor:
        """Gradient of the distance over that of the score, at the last layer: the adaptive weight (equation 7).

        Computed on the images at hand: those of one rank, and of one micro-batch.
        """
        head = self.model.autoencoder.decoder.head
        bias = head.bias.detach() if head.bias is not None else None
        with torch.enable_grad():
            weight = head.weight.detach().requires_grad_()
            y = F.conv2d(hidden.detach(), weight, bias, padding=1).float()
            (near,) = torch.autograd.grad(self.distance(y, x).mean(), weight, retain_graph=True)
            (real,) = torch.autograd.grad(-frozen_scores(self.model.discriminator, y).mean(), weight)
        balance: Tensor = (near.norm() / (real.norm() + 1e-4)).clamp(max=1e4)
        return balance

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The means of both losses over the images of all ranks."""
        total, judged, distance = features
        values = {"distance": distance.mean(), "discriminator": judged.detach().mean(), **self._logged}
        return distributed.mean_over_batch(total, judged), values

    def extra_files(self) -> Mapping[str, str]:
        """Identity of the perceptual loss's CLIP."""
        return {TRAINED_WITH: json.dumps(self.trained_with)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the latents' standard deviation and the codebook, count the step."""
        model = self.model.autoencoder
        variance = distributed.sum_over_ranks(self._variance.float()) / distributed.world_size()
        done = int(self.model.steps)
        kept = min(0.99, done / (10 + done))  # warmed up, so that early values are soon forgotten
        model.spread.copy_((kept * model.spread.square() + (1 - kept) * variance).sqrt())
        if model.codebook is not None:
            self._logged = {"codebook_used": model.codebook.follow()}
        self.model.steps += 1

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """PSNR in dB of reconstructions of the first validation images; exact ones are counted apart."""
        shards, model = validation_of(self.recipe.data), self.model.autoencoder
        if shards is None:
            return {}
        ratios = []
        with torch.no_grad():
            for i in range(min(_EVALUATED, len(shards))):
                pixels = preprocess(decode(shards.read(i).image), self.image_size)[None].to(device)
                x = to_signed(pixels)
                ratios.append(psnr(model.decode(model.encode(x)).clamp(-1, 1), x))
        decibels, exact = mean_psnr(torch.cat(ratios))
        scores = {"latent_spread": float(model.spread), **({"exact": exact} if exact else {})}
        return scores if exact == len(ratios) else {"psnr": decibels, **scores}


SPEC = TaskSpec(AutoencoderRecipe, Reconstruction, load_autoencoder)

run = SPEC.run
"""Train a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["autoencoder", *sys.argv[1:]])
