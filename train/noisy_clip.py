"""Fine-tuning of a CLIP on noised images, so that it can guide a denoiser at every noise level.

# Launch command, on two processes and on one:
#   torchrun --nproc_per_node 2 train/noisy_clip.py tiny_imagenet_noisy_clip.toml
#   clipkit noisy-clip drawings_noisy_clip.toml run.steps=200
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clipkit.config import Recipe
from clipkit.data.images import decode, preprocess, to_signed
from clipkit.data.loader import Batch, packs_of, validation_of
from clipkit.data.shards import Shards
from clipkit.errors import RecipeError
from clipkit.guidance.loading import load_autoencoder, load_guide
from clipkit.guidance.metrics.noise_curve import accuracy_at, noise_aware
from clipkit.guidance.networks.noisy_clip import NoisyCLIP, NoisyCLIPConfig, for_latents, noised
from clipkit.guidance.schedule import sample_log_snr
from clipkit.models.pretrained import TRAINED_WITH, identity, load
from clipkit.models.words import words_of
from clipkit.train.finetune import resized
from clipkit.train.launch import TaskSpec
from clipkit.train.losses import LossConfig, info_nce
from clipkit.train.task import Features, Task
from clipkit.zeroshot.heads import class_head

_LEVELS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, float("inf"))
_EVALUATED = 1000


@dataclass(frozen=True)
class NoisyCLIPRecipe(Recipe):
    """Recipe of a noise-aware CLIP."""

    model: NoisyCLIPConfig
    loss: LossConfig

    def __post_init__(self) -> None:
        if self.loss.kind != "info_nce":
            raise RecipeError("a noise-aware CLIP learns by InfoNCE, whose softmax guidance uses; omit loss.kind")


class NoisyPretraining(Task):
    """The contrastive loss of pretraining, on noised images, with a temperature that depends on the noise."""

    kind = "noisy_clip"

    def __init__(self, recipe: NoisyCLIPRecipe, shards: Shards) -> None:
        super().__init__()
        clean = load(recipe.model.clip, "cpu")
        self.recipe = recipe
        self.tokenizer = clean.tokenizer
        self.tokenizers = (clean.tokenizer,)
        self.image_size = clean.model.config.image_size
        clip = clean.model
        where = recipe.model.autoencoder
        self.autoencoder = load_autoencoder(where) if where else None
        self.trained_with = {"model.clip": identity(clip)}
        if self.autoencoder is not None:
            self.trained_with["model.autoencoder"] = identity(self.autoencoder)
            shape = self.autoencoder.config
            self.image_size = shape.image_size
            clip = for_latents(clip, recipe.model, shape.latent_channels, shape.latent_size)
        elif recipe.model.image_size not in (0, self.image_size):
            self.image_size = recipe.model.image_size
            clip = resized(clip, self.image_size)
        self.model: NoisyCLIP = NoisyCLIP(clip, recipe.model.width)
        self.model.clip.text.requires_grad_(recipe.model.train_text)
        packs = packs_of(shards, recipe.data)
        self.bank, self.words = caption_bank(packs, recipe.model.negative_captions, recipe.run.seed), words_of(packs)

    def forward(self, batch: Batch) -> Features:
        """Unit vectors of noised images and captions [b, D], and each image's temperature [b]."""
        x0 = self._clean_input(batch.images)
        lam = sample_log_snr("cosine", len(x0)).to(x0.device)
        clean = torch.rand(len(x0), device=x0.device) < self.recipe.model.clean_fraction
        x, lam = noised(x0, lam, torch.randn_like(x0), clean)
        image, tau = self.model.encode_image(x, lam)
        text = self.model.encode_text(batch.ids(self.tokenizer))
        return image, text, tau

    def _clean_input(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, S, S] -> images in [-1, 1], or their latents."""
        x0 = to_signed(images)
        return x0 if self.autoencoder is None else self.autoencoder.encode(x0)

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric InfoNCE over all ranks; logs the mean temperature."""
        image, text, tau = features
        groups = batch.groups if self.recipe.loss.positives == "group" else None
        value = info_nce(image, text, tau, groups, self.recipe.loss.label_smoothing)
        return value, {"temperature": tau.detach().mean()}

    def compile_targets(self) -> Sequence[nn.Module]:
        """The image tower with its modulations."""
        return [self.model.clip.image]

    def after_step(self) -> None:
        """Keep the clean tower's logit scale at 100 or less."""
        self.model.clip.clamp_logit_scale()

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Zero-shot accuracy at several noise levels, on the first images of a classed validation set."""
        shards = validation_of(self.recipe.data)
        if shards is None or not shards.classes:
            return {}
        head = class_head(self.model.clip, self.tokenizer, shards.classes, shards.templates)
        samples = [shards.read(i) for i in np.linspace(0, len(shards) - 1, min(_EVALUATED, len(shards))).astype(int)]
        images = [preprocess(decode(s.image), self.image_size) for s in samples]
        x0 = torch.cat([self._clean_input(part.to(device)) for part in torch.split(torch.stack(images), 100)])
        labels = torch.tensor([s.label for s in samples], device=device)
        encode = noise_aware(self.model)
        return {f"top1_at_{level:g}": accuracy_at(encode, head, x0, labels, level) for level in _LEVELS}

    def extra_files(self) -> Mapping[str, str]:
        """Tokenizer, negative captions, words, shape of the clean CLIP, and identities of the frozen models."""
        shape = dataclasses.asdict(self.model.clip.config)
        return {
            "tokenizer.json": self.tokenizer.to_json(),
            "bank.json": json.dumps(self.bank, ensure_ascii=False),
            "words.json": json.dumps(self.words, ensure_ascii=False),
            "clip.json": json.dumps(shape),
            TRAINED_WITH: json.dumps(self.trained_with),
        }


def caption_bank(packs: Sequence[Shards], size: int, seed: int) -> list[str]:
    """Up to `size` different captions, as many from each pack: the negatives of a prompt."""
    rng = np.random.default_rng([seed, 2])
    bank: set[str] = set()
    for i, shards in enumerate(packs):
        drawn = rng.choice(len(shards), min(len(shards), 4 * size), replace=False)
        fresh = sorted({c for i in drawn for c in shards.read(int(i)).captions} - bank)
        wanted = (size - len(bank)) // (len(packs) - i)
        bank |= {fresh[j] for j in rng.choice(len(fresh), min(wanted, len(fresh)), replace=False)}
    return sorted(bank)


SPEC = TaskSpec(NoisyCLIPRecipe, NoisyPretraining, load_guide)

run = SPEC.run
"""Train a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["noisy-clip", *sys.argv[1:]])
