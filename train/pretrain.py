"""Pretraining and fine-tuning of CLIP on a pack, by a contrastive loss.

# Launch command, on two processes and on one:
#   torchrun --nproc_per_node 2 train/pretrain.py tiny_imagenet_clip.toml data.shards=packs/tiny-imagenet
#   clipkit pretrain drawings_clip.toml run.steps=200
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from clipkit.models.pretrained import load
from clipkit.models.source import Source
from clipkit.models.tokenizer import SMALLEST_VOCABULARY, AnyTokenizer, Tokenizer
from clipkit.models.towers import residual_blocks
from clipkit.models.words import CAPTIONS, words_of
from clipkit.train import finetune
from clipkit.train.distil import DistilConfig, Teachers, squared_distance
from clipkit.train.finetune import FinetuneConfig
from clipkit.train.launch import TaskSpec
from clipkit.train.losses import LossConfig, contrastive_loss
from clipkit.train.task import Features, Task


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """Recipe of a pretraining or fine-tuning run."""

    model: CLIPConfig
    loss: LossConfig
    finetune: FinetuneConfig
    distil: DistilConfig

    @classmethod
    def complete(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take the keys of [model] that are not given from the CLIP that the run starts from, or from the run resumed.

        A recipe with [model] can be read before there is that CLIP; training it raises CheckpointError.
        """
        sections = {name: data.get(name, {}) for name in ("run", "finetune", "model", "loss")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return data
        init_from = sections["finetune"].get("init_from", "")
        init = sections["finetune"].get("init", "both")
        if not init_from or not isinstance(init_from, str) or init not in ("both", "image", "text"):
            return data
        if resumed := finetune.stored_section(sections["run"].get("out"), sections["model"]):
            return {**data, "model": resumed}
        try:
            source = finetune.open_for_recipe(init_from)
        except CheckpointError:
            if sections["model"]:
                return data
            raise
        sigmoid = sections["loss"].get("kind") == "sigmoid"
        return {**data, "model": finetune.model_section(source, sections["model"], init, sigmoid)}

    def __post_init__(self) -> None:
        has_bias = self.model.init_logit_bias is not None
        if self.loss.takes("logit_bias") and not has_bias:
            raise RecipeError(
                f"loss.kind is {self.loss.kind}, which learns a logit bias; "
                "set model.init_logit_bias=-10 and model.init_logit_scale=10"
            )
        if has_bias and not self.loss.takes("logit_bias"):
            raise RecipeError(
                f"model.init_logit_bias is set, and loss.kind={self.loss.kind} learns no logit bias; omit it, or set "
                "loss.kind=sigmoid"
            )


class Pretraining(Task):
    """CLIP under a contrastive loss."""

    kind = "clip"
    progressive = True

    def __init__(self, recipe: PretrainRecipe, shards: Shards) -> None:
        super().__init__()
        self.recipe = recipe
        self.image_size = recipe.model.image_size
        source = recipe.finetune.source()
        self.tokenizer = make_tokenizer(recipe, shards, source)
        _record_words(recipe, shards, source)
        with_text = source is not None and recipe.finetune.init != "image"
        vocabulary = source.vocabulary if source is not None and with_text else self.tokenizer.vocab_size
        self.model: CLIP = CLIP(recipe.model, vocabulary, self.tokenizer.end_id)
        if recipe.data.progressive_size:
            self.model.image.check_size(recipe.data.progressive_size)
        finetune.initialise(self.model, recipe.finetune, source)
        finetune.lock(self.model, recipe.finetune)
        self.teachers = Teachers(recipe.distil, recipe.model.embed_dim) if recipe.distil.teachers else None
        self.tokenizers = (self.tokenizer, *(self.teachers.tokenizers if self.teachers else ()))

    def forward(self, batch: Batch) -> Features:
        """Unit vectors of images and captions [b, D], logit scale and bias [b], and the teachers' features [b, D]."""
        image = self.model.encode_image(batch.images)
        text = self.model.encode_text(batch.ids(self.tokenizer))
        # As rows beside the features, so that the loss is a function of features and nothing else; FSDP wants no views.
        scales = self.model.logit_scale.repeat(len(batch)), self.model.logit_bias.repeat(len(batch))
        return image, text, *scales, *self._teach(batch, image, text)

    def _teach(self, batch: Batch, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """The teachers' features [b, D] of images and captions; for a locked tower its own."""
        if self.teachers is None:
            return ()
        taught = self.teachers(self.model, batch, self.recipe.data.flip)
        return tuple(own.detach() if made is None else made for made, own in zip(taught, (image, text), strict=True))

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The recipe's contrastive loss over all ranks, and the distance to the teachers; logs the logit scale."""
        image, text, scale, bias, *taught = features
        config = self.recipe.loss
        groups = batch.groups if config.positives == "group" else None
        value = contrastive_loss(config, image, text, scale, bias, groups)
        logged = {"logit_scale": scale.detach().mean()}
        if config.takes("logit_bias"):
            logged["logit_bias"] = bias.detach().mean()
        if taught:
            distance = squared_distance(torch.cat([image, text], dim=1), torch.cat(taught, dim=1))
            value = value + self.recipe.distil.weight * distance
            logged = {**logged, "distance": distance.detach()}
        return value, logged

    def train(self, mode: bool = True) -> Pretraining:
        """Training mode, except for locked modules."""
        super().train(mode)
        finetune.eval_locked(self.model)
        return self

    def fsdp_units(self) -> Sequence[nn.Module]:
        """Blocks, then towers."""
        blocks = [block for block, _ in residual_blocks(self.model.image.trunk)]
        return [*blocks, *self.model.text.blocks, self.model.image, self.model.text]

    def compile_targets(self) -> Sequence[nn.Module]:
        """The image tower; the lengths of the text tower's inputs vary."""
        return [self.model.image]

    def lr_scales(self) -> Mapping[str, float]:
        """Layer-wise learning-rate decay: smaller for early blocks."""
        return finetune.lr_scales(self.model, self.recipe.finetune)

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
            found = retrieval.evaluate(self.model, self.tokenizer, self.validation)
            return {"n": found.n, "texts": found.texts, "skipped": found.skipped.total(), **found.recalls}
        images = from_shards("validation", self.validation)
        head = heads.class_head(self.model, self.tokenizer, images.classes, images.templates)
        scores = classify.evaluate(self.model, head, images)
        return {"zeroshot_top1": scores.top1, "zeroshot_top5": scores.top5}

    def extra_files(self) -> Mapping[str, str]:
        """The tokenizer, and the words of the captions if they are known."""
        noted = Path(self.recipe.run.out) / "words.json"
        words = {"words.json": noted.read_text(encoding="utf-8")} if noted.is_file() else {}
        return {"tokenizer.json": self.tokenizer.to_json(), **words}


def make_tokenizer(recipe: PretrainRecipe, shards: Shards, source: Source | None = None) -> AnyTokenizer:
    """The tokenizer of the text encoder to start from, CLIP's if the recipe names its merges file, or a new one.

    A new one is trained on captions of all packs, once, on rank 0, and kept in the run's folder.
    """
    config = recipe.model
    if source is not None and recipe.finetune.init != "image":
        return source.tokenizer
    if config.merges:
        return Tokenizer.clip(config.merges, config.context_length)
    path = Path(recipe.run.out) / "tokenizer.json"
    # A folder without checkpoints may have one of another recipe, whose run did not start.
    kept = path.is_file() and (path.parent / "checkpoints").is_dir()
    if not kept and config.vocab_size < SMALLEST_VOCABULARY:  # said by all ranks, before the first writes
        raise RecipeError(
            f"model.vocab_size is {config.vocab_size}; it must be at least {SMALLEST_VOCABULARY}: each has every byte, "
            "inside a word and at its end"
        )
    if distributed.rank() == 0 and not kept:
        packs = packs_of(shards, recipe.data)
        captions = sorted({c for pack in packs for c in pack.captions(CAPTIONS)})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, Tokenizer.train(captions, config.vocab_size).to_json())
    distributed.barrier()
    return Tokenizer.from_json(path.read_text(encoding="utf-8"), config.context_length)


def _record_words(recipe: PretrainRecipe, shards: Shards, source: Source | None) -> None:
    """Write the words of all captions that the text encoder is trained on into the folder of a new run, on rank 0.

    None are recorded where some are not known: of a text encoder that was trained elsewhere, or of too many captions.
    """
    out = Path(recipe.run.out)
    if distributed.rank() != 0 or (out / "checkpoints").is_dir():
        return
    words = words_of(packs_of(shards, recipe.data))
    if source is not None and recipe.finetune.init != "image":
        words = sorted({*source.words, *words}) if source.words and words else []
    out.mkdir(parents=True, exist_ok=True)
    if words:
        write_atomically(out / "words.json", json.dumps(words, ensure_ascii=False))
    else:
        (out / "words.json").unlink(missing_ok=True)  # of a run that did not start


SPEC = TaskSpec(PretrainRecipe, Pretraining, load)

run = SPEC.run
"""Train a recipe: `run(path, overrides, dry_run)` -> the run's folder."""


if __name__ == "__main__":
    from clipkit.cli import main

    main(["pretrain", *sys.argv[1:]])
