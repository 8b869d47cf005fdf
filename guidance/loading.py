"""Loads trained networks from their runs: denoisers, autoencoders (VAE), noise-aware CLIPs and classifiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipkit.checkpoint import Checkpoint
from clipkit.config import from_dict, section_of
from clipkit.errors import CheckpointError
from clipkit.guidance.denoiser import Denoiser, DiffusionConfig, NetworkConfig
from clipkit.guidance.networks.autoencoder import Autoencoder, AutoencoderConfig, from_diffusers, is_diffusers
from clipkit.guidance.networks.classifier import NoisyClassifier
from clipkit.guidance.networks.condition import ClassCondition, ConditionConfig, Conditioner, TextCondition
from clipkit.guidance.networks.dit import DiTConfig
from clipkit.guidance.networks.noisy_clip import NoisyCLIP
from clipkit.guidance.networks.unet import UNetConfig
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.pretrained import load_weights
from clipkit.models.source import find, folder_of, tokenizer_of
from clipkit.models.tokenizer import AnyTokenizer


@dataclass(frozen=True)
class Guide:
    """A noise-aware CLIP with its tokenizer, its negative captions, and the vocabulary of its training."""

    model: NoisyCLIP
    tokenizer: AnyTokenizer
    negative_captions: list[str]
    words: Sequence[str] = ()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [len(texts), D]."""
        return self.model.encode_text(self.tokenizer(list(texts)))


def load_denoiser(path: str | Path) -> Denoiser:
    """Averaged weights of a denoiser run, in evaluation mode on the CPU. Raises CheckpointError."""
    return denoiser_of(find(path, "denoiser"))


def denoiser_of(found: Checkpoint) -> Denoiser:
    """The same out of a checkpoint."""
    recipe = found.state["recipe"]
    unet, dit = recipe.get("unet"), recipe.get("dit")
    network: NetworkConfig = from_dict(UNetConfig, unet) if unet else from_dict(DiTConfig, dit)
    latent = json.loads(found.text("latent.json")) if recipe.get("latent", {}).get("autoencoder") else {"channels": 0}
    diffusion = from_dict(DiffusionConfig, recipe["diffusion"])
    denoiser = Denoiser(network, diffusion, _conditioner(found), int(latent["channels"]))
    load_weights(denoiser, found)
    return denoiser.eval().requires_grad_(False)


def _conditioner(found: Checkpoint) -> Conditioner | None:
    config = from_dict(ConditionConfig, found.state["recipe"].get("condition", {}))
    if config.kind == "class":
        return ClassCondition(json.loads(found.text("classes.json")), config.width)
    return TextCondition(*_towers(found), _words(found)) if config.kind == "text" else None


def _words(found: Checkpoint) -> list[str]:
    return [str(word) for word in json.loads(found.text("words.json", default="[]"))]


_EMBEDDING = (".tower.tokens.weight", "clip.text.tokens.weight")
"""Ends of the names of the token embedding, of a denoiser's text encoder and of a noise-aware CLIP."""


def _towers(found: Checkpoint) -> tuple[CLIP, AnyTokenizer]:
    """A CLIP of the shape that the checkpoint's files describe, its weights not loaded, and its tokenizer.

    A published CLIP may have more rows of token embeddings than its tokenizer has tokens.
    """
    config = section_of(CLIPConfig, "model", json.loads(found.text("clip.json")))
    tokenizer = tokenizer_of(found, config)
    rows = (len(tensor) for name, tensor in found.stream("ema") if name.endswith(_EMBEDDING))
    return CLIP(config, next(rows, tokenizer.vocab_size), tokenizer.end_id), tokenizer


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Averaged weights of an autoencoder run, or a folder of diffusers' AutoencoderKL, in evaluation mode on the CPU.

    `path` is that folder, or one that holds it as `autoencoder`. Raises CheckpointError.
    """
    for folder in (folder_of(path), folder_of(path) / "autoencoder"):
        if is_diffusers(folder):
            return from_diffusers(folder)
    found = find(path, "autoencoder")
    model = Autoencoder(from_dict(AutoencoderConfig, found.state["recipe"]["autoencoder"]))
    prefix = "autoencoder."
    tensors = {n.removeprefix(prefix): t for n, t in found.stream("ema") if n.startswith(prefix)}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{found.path} does not fit its own recipe: {str(error).splitlines()[0][:120]}") from None
    return model.eval().requires_grad_(False)


def load_guide(path: str | Path) -> Guide:
    """Averaged weights of a noisy_clip run, in evaluation mode on the CPU. Raises CheckpointError."""
    return guide_of(find(path, "noisy_clip"))


def guide_of(found: Checkpoint) -> Guide:
    """The same out of a checkpoint."""
    clip, tokenizer = _towers(found)
    model = NoisyCLIP(clip, int(found.state["recipe"]["model"]["width"]))
    load_weights(model, found)
    bank = [str(caption) for caption in json.loads(found.text("bank.json"))]
    return Guide(model.eval().requires_grad_(False), tokenizer, bank, _words(found))


def load_classifier(path: str | Path) -> tuple[NoisyClassifier, list[list[str]]]:
    """Averaged weights of a noisy_classifier run, in evaluation mode on the CPU, and its classes' names.

    Raises CheckpointError.
    """
    found = find(path, "noisy_classifier")
    shape, classes = json.loads(found.text("clip.json")), json.loads(found.text("classes.json"))
    config = section_of(CLIPConfig, "model", shape["config"])
    clip = CLIP(config, int(shape["vocab_size"]), end_id=0)  # its text tower is not used
    tower = NoisyCLIP(clip, int(found.state["recipe"]["model"]["width"]))
    model = NoisyClassifier(tower, len(classes))
    load_weights(model, found)
    return model.eval().requires_grad_(False), classes
