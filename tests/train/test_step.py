"""The gradient of a batch is the same however it is computed: at once, in parts, on ranks, and in parts on ranks."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from toy_distributions import TINY

from clipkit import distributed
from clipkit.config import load_recipe
from clipkit.data.loader import Stream
from clipkit.data.shards import Shards
from clipkit.models.tokenizer import Tokenizer
from clipkit.train import denoiser, noisy_clip, pretrain
from clipkit.train.losses import LossConfig, info_nce
from clipkit.train.noisy_clip import NoisyPretraining
from clipkit.train.parallel import wrap
from clipkit.train.pretrain import Pretraining, PretrainRecipe
from clipkit.train.step import backward

# A ViT with dropout of patches, paths and features: everything random that a tower may hold.
VIT = (
    "model.image_tower=vit_tiny_patch16_224",
    "model.image_kwargs={patch_size=8, depth=2, embed_dim=32, num_heads=2, drop_path_rate=0.3, proj_drop_rate=0.2}",
)
SIGMOID = ("loss.kind=sigmoid", "model.init_logit_scale=10", "model.init_logit_bias=-10")
LOSSES = {"info_nce": (), "sigmoid": SIGMOID, "group": ("loss.positives=group",)}


def make(packs, out, words, size=22):
    recipe = load_recipe(
        PretrainRecipe,
        "drawings_clip",
        [f"data.shards={packs / 'train'}", f"run.out={out}", "data.workers=0", *VIT, *words],
    )
    torch.manual_seed(0)
    shards = Shards(recipe.data.shards)
    task = Pretraining(recipe, shards)
    batch = next(Stream(shards, recipe.data, task.image_size, size, 0).batches(0, 1))
    return task, batch


def gradients(task, batch, micro_batches, parallel=None):
    torch.manual_seed(1)
    loss, _ = backward(task, batch, micro_batches, parallel)
    return {"loss": loss, **{n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}}


def close(ours, expected):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_give_the_gradient_of_the_whole(packs, tmp_path, loss, parts):
    """22 samples: parts are uneven. Without random layers, as those draw other numbers for other shapes."""
    task, batch = make(packs, tmp_path, LOSSES[loss])
    task.eval()
    expected = gradients(task, batch, 1)
    task.zero_grad()
    close(gradients(task, batch, parts), expected)
    assert "log_logit_scale" in expected
    assert ("logit_bias" in expected) == (loss == "sigmoid")


@pytest.mark.parametrize("kind", [Pretraining, NoisyPretraining])
def test_smoothing_is_what_the_recipe_says(kind):
    image, text = torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=-1)
    features = [image, text, torch.full((8,), 9.0), torch.zeros(8)][: 4 if kind is Pretraining else 3]
    task = SimpleNamespace(recipe=SimpleNamespace(loss=LossConfig(label_smoothing=0.3)))
    loss, _ = kind.loss(task, features, batch=SimpleNamespace(groups=None))
    torch.testing.assert_close(loss, info_nce(image, text, torch.tensor(9.0), label_smoothing=0.3))
    assert loss != info_nce(image, text, torch.tensor(9.0))


def test_parts_replay_the_masks_of_the_features_they_cached(packs, tmp_path):
    """With dropout on: the gradient is that of the features which the loss saw, part by part, masks and all."""
    task, batch = make(packs, tmp_path, ())
    ours = gradients(task, batch, 4)
    task.zero_grad()
    torch.manual_seed(1)  # the same masks, drawn in the same order, with all graphs kept
    whole = [torch.cat(column) for column in zip(*(task(part) for part in batch.split(4)), strict=True)]
    loss, _ = task.loss(tuple(whole), batch)
    loss.backward()
    close(ours, {"loss": loss.detach(), **{n: p.grad for n, p in task.model.named_parameters()}})


def test_a_locked_tower_stays_without_gradient(packs, tmp_path):
    task, batch = make(packs, tmp_path, ())
    task.model.text.requires_grad_(False)
    assert not any(name.startswith("text.") for name in gradients(task, batch, 3))


@pytest.mark.parametrize("task", ["clip", "student", "noisy_clip", "denoiser"])
def test_each_caption_is_tokenised_once(packs, chain, tmp_path, monkeypatch, task):
    """In the loader, and not again for each micro-batch, or by a teacher with the same tokenizer."""
    modules = {"clip": pretrain, "student": pretrain, "noisy_clip": noisy_clip, "denoiser": denoiser}
    more = {
        "clip": [],
        "student": [f'distil.teachers=["{chain / "clip"}"]', f"finetune.init_from={chain / 'clip'}"],
        "noisy_clip": [f"model.clip={chain / 'clip'}"],
        "denoiser": ["condition.kind=text", f"condition.clip={chain / 'clip'}", "condition.drop=0.5"],
    }[task]
    recipe = {"clip": "drawings_clip", "student": "drawings_clip"}.get(task, f"drawings_{task}")
    words = [*TINY, f"data.shards={packs / 'train'}", "data.val=", "data.workers=0", f"run.out={tmp_path}", *more]
    tokenised: list[str] = []

    def encode(tokenizer, texts):
        if any(texts):  # "" stands for no condition
            tokenised.extend(texts)
        return encoded(tokenizer, texts)

    encoded = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", encode)
    modules[task].run(recipe, [*words, "run.steps=3", "run.batch_size=16", "run.micro_batches=4"])
    assert len(tokenised) == 3 * 16


PARTS = (1, 2, 4, 8)


def _on_rank(packs, out, bounds):
    """Every loss in every number of parts, on this rank's share of the samples."""
    found = {}
    for loss, words in LOSSES.items():
        task, batch = make(packs, out, words)
        task.eval()
        where = slice(bounds[distributed.rank()], bounds[distributed.rank() + 1])
        part = dataclasses.replace(
            batch, images=batch.images[where], captions=batch.captions[where], groups=batch.groups[where]
        )
        parallel = wrap(task, "ddp", torch.device("cpu"))
        for parts in PARTS:
            task.zero_grad()
            found[f"{loss} {parts}"] = {n: t.clone() for n, t in gradients(task, part, parts, parallel).items()}
    return found


@pytest.mark.parametrize("bounds", [[0, 9, 22], [0, 8, 15, 22], [0, 5, 10, 16, 22]], ids=["two", "three", "four"])
def test_parts_on_ranks_give_the_gradient_of_the_whole(packs, tmp_path, bounds):
    """Two to four ranks with unequal shares, each in one to eight parts, for every loss; DDP averages once."""
    shares = on_ranks(len(bounds) - 1, _on_rank, packs, tmp_path, bounds)
    for loss, words in LOSSES.items():
        task, batch = make(packs, tmp_path, words)
        task.eval()
        expected = gradients(task, batch, 1)
        value = expected.pop("loss")
        for parts in PARTS:
            ranks = [found[f"{loss} {parts}"] for found in shares]
            torch.testing.assert_close(torch.stack([r.pop("loss") for r in ranks]).mean(), value)
            for rank in ranks:
                close(rank, expected)


def test_every_task_can_be_done_in_parts(packs, tmp_path):
    """Denoisers too: their loss is a mean, their noise is drawn again as it was."""
    from clipkit.train.denoiser import DenoiserRecipe, Denoising

    recipe = load_recipe(
        DenoiserRecipe, "drawings_denoiser", [f"data.shards={packs / 'train'}", f"run.out={tmp_path}", "data.workers=0"]
    )
    shards = Shards(recipe.data.shards)
    task = Denoising(recipe, shards)
    batch = next(Stream(shards, recipe.data, task.image_size, 6, 0).batches(0, 1))
    ours = gradients(task, batch, 2)
    task.zero_grad()
    torch.manual_seed(1)
    loss, _ = task.loss((torch.cat([task(part)[0] for part in batch.split(2)]),), batch)
    loss.backward()
    close(ours, {"loss": loss.detach(), **{n: p.grad for n, p in task.model.named_parameters()}})
