"""What a noise-aware CLIP is trained with, beside the loop."""

import shutil

import pytest
import torch
from toy_distributions import TINY

from clipkit.config import load_recipe
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, RecipeError
from clipkit.guidance.pipeline import Pipeline
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.train import noisy_classifier, noisy_clip, pretrain
from clipkit.train.finetune import resized
from clipkit.train.noisy_clip import caption_bank


def captions(shards):
    return {caption for i in range(len(shards)) for caption in shards.read(i).captions}


def test_the_bank_has_as_many_captions_of_every_pack(packs):
    one, two = Shards(packs / "train"), Shards(packs / "heldout")
    bank = caption_bank([one, two], 40, seed=0)
    assert len(bank) == len(set(bank)) == 40
    assert bank == caption_bank([one, two], 40, seed=0) != caption_bank([one, two], 40, seed=1)
    only = captions(two) - captions(one)
    assert 10 <= len(only & set(bank)) <= 20  # some captions are in both packs
    assert set(bank) <= captions(one) | captions(two)


def test_a_small_pack_gives_what_it_has(packs):
    shards = Shards(packs / "heldout")
    assert set(caption_bank([shards], 10_000, seed=0)) == captions(shards)


def test_it_learns_at_the_denoisers_size(packs, chain, tmp_path):
    """A guide must see what the denoiser draws: of another size it is refused, trained for it it is not."""
    for name in ("clip", "denoiser"):
        shutil.copytree(chain / name, tmp_path / name)
    words = [*TINY, f"data.shards={packs / 'train'}", "data.val=", f"model.clip={chain / 'clip'}"]
    wide = noisy_clip.run("drawings_noisy_clip", [*words, f"run.out={tmp_path / 'wide'}", "model.image_size=48"])
    wide.rename(tmp_path / "noisy_clip")
    with pytest.raises(
        CheckpointError, match=r"sees 48 pixels, the denoiser draws 24; train it with model\.image_size=24"
    ):
        Pipeline.open(tmp_path, "cpu")
    shutil.rmtree(tmp_path / "noisy_clip")
    clip48 = pretrain.run("drawings_clip", [*words[:-1], f"run.out={tmp_path / 'clip48'}", "model.image_size=48"])
    fitting = [f"model.clip={clip48}", f"run.out={tmp_path / 'noisy_clip'}", "model.image_size=24"]
    noisy_clip.run("drawings_noisy_clip", [*words[:-1], *fitting])
    assert Pipeline.open(tmp_path, "cpu").draw("a rocket", n=1, steps=2).images.shape == (1, 3, 24, 24)


def test_a_resized_vit_keeps_its_features_but_for_positions():
    config = CLIPConfig("vit_tiny_patch16_224", 32, embed_dim=16, text_width=32, text_layers=1, text_heads=2)
    torch.manual_seed(0)
    clip = CLIP(config, 100, 99).eval()
    same, large = resized(clip, 32).eval(), resized(clip, 64).eval()
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(same.image(pixels), clip.image(pixels))
    assert large.image.trunk.pos_embed.shape[1] == 1 + 16
    assert large.image(torch.rand(1, 3, 64, 64)).shape == (1, 16)
    torch.testing.assert_close(large.text.state_dict(), clip.text.state_dict())


BOTH = [
    ('model.clip=""', "model.clip is empty"),
    ("model.width=0", "model.width is 0; it must be even"),
    ("model.width=7", "model.width is 7"),
    ("model.clean_fraction=1", "model.clean_fraction is 1.0"),
    ("model.clean_fraction=-0.1", "model.clean_fraction is -0.1"),
    ("model.clean_fraction=nan", "nan"),
    ("model.image_size=-1", "model.image_size is -1"),
]
ALONE = [
    ("model.negative_captions=1", "model.negative_captions is 1"),
    ("model.image_tower=resnet18", "give model.autoencoder too"),
    ("model.image_kwargs={depths=[1]}", "give model.autoencoder too"),
]


@pytest.mark.parametrize(
    ("recipe", "name", "word", "message"),
    [
        *((noisy_clip.NoisyCLIPRecipe, "drawings_noisy_clip", *case) for case in [*BOTH, *ALONE]),
        *((noisy_classifier.ClassifierRecipe, "drawings_noisy_classifier", *case) for case in BOTH),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused_when_they_are_read(recipe, name, word, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(recipe, name, [word])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [("model.image_size=24", "no effect on latents"), ("model.image_kwargs={in_chans=3}", "has in_chans")],
)
def test_what_has_no_effect_on_latents_is_refused(word, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(noisy_clip.NoisyCLIPRecipe, "emoji_latent_noisy_clip", [word])
