"""The noise-aware CLIP, for classifier guidance: a CLIP whose image encoder is conditioned on the noise level.

Nichol et al. 2021 (GLIDE, arXiv 2112.10741, section 3.2) trained a CLIP on noised images for guidance. Here the noise
level is the continuous lambda, independent of a schedule, and it modulates every block of any timm image encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.config import require
from clipkit.data.images import to_unit
from clipkit.errors import RecipeError
from clipkit.guidance.guiders import LogProb, softmax_log_prob
from clipkit.guidance.networks.layers import noise_embedding
from clipkit.guidance.schedule import expand
from clipkit.models.clip import CLIP, MAX_LOGIT_SCALE
from clipkit.models.towers import residual_blocks


@dataclass(frozen=True)
class NoisyCLIPConfig:
    """Fine-tuning of a clean CLIP on noised images."""

    clip: str
    """Run of the clean CLIP to start from."""
    width: int = 128
    """Width of the noise embedding."""
    clean_fraction: float = 0.1
    """Share of clean images in each batch."""
    train_text: bool = False
    """Also train the text encoder, which is frozen otherwise."""
    negative_captions: int = 256
    """Captions of the packs that are kept beside the weights: the negatives of a prompt."""
    image_size: int = 0
    """Side of the denoiser's pictures in pixels; 0: the clean CLIP's."""
    autoencoder: str = ""
    """Run of an autoencoder (VAE), for noised latents; the image encoder is then a new one, not the clean CLIP's."""
    image_tower: str = "clipkit_resnet"
    """The image encoder for latents: a timm name."""
    image_kwargs: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""

    def __post_init__(self) -> None:
        check_start(self.clip, self)
        if self.negative_captions < 2:
            raise RecipeError(f"model.negative_captions is {self.negative_captions}; a prompt needs at least 2")
        if self.autoencoder and self.image_size:
            raise RecipeError("model.image_size has no effect on latents; omit it, or model.autoencoder")
        if not self.autoencoder and (self.image_kwargs or self.image_tower != "clipkit_resnet"):
            raise RecipeError("model.image_tower and image_kwargs make a tower for latents; give model.autoencoder too")
        if "in_chans" in self.image_kwargs:
            raise RecipeError("model.image_kwargs has in_chans, which are the autoencoder's latent channels; omit it")


def check_start(clip: str, config: object) -> None:
    """Check the [model] section that noise-aware CLIPs and classifiers share. Raises RecipeError."""
    if not clip:
        raise RecipeError("model.clip is empty; it names the CLIP to start from")
    require("even and at least 2", "model", config, "width")  # sines and cosines of the noise level
    require("in [0, 1)", "model", config, "clean_fraction")
    require("at least 0", "model", config, "image_size")


@dataclass(frozen=True)
class GuidanceTarget:
    """A target of guidance: any of `wanted` [P, D] rather than one of the negatives `others` [J, D], unit vectors.

    The objective is log p(wanted) in a softmax over both. Without `others` it is 100 times the mean cosine similarity
    to `wanted`, as in GLIDE (section 3.2).
    """

    wanted: Tensor
    others: Tensor | None = None
    weight: float = 1.0

    def log_prob(self, features: Tensor, temperature: Tensor) -> Tensor:
        """Features [B, D] and their tau [B] -> [B]."""
        if self.others is None:
            return MAX_LOGIT_SCALE * (features @ self.wanted.T).mean(dim=1)
        return softmax_log_prob(features @ torch.cat([self.wanted, self.others]).T, temperature, len(self.wanted))


class NoisyCLIP(nn.Module):
    """x_t and lambda -> unit vectors in the space of the text encoder; clean images have lambda = infinity.

    The output of each block is scaled and shifted by linear functions of the noise embedding, initialised to zero
    (adaLN-zero, Peebles & Xie 2022, arXiv 2212.09748). Before training, all features equal the clean model's.
    """

    def __init__(self, clip: CLIP, width: int) -> None:
        super().__init__()
        self.clip, self.width = clip, width
        blocks = residual_blocks(clip.image.trunk)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * channels) for _, channels in blocks)
        # log tau(lambda): starts at the clean model's logit scale for every lambda.
        self.temperature = nn.Linear(width, 1)
        for layer in [*self.modulations, self.temperature]:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._embedding: Tensor | None = None
        for (block, channels), modulation in zip(blocks, self.modulations, strict=True):
            block.register_forward_hook(self._modulator(modulation, channels))

    def _modulator(self, modulation: nn.Module, channels: int) -> Any:
        """A forward hook, which works for every timm model without changing its code."""

        def hook(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._embedding is None:  # the clean tower, used by itself
                return output
            scale, shift = modulation(self._embedding).chunk(2, dim=1)  # [B, C] each
            channels_first = output.ndim == 4 and output.shape[1] == channels
            shape = (
                (len(output), channels, 1, 1) if channels_first else (len(output), *[1] * (output.ndim - 2), channels)
            )
            modulated: Tensor = output * (1 + scale.view(shape)) + shift.view(shape)
            return modulated

        return hook

    def _embed(self, lam: Tensor) -> Tensor:
        # Clean images have lambda = infinity: the embedding ends at 12.
        embedded: Tensor = self.embed(noise_embedding(lam.clamp(-12, 12), self.width))
        return embedded

    def encode_image(self, x: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """x_t [B, 3, S, S] on the scale of images in [-1, 1], lam [B] -> unit vectors [B, D], tau [B] (at most 100)."""
        embedding = self._embed(lam)
        # Divided by a alone, x_t would grow without bound; x_t itself has unit variance at every lambda.
        pixels = to_unit(x)
        self._embedding = embedding
        try:
            features = F.normalize(self.clip.image(pixels).float(), dim=-1)
        finally:
            self._embedding = None
        tau = (self.clip.log_logit_scale + self.temperature(embedding)[:, 0].float()).exp().clamp(max=MAX_LOGIT_SCALE)
        return features, tau

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> unit vectors [B, D]."""
        return self.clip.encode_text(ids)

    def log_prob(self, targets: Sequence[GuidanceTarget]) -> LogProb:
        """The weighted sum of the targets' log probabilities of x_t, for a guider, in one pass of the image tower."""

        def log_p(x: Tensor, lam: Tensor) -> Tensor:
            features, tau = self.encode_image(x, lam)
            return torch.stack([target.weight * target.log_prob(features, tau) for target in targets]).sum(dim=0)

        return log_p


def for_latents(clip: CLIP, config: NoisyCLIPConfig, channels: int, size: int) -> CLIP:
    """The CLIP's text encoder with a new image encoder for latents [B, channels, size, size] of unit variance."""
    seen = replace(clip.config.conventions, image_mean=(0.5,) * channels, image_std=(0.5,) * channels)
    shape = replace(
        clip.config,
        image_tower=config.image_tower,
        image_kwargs={**config.image_kwargs, "in_chans": channels},
        image_size=size,
        conventions=seen,
    )
    made = CLIP(shape, clip.text.tokens.num_embeddings, clip.text.end_id)
    made.text.load_state_dict(clip.text.state_dict())
    made.log_logit_scale.data.copy_(clip.log_logit_scale.data)
    return made


def noised(x0: Tensor, lam: Tensor, noise: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and lambda, except for rows with bool `clean` [B]: their x_t is x0, and lambda infinity."""
    from clipkit.guidance.schedule import add_noise

    x = torch.where(expand(clean, x0), x0, add_noise(x0, noise, lam))
    return x, torch.where(clean, torch.full_like(lam, torch.inf), lam)
