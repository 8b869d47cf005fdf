import dataclasses
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit import checkpoint, reference
from clipkit.config import RENAMED, SHIPPED, Recipe, RunConfig, from_dict, keys_of, load_recipe, to_toml
from clipkit.errors import RecipeError
from clipkit.registry import TASKS
from clipkit.train.denoiser import DenoiserRecipe
from clipkit.train.noisy_classifier import ClassifierRecipe
from clipkit.train.noisy_clip import NoisyCLIPRecipe
from clipkit.train.pretrain import PretrainRecipe

KINDS = {kind: TASKS[kind].recipe for kind in TASKS.own}


def kind_of(path):
    return KINDS[reference.kind_of(path)]


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
        ("run.stepz=3", r"unknown recipe key run\.stepz; did you mean 'run.steps'\?"),
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
    model = "context_length conventions embed_dim grad_checkpointing image_kwargs image_size image_tower"
    model += " init_logit_bias init_logit_scale"
    data = "cache cache_gb colour_jitter crop_scale flip max_bad_fraction mix progressive_size shards"
    recipe = asdict(load_recipe(PretrainRecipe, "drawings_clip"))
    assert {section: " ".join(sorted(values)) for section, values in recipe.items()} == {
        "run": f"{run} precision save_every save_minutes seed steps sync_batchnorm tensorboard timeout_minutes",
        "data": f"{data} sharpness_jitter shuffle_window upscale_crops val workers",
        "optim": "beta1 beta2 decay_fraction final_lr_fraction lr method schedule warmup weight_decay",
        "model": f"{model} merges text_heads text_layers text_width vocab_size",
        "loss": "kind label_smoothing positives",
        "finetune": "init init_from layer_decay lock unlock_blocks",
        "distil": "teachers weight",
    }


OF_CLIP = (
    "run.out= run.steps=0 run.batch_size=0 run.micro_batches=0 run.micro_batches=129 run.seed=-1",
    "run.seed=9223372036854775808 run.log_every=0 run.save_every=0 run.save_minutes=-1 run.keep_last=0",
    "run.keep_every=-1 run.eval_every=-1 run.ema_decay=1 run.ema_decay=-0.1 run.timeout_minutes=0",
    "run.timeout_minutes=1e9 run.grad_clip=-1 run.grad_clip=-inf run.steps=-inf",
    "data.workers=-1 data.crop_scale=1.1 data.upscale_crops=-1 data.colour_jitter=2 data.sharpness_jitter=-1",
    "data.shuffle_window=-1 data.cache_gb=-1 data.max_bad_fraction=1.5 data.max_bad_fraction=-1 data.mix={a='much'}",
    "data.mix={a=1} data.mix={a=0.0001} data.mix={a=0.9999} data.mix={a=true} data.mix=a",
    "optim.lr=0 optim.lr=-1 optim.warmup=-1 optim.decay_fraction=0",
    "optim.final_lr_fraction=-1 optim.final_lr_fraction=2",
    "optim.weight_decay=-1 optim.beta1=1 optim.beta1=-0.1 optim.beta2=1",
    "model.image_size=0 model.image_size=-32 model.embed_dim=0 model.text_width=0 model.text_layers=0",
    "model.text_heads=0 model.text_heads=-4 model.context_length=2 model.vocab_size=0 data.progressive_size=-1",
    "model.init_logit_scale=0 model.init_logit_scale=101 model.init_logit_bias=nan",
    "model.image_kwargs={drop_path_rate=nan} model.image_kwargs={dims=[8,inf]}",
    "model.image_kwargs={act={slope=nan}} model.conventions={text_norm_eps=0}",
    "model.conventions={image_std=[1.0,0.0,1.0]} model.conventions={image_mean=[0.5]}",
    "model.conventions={pad_id=-1}",
    "loss.label_smoothing=1 loss.label_smoothing=-0.1",
    "finetune.layer_decay=0 finetune.layer_decay=1.5 finetune.unlock_blocks=-1 finetune.unlock_blocks=1",
    "finetune.init=image",
    "distil.weight=0 distil.weight=-1 distil.teachers=[1]",
)
OF_OTHERS = {
    NoisyCLIPRecipe: "model.width=0 model.width=33 model.clean_fraction=2 model.negative_captions=-1",
    ClassifierRecipe: "model.width=0 model.width=33 model.clean_fraction=-1 model.image_size=-1",
}
NAMES = {NoisyCLIPRecipe: "drawings_noisy_clip", ClassifierRecipe: "drawings_noisy_classifier"}
WRONG = [(PretrainRecipe, word) for line in OF_CLIP for word in line.split()]
WRONG += [(kind, word) for kind, words in OF_OTHERS.items() for word in words.split()]


@pytest.mark.parametrize(("kind", "word"), WRONG, ids=[word for _, word in WRONG])
def test_a_value_out_of_its_range_is_refused_by_name(kind, word):
    with pytest.raises(RecipeError) as error:
        load_recipe(kind, NAMES.get(kind, "drawings_clip"), [word])
    assert word.partition("=")[0].rpartition(".")[2] in str(error.value)
    assert "\n" not in str(error.value)


INFINITE = {"run.save_minutes", "run.grad_clip"}
KEYS = sorted({(kind.__name__, key) for kind in KINDS.values() for key, *_ in keys_of(kind)})


@pytest.mark.parametrize(("kind", "key"), KEYS, ids=[f"{kind}-{key}" for kind, key in KEYS])
def test_no_key_of_any_recipe_takes_what_is_no_number(kind, key):
    """NaN, infinities and integers that nothing can hold; the numbers that may be infinite say so."""
    found = next(k for k in KINDS.values() if k.__name__ == kind)
    for value in (math.nan, math.inf, -math.inf, 10**30, -(10**30), 10**400):
        data = {"run": {"out": "x", "steps": 1}, "data": {"shards": "y"}}
        data |= {"model": {"clip": "z"}} if found in NAMES else {}
        data |= {key.split(".")[0]: {**data.get(key.split(".")[0], {})}}
        inside = data
        for part in key.split(".")[:-1]:
            inside = inside.setdefault(part, {})
        inside[key.split(".")[-1]] = value
        if key in INFINITE and value == math.inf:
            assert from_dict(RunConfig, data["run"])
            continue
        with pytest.raises(RecipeError, match=key.split(".")[-1]):
            from_dict(found, data)


def test_infinite_values_survive_a_round_trip(tmp_path):
    recipe = load_recipe(PretrainRecipe, "drawings_clip", ["run.grad_clip=inf", "run.save_minutes=inf"])
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe))
    assert load_recipe(PretrainRecipe, again) == recipe


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_many_digits_is_no_traceback(digits, tmp_path):
    with pytest.raises(RecipeError, match=r"run\.seed"):
        load_recipe(PretrainRecipe, "drawings_clip", [f"run.seed=1{'0' * digits}"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[run]\nout = 'x'\nsteps = 1{'0' * digits}\n[data]\nshards = 'y'\n")
    with pytest.raises(RecipeError):
        load_recipe(PretrainRecipe, recipe)


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(RunConfig)]),
        st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2)),
        max_size=4,
    )
)
def test_a_section_is_a_config_or_one_line(values):
    config, message = None, ""
    try:
        config = from_dict(RunConfig, {"out": "x", "steps": 1, **values}, "run.")
    except RecipeError as error:
        message = str(error)
    if config is None:
        assert message.startswith("run.")
        assert "\n" not in message
    else:
        assert config.steps >= 1
        assert 0 <= config.seed < 2**63
        assert config.grad_clip >= 0


def test_a_former_name_in_an_override_is_said_once_and_taken(capsys):
    words = ["tune.init_from=runs/a", "tune.lock=text", "optim.final_lr=0.1", "data.enlarge=0.5", "model.early_size=16"]
    recipe = load_recipe(PretrainRecipe, "drawings_clip", words)
    assert (recipe.finetune.init_from, recipe.finetune.lock) == ("runs/a", "text")
    assert (recipe.optim.final_lr_fraction, recipe.data.upscale_crops, recipe.data.progressive_size) == (0.1, 0.5, 16)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "clipkit: data.enlarge is now data.upscale_crops",
        "clipkit: model.early_size is now data.progressive_size",
        "clipkit: optim.final_lr is now optim.final_lr_fraction",
        "clipkit: tune is now finetune",
    ]
    load_recipe(PretrainRecipe, "drawings_clip", ["finetune.lock=text"])
    assert not capsys.readouterr().err


def test_a_former_name_in_a_recipe_is_said_once_and_taken(tmp_path, capsys):
    old = tmp_path / "old_clip.toml"
    old.write_text(
        "[run]\nout = 'x'\nsteps = 1\n[data]\nshards = 'y'\nwindow = 3\n[model]\nearly_size = 16\n"
        "[optim]\ndecay_share = 0.3\n[tune]\nlock = 'image'\n"
    )
    recipe = load_recipe(PretrainRecipe, old, ["data.shuffle_window=4"])
    assert (recipe.data.shuffle_window, recipe.data.progressive_size) == (4, 16)
    assert (recipe.optim.decay_fraction, recipe.finetune.lock) == (0.3, "image")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "clipkit: data.window is now data.shuffle_window" in said


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=RENAMED)
def test_both_names_of_a_key_are_refused(old, new, tmp_path):
    if "." not in old:
        old, new = f"{old}.lock", f"{new}.lock"
    kind = next(kind for kind in KINDS if new in [key for key, *_ in keys_of(KINDS[kind])])
    with pytest.raises(RecipeError, match=rf"^{old} is now {new}; give one of them, not both$"):
        load_recipe(KINDS[kind], f"drawings_{kind}", [f"{old}=1", f"{new}=1"])


def test_both_names_in_a_recipe_are_refused(tmp_path):
    recipe = tmp_path / "both_clip.toml"
    for text in ("[optim]\nfinal_lr = 0.1\nfinal_lr_fraction = 0.1\n", "[tune]\n[finetune]\n"):
        recipe.write_text("[run]\nout = 'x'\nsteps = 1\n[data]\nshards = 'y'\n" + text)
        with pytest.raises(RecipeError, match=r"is now finetune; give one|is now optim\.final_lr_fraction; give one"):
            load_recipe(PretrainRecipe, recipe)


def test_every_present_name_is_a_key_and_no_former_one():
    keys = {key for kind in KINDS.values() for key, *_ in keys_of(kind)}
    names = keys | {key.partition(".")[0] for key in keys}
    assert set(RENAMED.values()) <= names
    assert not names & set(RENAMED)


def test_shipped_recipes_use_present_names(capsys):
    for path in SHIPPED.glob("*.toml"):
        load_recipe(kind_of(path), path)
    assert not capsys.readouterr().err


def test_a_former_name_that_another_recipe_class_uses_is_its_own(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own:
        bank: int = 1

    @dataclasses.dataclass(frozen=True)
    class Theirs(Recipe):
        model: Own

    recipe = tmp_path / "theirs.toml"
    recipe.write_text("[run]\nout = 'x'\nsteps = 1\n[data]\nshards = 'y'\n[model]\nbank = 2\n")
    globals()["Own"] = Own  # where the annotation is looked up
    assert load_recipe(Theirs, recipe, ["model.bank=3"]).model.bank == 3


def test_a_checkpoint_with_former_names_is_read_under_the_present_ones(capsys):
    """The fixture was written by the first release."""
    folder = Path(__file__).parents[1] / "fixtures" / "checkpoint-format-1"
    stored = json.loads(next(folder.glob("checkpoints/*/state.json")).read_text())["recipe"]
    assert {"decay_share", "final_lr"} <= stored["optim"].keys()
    recipe = checkpoint.latest(folder).state["recipe"]
    assert recipe["optim"]["decay_fraction"] == stored["optim"]["decay_share"]
    assert recipe["finetune"] == stored["tune"]
    assert from_dict(PretrainRecipe, recipe).data.shuffle_window == stored["data"]["window"]
    assert not capsys.readouterr().err
