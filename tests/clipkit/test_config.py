from dataclasses import asdict

import pytest

from clipkit.config import SHIPPED, load_recipe, to_toml
from clipkit.errors import RecipeError
from clipkit.train.autoencoder import AutoencoderRecipe
from clipkit.train.denoiser import DenoiserRecipe
from clipkit.train.noisy_classifier import ClassifierRecipe
from clipkit.train.noisy_clip import NoisyCLIPRecipe
from clipkit.train.pretrain import PretrainRecipe

KINDS = {
    "noisy_clip": NoisyCLIPRecipe,
    "noisy_classifier": ClassifierRecipe,
    "autoencoder": AutoencoderRecipe,
    "denoiser": DenoiserRecipe,
    "clip": PretrainRecipe,
}


def kind_of(path):
    return next(kind for suffix, kind in KINDS.items() if path.stem.endswith(suffix))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(kind_of(path), path)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe))
    assert load_recipe(kind_of(path), again) == recipe
    assert path.read_text().startswith("#"), "a recipe opens with its command"


def test_overrides_win_and_have_types():
    words = ["run.steps=7", "optim.lr=1", "data.flip=true", "run.out=elsewhere", "model.image_kwargs.patch_size=4"]
    recipe = load_recipe(PretrainRecipe, "drawings_clip", words)
    assert (recipe.run.steps, recipe.optim.lr, recipe.data.flip, recipe.run.out) == (7, 1.0, True, "elsewhere")
    assert recipe.model.image_kwargs["patch_size"] == 4
    assert recipe.model.image_kwargs["kernel_sizes"] == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.stepz=3", r"unknown recipe key run\.stepz; did you mean 'steps'\?"),
        ("rum.steps=3", r"unknown recipe key rum; did you mean 'run'\?"),
        ("run.steps=many", r"run\.steps is 'many' \(str\); it must be of type int"),
        ("run.steps=1.5", r"run\.steps is 1\.5 \(float\); it must be of type int"),
        ("run.steps=true", r"run\.steps is True"),
        ("run.steps=0", r"run\.steps is 0; it must be at least 1"),
        ("run.precision=fp16", r"run\.precision is 'fp16'; did you mean"),
        ("data.crop_scale=0", r"data\.crop_scale is 0"),
        ("model.text_heads=5", r"text_width 96 does not divide by text_heads 5"),
        ("steps=3", r"not of the form section\.key=value"),
        ("run.steps", r"not of the form section\.key=value"),
        ("run.steps.x=1", r"'steps' is a value, not a section"),
        ("run=3", r"not of the form"),
    ],
)
def test_wrong_overrides_are_one_clear_line(word, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(PretrainRecipe, "drawings_clip", [word])
    assert "\n" not in str(error.value)


def test_a_denoiser_has_one_network(tmp_path):
    recipe = tmp_path / "denoiser.toml"
    for sections, good in (("", False), ("[dit]\n", True), ("[unet]\n", True), ("[dit]\n[unet]\n", False)):
        recipe.write_text("[run]\nout = 'x'\nsteps = 1\n[data]\nshards = 'y'\n" + sections)
        if good:
            assert load_recipe(DenoiserRecipe, recipe).network is not None
        else:
            with pytest.raises(RecipeError, match=r"\[unet\] or \[dit\], not both"):
                load_recipe(DenoiserRecipe, recipe)


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at nowhere"):
        load_recipe(PretrainRecipe, "nowhere")
    broken = tmp_path / "broken.toml"
    broken.write_text("run = [")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(PretrainRecipe, broken)
    broken.write_text("[run]\nout = 'x'\n")
    with pytest.raises(RecipeError, match=r"recipe key run\.steps is missing"):
        load_recipe(PretrainRecipe, broken)


def test_fields_are_frozen():
    """The options that users rely on; adding or renaming one is a decision, so it shows here."""
    run = "batch_size compile device ema_decay eval_every grad_clip keep_every keep_last log_every micro_batches out"
    run += " parallel"
    model = "context_length conventions early_size embed_dim grad_checkpointing image_kwargs image_size image_tower"
    model += " init_logit_bias init_logit_scale"
    data = "cache cache_gb colour_jitter crop_scale enlarge flip"
    recipe = asdict(load_recipe(PretrainRecipe, "drawings_clip"))
    assert {section: " ".join(sorted(values)) for section, values in recipe.items()} == {
        "run": f"{run} precision save_every save_minutes seed steps sync_batchnorm tensorboard timeout_minutes",
        "data": f"{data} max_bad_fraction mix shards sharpness_jitter val window workers",
        "optim": "beta1 beta2 decay_share final_lr lr method schedule warmup weight_decay",
        "model": f"{model} merges text_heads text_layers text_width vocab_size",
        "loss": "kind label_smoothing positives",
        "tune": "init init_from layer_decay lock unlock_blocks",
        "distil": "teachers weight",
    }
