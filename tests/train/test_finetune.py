import json

import pytest
import torch
from PIL import Image

from clipkit import checkpoint, load
from clipkit.config import SHIPPED, load_recipe
from clipkit.data.pack import pack
from clipkit.data.shards import Shards
from clipkit.data.sources import RawSample, Source, encode_png
from clipkit.errors import CheckpointError, RecipeError
from clipkit.io import sha256
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.source import open_source
from clipkit.models.tokenizer import Tokenizer
from clipkit.train import finetune, optim, pretrain
from clipkit.train.averaging import average
from clipkit.train.finetune import FinetuneConfig
from clipkit.zeroshot.similarity import unknown_words

VIT = {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
CNN = {"channels": [8, 8], "depths": [1, 1]}
TEXT = {"text_width": 32, "text_layers": 2, "text_heads": 2, "embed_dim": 16, "context_length": 24}


def vit():
    return CLIP(CLIPConfig("vit_tiny_patch16_224", 32, VIT, **TEXT), 50, 2)


def words(packs, out, *more):
    tower = [
        "model.image_tower=vit_tiny_patch16_224",
        "model.image_kwargs={patch_size=8, depth=2, embed_dim=32, num_heads=2}",
    ]
    common = ["run.batch_size=16", "run.steps=2", "optim.warmup=1", "data.workers=0", "data.val=", f"run.out={out}"]
    return [*common, *tower, f"data.shards={packs / 'train'}", *more]


@pytest.fixture(scope="module")
def source(packs, tmp_path_factory):
    out = tmp_path_factory.mktemp("source")
    pretrain.run("drawings_clip", words(packs, out))
    return out


def build(packs, out, *more):
    recipe = load_recipe(pretrain.PretrainRecipe, "drawings_clip", words(packs, out, *more))
    torch.manual_seed(5)
    return pretrain.Pretraining(recipe, Shards(recipe.data.shards))


def test_a_run_that_begins_on_smaller_pictures_ends_on_those_of_the_model_s_size(packs, tmp_path, monkeypatch):
    seen, encode = [], CLIP.encode_image

    def spy(self, images):
        seen.append((self.training, images.shape[-1]))
        return encode(self, images)

    monkeypatch.setattr(CLIP, "encode_image", spy)
    tower = ["model.image_tower=clipkit_resnet", f"model.image_kwargs={{channels={CNN['channels']}, depths=[1, 1]}}"]
    more = [*tower, "data.progressive_size=16", f"data.val={packs / 'heldout'}"]
    pretrain.run("drawings_clip", words(packs, tmp_path, *more, "run.steps=5"))
    assert seen == [(True, 16)] * 3 + [(True, 24)] * 2 + [(False, 24)]
    assert load(tmp_path, "cpu").model.config.image_size == 24


def test_depths_follow_the_order_of_execution():
    image, text = finetune.depths(vit())
    assert image["image.trunk.pos_embed"] == image["image.trunk.patch_embed.proj.weight"] == 0
    assert image["image.trunk.blocks.0.norm1.weight"] == 1
    assert image["image.trunk.blocks.2.mlp.fc1.weight"] == 3
    assert image["image.trunk.norm.weight"] == image["image.projection.weight"] == 4
    assert text["text.tokens.weight"] == 0
    assert text["text.blocks.1.qkv.weight"] == 2
    assert text["text.projection.weight"] == 3


def test_layer_decay_slows_early_layers():
    model = vit()
    scales = finetune.lr_scales(model, FinetuneConfig(layer_decay=0.5))
    assert scales["image.projection.weight"] == 1
    assert scales["image.trunk.blocks.2.mlp.fc1.weight"] == 0.5
    assert scales["image.trunk.pos_embed"] == 0.5**4
    groups = optim.make_optimizer(model, optim.OptimConfig(), scales).param_groups
    found = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert all(found[id(p)] == scales.get(n, 1.0) for n, p in model.named_parameters())


@pytest.mark.parametrize(("unlocked", "trained"), [(0, set()), (1, {"blocks.2", "norm"}), (3, {"blocks", "norm"})])
def test_locking_the_image_tower(unlocked, trained):
    model = vit()
    finetune.lock(model, FinetuneConfig(lock="image", unlock_blocks=unlocked))
    free = [n for n, p in model.image.named_parameters() if p.requires_grad]
    assert all(any(f"trunk.{part}" in n or "projection" in n for part in trained) for n in free)
    assert bool(free) == bool(unlocked)
    assert all(p.requires_grad for p in model.text.parameters())


def test_a_locked_tower_and_its_statistics_do_not_move(packs, tmp_path):
    cnn = [
        "model.image_tower=clipkit_resnet",
        "model.image_kwargs={channels=[8, 8], depths=[1, 1]}",
        "finetune.lock=image",
    ]
    before = build(packs, tmp_path, *cnn).model.image.state_dict()
    torch.manual_seed(0)
    pretrain.run("drawings_clip", words(packs, tmp_path, *cnn))
    after = checkpoint.latest(tmp_path).tensors("model")
    running = [n for n in before if "running" in n]
    assert running
    assert all(torch.equal(after[f"image.{n}"], before[n]) for n in running)
    start = pretrain.Pretraining(
        load_recipe(pretrain.PretrainRecipe, "drawings_clip", words(packs, tmp_path, *cnn)), Shards(packs / "train")
    )
    assert not start.train().model.image.training
    assert start.model.text.training


def test_starts_from_another_runs_weights_and_tokenizer(packs, source, tmp_path):
    task = build(packs, tmp_path, f"finetune.init_from={source}")
    theirs = load(source)
    assert task.tokenizer.to_json() == theirs.tokenizer.to_json()
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(task.model.state_dict()[name], tensor)


def test_one_tower_alone(packs, source, tmp_path):
    task, theirs = build(packs, tmp_path, f"finetune.init_from={source}", "finetune.init=image"), load(source).model
    assert torch.equal(task.model.image.projection.weight, theirs.image.projection.weight)
    assert not torch.equal(task.model.text.projection.weight, theirs.text.projection.weight)


def test_positions_are_interpolated_to_another_image_size(packs, source, tmp_path):
    task, theirs = build(packs, tmp_path, f"finetune.init_from={source}", "model.image_size=48"), load(source).model
    ours = task.model.image.trunk.pos_embed
    assert ours.shape[1] == 37
    assert theirs.image.trunk.pos_embed.shape[1] == 10
    assert torch.equal(ours[:, 0], theirs.image.trunk.pos_embed[:, 0])  # the class token keeps its place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.image_kwargs={patch_size=8, depth=2, embed_dim=64, num_heads=2}",
            r"has image\.trunk\.cls_token 1x1x32 for 1x1x64; omit model\.image_tower and model\.image_kwargs",
        ),
        ("model.image_kwargs={patch_size=8, depth=3, embed_dim=32, num_heads=2}", r"lacks image\.trunk\.blocks\.2"),
    ],
)
def test_weights_of_another_architecture_are_refused(packs, source, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        build(packs, tmp_path, f"finetune.init_from={source}", change)


def test_a_recipe_that_contradicts_the_weights_is_refused(packs, source, tmp_path):
    with pytest.raises(RecipeError, match=r"^model\.embed_dim is 64, and .* has 128; omit it, or set it so$"):
        build(packs, tmp_path, f"finetune.init_from={source}", "model.embed_dim=64")


def test_fine_tuning_trains(packs, source, tmp_path):
    more = [
        f"finetune.init_from={source}",
        "finetune.lock=text",
        "finetune.unlock_blocks=1",
        "finetune.layer_decay=0.7",
    ]
    pretrain.run("drawings_clip", words(packs, tmp_path, *more))
    before, after = load(source).model.state_dict(), load(tmp_path).model.state_dict()
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert "image.projection.weight" in moved
    assert "text.blocks.1.qkv.weight" in moved
    assert "text.blocks.0.qkv.weight" not in moved
    assert "text.tokens.weight" not in moved


def test_words_of_both_trainings_are_recorded(packs, source, tmp_path):
    """A fine-tuned CLIP names the unknown words of a prompt, and so does its average with the CLIP it started from."""
    captions = ["a zebra", "two walruses"]
    samples = [RawSample(encode_png(Image.new("RGB", (24, 24))), (caption,), None) for caption in captions]
    pack(Source(iter(samples), lambda: 2, "animals", [], []), tmp_path / "pack")
    start = [f"finetune.init_from={source}", f"data.shards={tmp_path / 'pack'}", "run.batch_size=2", "run.steps=1"]
    pretrain.run("drawings_clip", words(packs, tmp_path / "run", *start))
    average([source, tmp_path / "run"], tmp_path / "mean")
    before, after, mean = (set(load(run).words) for run in (source, tmp_path / "run", tmp_path / "mean"))
    assert before
    assert after == mean == before | {"a", "zebra", "two", "walruses"}
    assert unknown_words(load(tmp_path / "run"), ["a zebra and a giraffe"]) == ["and", "giraffe"]


@pytest.fixture
def run_of_0_1(packs, source, tmp_path):
    """A fine-tuning run as 0.1 stored it: model.image_size is the default, 32, and that of its source is 24."""
    out = tmp_path / "run"
    pretrain.run("drawings_clip", words(packs, out, f"finetune.init_from={source}", "model.image_size=32"))
    for state in out.glob("checkpoints/*/state.json"):
        manifest = json.loads(state.with_name("manifest.json").read_text())
        stored = json.loads(state.read_text())
        stored["recipe"]["tune"] = stored["recipe"].pop("finetune")
        state.write_text(json.dumps(stored))
        manifest["state.json"] = {"bytes": state.stat().st_size, "sha256": sha256(state)}
        state.with_name("manifest.json").write_text(json.dumps(manifest))
    return out


def test_a_fine_tuning_run_of_0_1_resumes_with_the_shape_that_it_has(packs, source, run_of_0_1, tmp_path):
    recipe = tmp_path / "recipe.toml"
    shipped = (SHIPPED / "drawings_clip.toml").read_text()
    assert "image_size = 24\n" in shipped
    recipe.write_text(shipped.replace("image_size = 24\n", ""))
    start = f"tune.init_from={source}"
    pretrain.run(recipe, words(packs, run_of_0_1, start, "run.steps=3"))
    found = checkpoint.latest(run_of_0_1)
    assert (found.step, found.state["recipe"]["model"]["image_size"]) == (3, 32)
    with pytest.raises(CheckpointError, match=r"another recipe \(model\.image_size: 32 there, 24 here\)"):
        pretrain.run(recipe, words(packs, run_of_0_1, start, "model.image_size=24"))
    assert load_recipe(pretrain.PretrainRecipe, recipe, words(packs, tmp_path / "new", start)).model.image_size == 24


def test_a_merges_file_is_allowed_where_the_source_has_its_vocabulary(packs, source, tmp_path, monkeypatch):
    merges = tmp_path / "merges.txt"
    merges.write_text("")
    more = [f"finetune.init_from={source}", f"model.merges={merges}"]
    theirs = open_source(source).tokenizer
    monkeypatch.setattr(Tokenizer, "clip", lambda *_: theirs)
    assert build(packs, tmp_path / "a", *more).tokenizer.to_json() == theirs.to_json()
    monkeypatch.setattr(Tokenizer, "clip", lambda *_: Tokenizer.train(["another"], 520))
    with pytest.raises(RecipeError, match=r"^model\.merges names a vocabulary"):
        build(packs, tmp_path / "b", *more)
