"""Pretrain CLIP on a pack.

torchrun --nproc_per_node 2 train/pretrain.py tiny_imagenet_clip.toml data.shards=packs/tiny-imagenet
clipkit pretrain drawings_clip.toml run.steps=200          # the same on one process
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit import distributed
from clipkit.config import Recipe
from clipkit.data.loader import Batch, packs_of, validation_of
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, RecipeError
from clipkit.io import write_atomically
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.source import Source, open_source
from clipkit.models.tokenizer import SMALLEST_VOCABULARY, AnyTokenizer, Tokenizer
from clipkit.models.towers import residual_blocks
from clipkit.models.words import split
from clipkit.train import finetune as tune
from clipkit.train.distil import DistilConfig, Teachers, squared_distance
from clipkit.train.finetune import TuneConfig
from clipkit.train.launch import launch
from clipkit.train.losses import LossConfig, info_nce, sigmoid_loss
from clipkit.train.step import Features, Task

_CAPTIONS = 500_000
"""Samples whose captions are enough for a vocabulary."""


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """Everything that decides what a pretraining run does."""

    model: CLIPConfig
    loss: LossConfig
    tune: TuneConfig
    distil: DistilConfig

    @classmethod
    def complete(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take the keys of [model] that are not given from the CLIP that the run starts from.

        A recipe with [model] can be read before there is that CLIP; training it raises CheckpointError.
        """
        sections = {name: data.get(name, {}) for name in ("tune", "model", "loss")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return data
        init_from = sections["tune"].get("init_from", "")
        init = sections["tune"].get("init", "both")
        if not init_from or not isinstance(init_from, str) or init not in ("both", "image", "text"):
            return data
        try:
            source = open_source(init_from)
        except CheckpointError:
            if sections["model"]:
                return data
            raise
        sigmoid = sections["loss"].get("kind") == "sigmoid"
        return {**data, "model": tune.model_section(source, sections["model"], init, sigmoid)}

    def __post_init__(self) -> None:
        biased = self.model.init_logit_bias is not None
        if self.loss.kind == "sigmoid" and not biased:
            raise RecipeError(
                "loss.kind is sigmoid, which learns a logit bias too; "
                "set model.init_logit_bias=-10 and model.init_logit_scale=10"
            )
        if self.loss.kind == "info_nce" and biased:
            raise RecipeError(
                "model.init_logit_bias is set, which InfoNCE cannot learn; it belongs to loss.kind=sigmoid"
            )


class Pretraining(Task):
    """CLIP under a contrastive loss."""

    kind = "clip"

    def __init__(self, recipe: PretrainRecipe, shards: Shards) -> None:
        super().__init__()
        self.recipe = recipe
        self.image_size, self.early_size = recipe.model.image_size, recipe.model.early_size
        source = recipe.tune.source()
        self.tokenizer = make_tokenizer(recipe, shards, source)
        with_text = source is not None and recipe.tune.init != "image"
        vocabulary = source.vocabulary if source is not None and with_text else self.tokenizer.vocab_size
        self.model: CLIP = CLIP(recipe.model, vocabulary, self.tokenizer.end_id)
        tune.initialise(self.model, recipe.tune, source)
        tune.lock(self.model, recipe.tune)
        self.teachers = Teachers(recipe.distil, recipe.model.embed_dim) if recipe.distil.teachers else None

    def forward(self, batch: Batch) -> Features:
        """Unit vectors of images and captions [b, D], each pair's logit scale and bias [b], and what teachers make."""
        image = self.model.encode_image(batch.images)
        text = self.model.encode_text(self.tokenizer(batch.captions))
        # As rows beside the features, so that the loss is a function of features and nothing else; FSDP wants no views.
        scales = self.model.logit_scale.repeat(len(batch)), self.model.logit_bias.repeat(len(batch))
        return image, text, *scales, *self._taught(batch, image, text)

    def _taught(self, batch: Batch, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Features [b, D] that the teachers make of images and captions; of a locked tower its own."""
        if self.teachers is None:
            return ()
        taught = self.teachers(self.model, batch.images, batch.captions, self.recipe.data.flip)
        return tuple(own.detach() if made is None else made for made, own in zip(taught, (image, text), strict=True))

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The recipe's contrastive loss over all ranks, and the distance to the teachers; logs the logit scale."""
        image, text, scale, bias, *taught = features
        value, logged = _contrastive(self.recipe.loss, (image, text, scale, bias), batch)
        if taught:
            distance = squared_distance(torch.cat([image, text], dim=1), torch.cat(taught, dim=1))
            value, logged = value + self.recipe.distil.weight * distance, {**logged, "distance": distance.detach()}
        return value, logged

    def train(self, mode: bool = True) -> Pretraining:
        """Training mode, but for what is locked."""
        super().train(mode)
        tune.hold_still(self.model)
        return self

    def pieces(self) -> Sequence[nn.Module]:
        """Blocks, then towers."""
        blocks = [block for block, _ in residual_blocks(self.model.image.trunk)]
        return [*blocks, *self.model.text.blocks, self.model.image, self.model.text]

    def networks(self) -> Sequence[nn.Module]:
        """The image tower; the text tower's inputs are as long as the captions are."""
        return [self.model.image]

    def lr_scales(self) -> Mapping[str, float]:
        """Smaller for deeper blocks, if the recipe says so."""
        return tune.lr_scales(self.model, self.recipe.tune)

    def after_step(self) -> None:
        """Keep the logit scale at 100 or less."""
        self.model.clamp_logit_scale()

    @cached_property
    def validation(self) -> Shards | None:
        """The packed validation set, if the recipe names one."""
        return validation_of(self.recipe.data, verify=True)

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Zero-shot scores on the validation set, or retrieval where it has no classes."""
        from clipkit.zeroshot import classify, heads, retrieval
        from clipkit.zeroshot.datasets import from_shards

        if self.validation is None:
            return {}
        if not self.validation.classes:
            return retrieval.evaluate(self.model, self.tokenizer, self.validation)
        images = from_shards("validation", self.validation)
        head = heads.class_head(self.model, self.tokenizer, images.classes, images.templates)
        scores = classify.evaluate(self.model, head, images)
        return {"zeroshot_top1": scores.top1, "zeroshot_top5": scores.top5}

    def texts(self) -> Mapping[str, str]:
        """The tokenizer belongs to the weights, and so do the words of the captions, if they are known."""
        noted = Path(self.recipe.run.out) / "words.json"
        words = {"words.json": noted.read_text(encoding="utf-8")} if noted.is_file() else {}
        return {"tokenizer.json": self.tokenizer.to_json(), **words}


def _contrastive(config: LossConfig, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    image, text, scale, bias = features
    groups = batch.groups if config.positives == "group" else None
    if config.kind == "sigmoid":
        value = sigmoid_loss(image, text, scale, bias, groups)
        return value, {"logit_scale": scale.detach().mean(), "logit_bias": bias.detach().mean()}
    value = info_nce(image, text, scale, groups, config.label_smoothing)
    return value, {"logit_scale": scale.detach().mean()}


def make_tokenizer(recipe: PretrainRecipe, shards: Shards, source: Source | None = None) -> AnyTokenizer:
    """The tokenizer of the text encoder to start from, CLIP's if the recipe names its merges file, or a new one.

    A new one is trained on captions of all packs, once, on rank 0, and kept in the run's folder; so are their words, if
    no caption is omitted.
    """
    config = recipe.model
    if source is not None and recipe.tune.init != "image":
        return source.tokenizer
    if config.merges:
        return Tokenizer.clip(config.merges, config.context_length)
    path = Path(recipe.run.out) / "tokenizer.json"
    # One without checkpoints may be of another recipe, whose run did not begin.
    kept = path.is_file() and (path.parent / "checkpoints").is_dir()
    if not kept and config.vocab_size < SMALLEST_VOCABULARY:  # said by all ranks, before the first writes
        raise RecipeError(
            f"model.vocab_size is {config.vocab_size}; it must be at least {SMALLEST_VOCABULARY}: each has every byte, "
            "inside a word and at its end"
        )
    if distributed.rank() == 0 and not kept:
        packs = packs_of(shards, recipe.data)
        captions = sorted({c for pack in packs for c in pack.captions(_CAPTIONS)})
        path.parent.mkdir(parents=True, exist_ok=True)
        noted = path.with_name("words.json")
        if any(pack.store.remote or len(pack) > _CAPTIONS for pack in packs):
            noted.unlink(missing_ok=True)
        else:
            words = sorted({word for caption in captions for word in split(caption)})
            write_atomically(noted, json.dumps(words, ensure_ascii=False))
        write_atomically(path, Tokenizer.train(captions, config.vocab_size).to_json())
    distributed.barrier()
    return Tokenizer.from_json(path.read_text(encoding="utf-8"), config.context_length)


run = partial(launch, PretrainRecipe, Pretraining)
"""Run a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["pretrain", *sys.argv[1:]])
