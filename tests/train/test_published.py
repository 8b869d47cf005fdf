"""The tutorial: a published CLIP is fine-tuned on a folder with LiT, averaged back, exported, and searched with."""

import json

import pytest
import torch
from PIL import Image
from published import CONVENTIONS, publish, publish_siglip
from toy_distributions import TINY

import clipkit
from clipkit.config import load_recipe
from clipkit.convert import unpickling
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, RecipeError
from clipkit.models.source import open_source
from clipkit.train import finetune, pretrain
from clipkit.train.averaging import average

SHORT = ["run.steps=2", "run.batch_size=8", "optim.warmup=1", "data.workers=0", "data.flip=true"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published") / "open_clip", "open_clip")


def recipe(packs, out, *words):
    more = [*SHORT, f"data.shards={packs / 'train'}", f"run.out={out}", "optim.lr=1e-2"]
    return load_recipe(pretrain.PretrainRecipe, "finetune_clip", [*more, *words])


def task(packs, out, *words):
    return pretrain.Pretraining(recipe(packs, out, *words), Shards(packs / "train"))


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_the_tutorial(form, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(tmp_path / "original", form)
    for name, colour in (("red car", "red"), ("blue fish", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 30 + i), colour).save(tmp_path / "photos" / name / f"{i}.png")
    commands = [
        "pack photos packs/photos",
        "pretrain finetune_clip.toml finetune.init_from=original",
        "average runs/finetuned original runs/averaged --shares 0.5,0.5",
        f"export --model runs/averaged exported --format {form}",
        "index photos indexes/photos --model exported --device cpu",
    ]
    for line in commands:
        words = line.split()
        code, _, err = command(*words, *(SHORT if words[0] == "pretrain" else []))
        assert code == 0, err
    code, out, err = command("search", "indexes/photos", "a red car", "--device", "cpu", "--json")
    assert code == 0, err
    assert len(json.loads(out)["hits"]) == 12
    start, tuned, mean, exported = (
        clipkit.load(p, "cpu").model for p in ("original", "runs/finetuned", "runs/averaged", "exported")
    )
    theirs, ours, averaged = (m.state_dict() for m in (start, tuned, mean))
    assert all(torch.equal(theirs[n], ours[n]) for n in theirs if n.startswith("image."))  # LiT
    assert not torch.equal(theirs["text.projection.weight"], ours["text.projection.weight"])
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (theirs[name] + ours[name]) / 2)
        assert torch.equal(exported.state_dict()[name], tensor)


def test_shape_switches_tokenizer_and_weights_are_those_of_the_source(packs, original, tmp_path):
    made, source = task(packs, tmp_path, f"finetune.init_from={original}"), open_source(original)
    assert made.recipe.model.conventions == CONVENTIONS
    assert made.recipe.model.image_kwargs == source.config.image_kwargs
    assert (made.image_size, made.tokenizer.context_length) == (24, 16)
    assert made.tokenizer.to_json() == source.tokenizer.to_json()
    assert all(torch.equal(t, source.build().state_dict()[n]) for n, t in made.model.state_dict().items())
    assert not any(p.requires_grad for p in made.model.image.parameters())
    assert "words.json" not in made.extra_files()  # of the words of its first training nothing is known


def test_one_encoder_with_a_new_one_beside_it(packs, original, tmp_path):
    """LiT as in its paper: a published image encoder, and a text encoder of the recipe's shape from scratch."""
    words = [f"finetune.init_from={original}", "finetune.init=image", "model.text_width=48", "model.text_layers=1"]
    made, theirs = task(packs, tmp_path / "a", *words), open_source(original).build()
    shape = made.recipe.model
    assert (shape.text_width, shape.embed_dim, shape.conventions.image_std) == (48, 24, CONVENTIONS.image_std)
    assert shape.conventions.text_activation == "gelu"
    assert made.tokenizer.to_json() != open_source(original).tokenizer.to_json()
    assert torch.equal(made.model.image.projection.weight, theirs.image.projection.weight)
    assert "rocket" in json.loads(made.extra_files()["words.json"])
    tower = ["model.image_tower=clipkit_resnet", "model.image_kwargs={channels=[8, 8], depths=[1, 1]}"]
    words = [f"finetune.init_from={original}", "finetune.init=text", "finetune.lock=text", *tower]
    other = task(packs, tmp_path / "b", *words)
    assert torch.equal(other.model.text.projection.weight, theirs.text.projection.weight)
    assert other.recipe.model.conventions.image_std != CONVENTIONS.image_std
    assert other.recipe.model.conventions.text_activation == "quick_gelu"


def test_published_weights_are_read_once(packs, original, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        unpickling, "read", lambda path, read_file=unpickling.read: read.append(path) or read_file(path)
    )
    task(packs, tmp_path, f"finetune.init_from={original}")
    assert len(read) == 1
    assert not finetune._read  # nor are they held through the training
    task(packs, tmp_path, f"finetune.init_from={original}")
    assert len(read) == 2  # another run reads the file that is there then


def test_the_packaged_model_is_a_source_too(packs, tmp_path):
    made, tiny = task(packs, tmp_path), open_source("clipkit-tiny")
    assert all(torch.equal(t, tiny.build().state_dict()[n]) for n, t in made.model.state_dict().items())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.text_heads=4", r"^model\.text_heads is 4, and .*open_clip has 2; omit it, or set it so$"),
        ("model.embed_dim=32", r"^model\.embed_dim is 32, and .* has 24; omit it"),
        ("model.context_length=77", r"^model\.context_length is 77, and .* has 16; omit it"),
        ("model.image_tower=resnet18", r"^model\.image_tower is 'resnet18', and .* has 'vit_base_patch16_clip_224'"),
        (
            "model.conventions.text_activation=gelu",
            r"^model\.conventions\.text_activation is 'gelu', and .* has 'quick",
        ),
        ("model.conventions.image_mean=[0.5, 0.5, 0.5]", r"^model\.conventions\.image_mean is \[0\.5, .*omit it"),
        ("model.merges=bpe.gz", r"^model\.merges names a vocabulary, and the text encoder of .* has one; omit"),
    ],
)
def test_a_recipe_that_contradicts_the_weights(packs, original, tmp_path, word, message):
    with pytest.raises(RecipeError, match=message):
        recipe(packs, tmp_path, f"finetune.init_from={original}", word)


def test_a_recipe_is_read_before_there_is_the_model_to_start_from(packs, tmp_path):
    place = [f"data.shards={packs / 'train'}", f"run.out={tmp_path / 'run'}"]
    missing = [*place, f"finetune.init_from={tmp_path / 'none'}"]
    read = load_recipe(pretrain.PretrainRecipe, "drawings_clip", missing)  # which has a section [model]
    with pytest.raises(CheckpointError, match="none is not a model: it does not exist"):
        pretrain.Pretraining(read, Shards(packs / "train"))
    with pytest.raises(CheckpointError, match="none is not a model: it does not exist"):
        load_recipe(pretrain.PretrainRecipe, "finetune_clip", missing)


def test_what_a_recipe_may_set_otherwise(packs, original, tmp_path):
    words = ["model.image_size=48", "model.conventions.image_resize=crop", "model.grad_checkpointing=true"]
    made = task(packs, tmp_path, f"finetune.init_from={original}", *words)
    assert made.model.image.trunk.pos_embed.shape[1] == 37
    assert made.recipe.model.conventions.image_resize == "crop"
    wider = "model.image_kwargs={embed_dim=64, depth=2, num_heads=2, patch_size=8, act_layer='quick_gelu'}"
    with pytest.raises(CheckpointError, match=r"has image\..* for .*; omit model\.image_tower and model\.image_kwargs"):
        task(packs, tmp_path, f"finetune.init_from={original}", wider)


def test_averages_of_published_models(packs, original, tmp_path):
    half = average([original, original], tmp_path / "half")
    assert half.is_dir()
    model, theirs = (clipkit.load(place, "cpu") for place in (tmp_path / "half", original))
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), theirs.model.parameters(), strict=True))
    assert model.tokenizer(["a red car"]).equal(theirs.tokenizer(["a red car"]))
    other = publish(tmp_path / "larger", "open_clip", image_size=48)
    with pytest.raises(CheckpointError, match=r"has other encoders than .*: image\.trunk\.pos_embed differs"):
        average([original, other], tmp_path / "mean")
    with pytest.raises(CheckpointError, match="has another tokenizer than"):
        average([original, "clipkit-tiny"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_siglip_with_its_own_tokenizer_and_logit_bias(packs, tmp_path):
    original = publish_siglip(tmp_path / "siglip")
    start = clipkit.load(original, "cpu")
    words = [f"finetune.init_from={original}", f"data.shards={packs / 'train'}", f"run.out={tmp_path / 'run'}"]
    pretrain.run("finetune_clip", [*SHORT, *words, "loss.kind=sigmoid"])
    average([tmp_path / "run", original], tmp_path / "mean", (0, 1))
    tuned, mean = (clipkit.load(tmp_path / name, "cpu") for name in ("run", "mean"))
    captions = ["a red rocket", "two blue fish with one tree"]
    assert tuned.tokenizer(captions).equal(start.tokenizer(captions))
    assert tuned.model.config.conventions == start.model.config.conventions
    assert not torch.equal(tuned.model.logit_bias, start.model.logit_bias)
    assert torch.equal(
        mean.model.encode_text(mean.tokenizer(captions)), start.model.encode_text(start.tokenizer(captions))
    )
    info_nce = task(packs, tmp_path / "other", f"finetune.init_from={original}")  # does not depend on the bias
    assert info_nce.recipe.model.init_logit_bias is None


def test_a_denoiser_is_conditioned_on_captions_by_a_published_text_encoder(packs, tmp_path):
    from clipkit.guidance.loading import load_denoiser
    from clipkit.train import denoiser

    original = publish_siglip(tmp_path / "siglip")
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={tmp_path / 'run'}"]
    denoiser.run("drawings_denoiser", [*words, "condition.kind=text", f"condition.clip={original}"])
    conditioner, start = load_denoiser(tmp_path / "run").conditioner, clipkit.load(original, "cpu")
    captions = ["a red rocket", ""]
    assert conditioner.tokenizer(captions).equal(start.tokenizer(captions))
    with torch.no_grad():
        states, _ = start.model.text.sequence(start.tokenizer(captions))
        assert torch.equal(conditioner(captions).tokens, states)


def test_denoisers_and_guides_of_a_clip_with_more_embedding_rows_than_tokens(packs, tmp_path):
    """As OpenAI's and SigLIP's may be: the rows are those of the stored weights."""
    from clipkit.guidance.loading import load_denoiser, load_guide
    from clipkit.train import denoiser, noisy_clip

    wide = publish(tmp_path / "wide", "open_clip", extra_rows=3)
    data = [*TINY, f"data.shards={packs / 'train'}", "data.val="]
    condition = ["condition.kind=text", f"condition.clip={wide}"]
    denoiser.run("drawings_denoiser", [*data, f"run.out={tmp_path / 'denoiser'}", *condition])
    noisy_clip.run("drawings_noisy_clip", [*data, f"run.out={tmp_path / 'noisy_clip'}", f"model.clip={wide}"])
    expected = clipkit.load(wide, "cpu").model.text.tokens.weight
    assert torch.equal(load_denoiser(tmp_path / "denoiser").conditioner.tower.tokens.weight, expected)
    assert load_guide(tmp_path / "noisy_clip").model.clip.text.tokens.weight.shape == expected.shape
