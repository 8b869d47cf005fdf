"""Distillation: what is to be made is the mean of what teachers make, and a student comes to make it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from external_models import CONFIGS, TEXT, theirs, written
from PIL import Image
from ranks import on_ranks
from toy_distributions import TINY

import clipkit
from clipkit import distributed
from clipkit.config import load_recipe
from clipkit.data.loader import Stream
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, RecipeError
from clipkit.models import pretrained
from clipkit.train import pretrain
from clipkit.train.distil import squared_distance
from clipkit.train.plan import DEVICES, plan
from clipkit.train.pretrain import Pretraining, PretrainRecipe
from clipkit.train.step import backward

VIT = (
    "model.image_tower=vit_tiny_patch16_224",
    "model.image_kwargs={patch_size=8, depth=1, embed_dim=32, num_heads=2}",
)


@pytest.fixture(scope="module")
def teachers(packs, tmp_path_factory):
    """Two CLIPs, the second of them what further training made of the first."""
    runs = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for run, more in zip(runs, ((), (f"finetune.init_from={runs[0]}", "optim.lr=1e-2")), strict=True):
        pretrain.run(
            "drawings_clip", [*TINY, *VIT, f"data.shards={packs / 'train'}", "data.val=", f"run.out={run}", *more]
        )
    return [str(run) for run in runs]


def recipe(packs, out, teachers, *more):
    words = [*TINY, *VIT, f"data.shards={packs / 'train'}", "data.val=", f"run.out={out}"]
    return load_recipe(PretrainRecipe, "drawings_clip", [*words, f"distil.teachers={list(teachers)}", *more])


def make(packs, out, teachers, *more, size=12):
    made = recipe(packs, out, teachers, *more)
    torch.manual_seed(0)
    task = Pretraining(made, Shards(made.data.shards))
    batch = next(Stream(Shards(made.data.shards), made.data, task.image_size, size, 0).batches(0, 1))
    return task.eval(), batch


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_mean_of_the_teachers_is_what_is_wanted(packs, tmp_path, teachers, mirrored):
    task, batch = make(packs, tmp_path, teachers, f"data.flip={str(mirrored).lower()}")
    clips = [clipkit.load(teacher, "cpu") for teacher in teachers]
    views = [batch.images, batch.images.flip(-1)][: 1 + mirrored]
    with torch.no_grad():
        images = sum(clip.model.encode_image(view) for clip in clips for view in views)
        texts = sum(clip.model.encode_text(clip.tokenizer(batch.captions)) for clip in clips)
        image, text, *_, wanted_image, wanted_text = task(batch)
    torch.testing.assert_close(wanted_image, F.normalize(images, dim=-1))
    torch.testing.assert_close(wanted_text, F.normalize(texts, dim=-1))
    loss, logged = task.loss((image, text, *_, wanted_image, wanted_text), batch)
    plain, _ = task.loss((image, text, *_), batch)
    distance = ((image - wanted_image) ** 2).sum(1).mean() + ((text - wanted_text) ** 2).sum(1).mean()
    torch.testing.assert_close(logged["distance"], distance)
    torch.testing.assert_close(loss, plain + 10 * distance)


def test_teachers_are_no_part_of_the_model(packs, tmp_path, teachers):
    task, batch = make(packs, tmp_path, teachers)
    alone, _ = make(packs, tmp_path, [])
    assert task.state_dict().keys() == alone.state_dict().keys()
    before = [pretrained.fingerprint(clip.model) for clip in task.teachers.clips]
    backward(task.train(), batch)
    assert all(p.grad is None for clip in task.teachers.clips for p in clip.model.parameters())
    assert before == [pretrained.fingerprint(clip.model) for clip in task.teachers.clips]
    assert not any(clip.model.training for clip in task.teachers.clips)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(packs, tmp_path, teachers):
    task, batch = make(packs, tmp_path, teachers[:1], f"finetune.init_from={teachers[0]}", "data.flip=false")
    assert backward(task, batch)[1]["distance"] < 1e-10


@pytest.mark.parametrize("locked", ["image", "text"])
def test_a_locked_tower_is_not_taught(packs, tmp_path, teachers, locked, monkeypatch):
    task, batch = make(packs, tmp_path, teachers, f"finetune.init_from={teachers[0]}", f"finetune.lock={locked}")
    for clip in task.teachers.clips:
        monkeypatch.setattr(clip.model, f"encode_{locked}", lambda *_: pytest.fail("asked"))
    image, text, *_, wanted_image, wanted_text = task(batch)
    own, wanted = (image, wanted_image) if locked == "image" else (text, wanted_text)
    assert torch.equal(own, wanted)
    assert not torch.equal(image - text, wanted_image - wanted_text)


@pytest.mark.parametrize("size", [16, 40])
def test_teachers_of_another_side_see_resized_pictures(packs, tmp_path, teachers, size, monkeypatch):
    """As Pillow's bicubic does, which rounds and clips after each axis; nothing else comes within a level of it."""
    task, batch = make(packs, tmp_path, teachers[:1], f"model.image_size={size}", "data.flip=false")
    (clip,), seen = task.teachers.clips, []
    encode = clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda images: [seen.append(images), encode(images)][1])
    assert task(batch)[4].shape == task(batch)[0].shape
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in batch.images]
    resized = [picture.resize((24, 24), Image.Resampling.BICUBIC) for picture in pictures]
    expected = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in resized])
    assert seen[0].dtype == torch.uint8
    assert (seen[0].float() - expected.float()).abs().mean() < 0.3


def test_a_teacher_of_open_clip(packs, tmp_path, monkeypatch):
    """Of its own words, side, means and deviations: what open_clip makes of the same pairs is what is learned."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)
    config = {**CONFIGS["ViT-B-32"], "text_cfg": TEXT}
    model, seen = theirs(config), {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    teacher = written(tmp_path / "theirs", config, model, **seen)
    task, batch = make(packs, tmp_path / "out", [teacher.name], "model.embed_dim=32", "model.image_size=64")
    assert batch.images.shape[1:] == (3, 64, 64)
    mean, std = (torch.tensor(seen[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        *_, wanted_image, wanted_text = task(batch)
        images = model.encode_image((batch.images / 255 - mean) / std, normalize=True)
        texts = model.encode_text(open_clip.tokenize(batch.captions), normalize=True)
    torch.testing.assert_close(wanted_image, images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wanted_text, texts, rtol=1e-4, atol=1e-5)


def _on_rank(packs, out, teachers, bounds):
    task, batch = make(packs, out, teachers)
    where = slice(bounds[distributed.rank()], bounds[distributed.rank() + 1])
    image, _, *_, wanted, _ = task(batch)
    return squared_distance(image[where], wanted[where]).detach()


@pytest.mark.parametrize("bounds", [[0, 6, 12], [0, 5, 12]])
def test_the_mean_over_ranks_is_that_over_all_pairs(packs, tmp_path, teachers, bounds):
    task, batch = make(packs, tmp_path, teachers)
    image, _, *_, wanted, _ = task(batch)
    ranks = on_ranks(2, _on_rank, packs, tmp_path, teachers, bounds)
    torch.testing.assert_close(torch.stack(ranks).mean(), (image - wanted).square().sum(1).mean().detach())


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_give_the_gradient_of_the_whole(packs, tmp_path, teachers, parts):
    task, batch = make(packs, tmp_path, teachers)
    found = []
    for n in (1, parts):
        task.zero_grad()
        backward(task, batch, n)
        found.append([p.grad.clone() for p in task.model.parameters() if p.grad is not None])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_student_comes_nearer(packs, tmp_path, teachers):
    """A run with a teacher ends nearer to it than the same run without, and loads as any other."""
    task, batch = make(packs, tmp_path, teachers[:1], "data.flip=false")
    distances = []
    for name, taught in (("taught", teachers[:1]), ("alone", [])):
        words = [*TINY, *VIT, f"data.shards={packs / 'train'}", "data.val=", "run.steps=30", "optim.lr=3e-3"]
        pretrain.run("drawings_clip", [*words, f"run.out={tmp_path / name}", f"distil.teachers={taught}"])
        student = clipkit.load(tmp_path / name, "cpu").model.requires_grad_(True)
        wanted, _ = task.teachers(student, batch, False)
        distances.append(squared_distance(student.encode_image(batch.images), wanted))
    assert distances[0] < 0.7 * distances[1]


def test_plans_count_what_teachers_do(packs, tmp_path, teachers):
    def flops(*more, of=teachers):
        return plan(recipe(packs, tmp_path, of, *more), 1, DEVICES["a100"]).flops_per_sample

    alone, one, two, mirrored = flops(of=[]), flops(of=teachers[:1]), flops(), flops("data.flip=true")
    assert alone < one < two < mirrored
    assert two - alone == pytest.approx(2 * (one - alone))
    assert one - alone == pytest.approx(alone / 3, rel=0.15)  # a forward pass of three as much


def test_what_is_refused(packs, tmp_path, teachers):
    with pytest.raises(CheckpointError, match=r"features of 128 dimensions, this model of 64; .*model.embed_dim=128"):
        make(packs, tmp_path, teachers, "model.embed_dim=64")
    with pytest.raises(CheckpointError, match="nowhere"):
        make(packs, tmp_path, ["nowhere"])
    with pytest.raises(RecipeError, match=r"distil\.weight is 0\.0; it must be above 0"):
        recipe(packs, tmp_path, teachers, "distil.weight=0")
    with pytest.raises(RecipeError, match=r"distil\.teachers"):
        load_recipe(PretrainRecipe, "drawings_clip", ["distil.teachers=runs/one"])
