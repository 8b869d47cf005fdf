"""Training of a noise-aware classifier, for classifier guidance, from a CLIP's image tower on a classed pack.

# Launch command, on two processes and on one:
#   torchrun --nproc_per_node 2 train/noisy_classifier.py drawings_noisy_classifier.toml
#   clipkit noisy-classifier drawings_noisy_classifier.toml run.steps=200
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit import distributed
from clipkit.config import Recipe
from clipkit.data.images import to_signed
from clipkit.data.loader import Batch
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError
from clipkit.guidance.loading import load_classifier
from clipkit.guidance.networks.classifier import NoisyClassifier
from clipkit.guidance.networks.noisy_clip import NoisyCLIP, check_start, noised
from clipkit.guidance.schedule import sample_log_snr
from clipkit.models.pretrained import TRAINED_WITH, identity, load
from clipkit.train.finetune import resized
from clipkit.train.launch import TaskSpec
from clipkit.train.task import Features, Task


@dataclass(frozen=True)
class ClassifierConfig:
    """The CLIP to start from, the noise embedding and the images."""

    clip: str
    """Run of the CLIP whose image tower to start from."""
    width: int = 128
    """Width of the noise embedding."""
    clean_fraction: float = 0.1
    """Share of clean images in each batch."""
    image_size: int = 0
    """Side of the denoiser's images, in pixels; 0: the CLIP's."""

    def __post_init__(self) -> None:
        check_start(self.clip, self)


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """Recipe of a noise-aware classifier."""

    model: ClassifierConfig


class Classification(Task):
    """Cross-entropy of the classes of noised images."""

    kind = "noisy_classifier"

    def __init__(self, recipe: ClassifierRecipe, shards: Shards) -> None:
        super().__init__()
        if not shards.classes or recipe.data.mix:
            raise RecipeError(
                f"{recipe.data.shards} has no classes, or data.mix adds others; a classifier needs one such pack"
            )
        clip = load(recipe.model.clip, "cpu").model
        self.trained_with = {"model.clip": identity(clip)}
        if recipe.model.image_size not in (0, clip.config.image_size):
            clip = resized(clip, recipe.model.image_size)
        self.config = recipe.model
        self.shape = clip.config
        self.image_size = clip.config.image_size
        self.names = shards.classes
        clip.text.requires_grad_(False)
        self.model: NoisyClassifier = NoisyClassifier(NoisyCLIP(clip, recipe.model.width), len(shards.classes))

    def forward(self, batch: Batch) -> Features:
        """Each image's cross-entropy, and whether its class is the most probable: [b] both."""
        x0 = to_signed(batch.images)
        lam = sample_log_snr("cosine", len(x0)).to(x0.device)
        clean = torch.rand(len(x0), device=x0.device) < self.config.clean_fraction
        log_p = self.model(*noised(x0, lam, torch.randn_like(x0), clean))
        return F.nll_loss(log_p, batch.groups, reduction="none"), (log_p.argmax(dim=1) == batch.groups).float()

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the images of all ranks; logs the accuracy."""
        errors, right = features
        return distributed.mean_over_batch(errors), {"accuracy": right.detach().mean()}

    def compile_targets(self) -> Sequence[nn.Module]:
        """The image tower with its modulations."""
        return [self.model.tower.clip.image]

    def after_step(self) -> None:
        """Keep the tower's logit scale at 100 or less."""
        self.model.tower.clip.clamp_logit_scale()

    def extra_files(self) -> Mapping[str, str]:
        """The classes, the shape of the CLIP, and identities of the frozen models."""
        shape = {
            "config": dataclasses.asdict(self.shape),
            "vocab_size": self.model.tower.clip.text.tokens.num_embeddings,
        }
        return {
            "classes.json": json.dumps(self.names, ensure_ascii=False),
            "clip.json": json.dumps(shape),
            TRAINED_WITH: json.dumps(self.trained_with),
        }


SPEC = TaskSpec(ClassifierRecipe, Classification, load_classifier)

run = SPEC.run
"""Train a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["noisy-classifier", *sys.argv[1:]])
