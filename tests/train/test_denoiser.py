"""What a denoiser is trained with, beside the loop."""

import json

import pytest
import torch
from toy_distributions import TINY

from clipkit.config import load_recipe
from clipkit.errors import RecipeError
from clipkit.guidance.loading import load_denoiser
from clipkit.guidance.pipeline import Pipeline
from clipkit.train import denoiser


def test_a_variance_is_learned_and_drawn_with(chain, packs, tmp_path):
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={tmp_path / 'denoiser'}", "diffusion.variance=learned"]
    denoiser.run("drawings_denoiser", [*words, "run.steps=12"])
    lines = [json.loads(line) for line in (tmp_path / "denoiser" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    for name in ("clip", "noisy_clip"):
        (tmp_path / name).symlink_to(chain / name)
    model = load_denoiser(tmp_path)
    fraction = model(torch.randn(1, 3, 24, 24), torch.tensor(0.0)).v
    assert not torch.allclose(fraction, torch.full_like(fraction, 0.5))
    drawn = Pipeline.open(tmp_path, "cpu").draw("a cat", n=2, steps=4, sampler="ddpm")
    assert drawn.images.isfinite().all()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("unet.image_size=0", "unet.image_size is 0"),
        ("unet.image_size=-24", "unet.image_size is -24"),
        ("unet.patch_size=0", "unet.patch_size is 0"),
        ("unet.channels=-16", "unet.channels is -16"),
        ("unet.channels=24", "a multiple of 16"),
        ("unet.blocks=0", "unet.blocks is 0"),
        ("unet.multipliers=[]", "unet.multipliers are \\[\\]"),
        ("unet.multipliers=[1,0]", "unet.multipliers are"),
        ("unet.multipliers=[1,2,3,4,5]", "does not divide by 32"),
        ("unet.attention_from=-1", "unet.attention_from is -1"),
        ("unet.head_channels=0", "unet.head_channels is 0"),
        ("unet.head_channels=7", "heads, which do not divide it"),
        ("unet.dropout=1", r"unet.dropout is 1.0; it must be in \[0, 1\)"),
        ("unet.dropout=-0.1", "unet.dropout is -0.1"),
        ("unet.dropout=nan", "nan"),
        ("condition.width=0", "condition.width is 0"),
        ("condition.dropout=nan", "nan"),
        ("condition.dropout=-0.5", "condition.dropout is -0.5"),
        ("condition.clip=x", "condition.clip names"),
        ("dit.width=192", "not both"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused_when_they_are_read(word, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(denoiser.DenoiserRecipe, "drawings_denoiser", [word])
    assert len(str(error.value).splitlines()) == 1


def test_a_description_that_is_always_dropped_is_refused():
    words = ["condition.kind=class", "condition.dropout=1"]
    with pytest.raises(RecipeError, match=r"condition\.dropout is 1, so that no description"):
        load_recipe(denoiser.DenoiserRecipe, "drawings_denoiser", words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dit.image_size=0", "dit.image_size is 0"),
        ("dit.patch_size=0", "dit.patch_size is 0"),
        ("dit.patch_size=5", "does not divide by patch_size 5"),
        ("dit.heads=0", "dit.heads is 0"),
        ("dit.heads=5", "divide by heads 5"),
        ("dit.width=-64", "dit.width is -64"),
        ("dit.depth=0", "dit.depth is 0"),
    ],
)
def test_transformers_that_cannot_be_built_are_refused(word, message, tmp_path):
    recipe = tmp_path / "dit.toml"
    recipe.write_text('[run]\nout = "x"\nsteps = 1\n[data]\nshards = "x"\n[dit]\nwidth = 64\nheads = 2\n')
    assert load_recipe(denoiser.DenoiserRecipe, recipe).dit is not None
    with pytest.raises(RecipeError, match=message):
        load_recipe(denoiser.DenoiserRecipe, recipe, [word])
