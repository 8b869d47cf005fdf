"""Averages of runs: the weights are the mean, the statistics are measured, and what does not fit is refused."""

import copy
import shutil

import pytest
import torch
from torch import nn
from toy_distributions import TINY

import clipkit
from clipkit import checkpoint
from clipkit.config import from_dict
from clipkit.convert.release import release
from clipkit.data.loader import Stream
from clipkit.data.manifest import is_pack
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, ShardError, UsageError
from clipkit.models.source import find
from clipkit.train import averaging as room
from clipkit.train import pretrain
from clipkit.train.averaging import average

CNN = ("model.image_tower=clipkit_resnet", "model.image_kwargs={channels=[8, 8], depths=[1, 1]}")
VIT = (
    "model.image_tower=vit_tiny_patch16_224",
    "model.image_kwargs={patch_size=8, depth=1, embed_dim=32, num_heads=2}",
)


def trained(packs, out, *more):
    words = [*TINY, *CNN, f"data.shards={packs / 'train'}", "data.val=", f"run.out={out}", *more]
    pretrain.run("drawings_clip", words)
    return out


def tuned(packs, source, out, *more):
    return trained(packs, out, f"finetune.init_from={source}", *more)


@pytest.fixture(scope="module")
def pair(packs, tmp_path_factory):
    """A CLIP with BatchNorms, and what further training made of it."""
    source = trained(packs, tmp_path_factory.mktemp("source"))
    return source, tuned(packs, source, tmp_path_factory.mktemp("tuned"), "optim.lr=1e-2")


def weights(run):
    return find(run, "clip").tensors("ema")


def is_statistic(name):
    return "running_" in name or "num_batches" in name


@pytest.mark.parametrize(("shares", "last"), [((), 0.5), ((3, 1), 0.25), ((0, 2), 1.0)])
def test_weights_are_the_mean_of_those_of_the_runs(pair, tmp_path, shares, last):
    average(pair, tmp_path / "mean", shares)
    one, other, mean = (weights(run) for run in (*pair, tmp_path / "mean"))
    for name in one:
        if not is_statistic(name):
            torch.testing.assert_close(mean[name], (1 - last) * one[name] + last * other[name])
    assert any(not torch.equal(one[name], other[name]) for name in one)
    state = find(tmp_path / "mean", "clip").state
    assert state["averaged"] == [{"run": str(pair[0]), "share": 1 - last}, {"run": str(pair[1]), "share": last}]


def test_statistics_are_those_of_the_averaged_weights(pair, tmp_path, monkeypatch):
    """Of the first BatchNorm: mean and variance of its inputs, batch by batch, on views of the last run's data."""
    monkeypatch.setattr(room, "_BATCHES", 3)
    average(pair, tmp_path / "mean")
    model = clipkit.load(tmp_path / "mean", "cpu").model
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    recipe = from_dict(pretrain.PretrainRecipe, find(pair[1], "clip").state["recipe"])
    stream, seen = Stream(Shards(recipe.data.shards), recipe.data, recipe.model.image_size, 256, 0), []
    norms[0].register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in stream.batches(0, 3):
            model.encode_image(batch.images)
    means, variances = zip(*((x.mean((0, 2, 3)), x.var((0, 2, 3))) for x in seen), strict=True)
    torch.testing.assert_close(norms[0].running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[0].running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)


def test_a_tower_without_batchnorm_needs_no_data(packs, tmp_path):
    shutil.copytree(packs / "train", tmp_path / "pack")
    words = [*VIT, f"data.shards={tmp_path / 'pack'}"]
    trained(packs, tmp_path / "a", *words)
    tuned(packs, tmp_path / "a", tmp_path / "b", *words)
    shutil.rmtree(tmp_path / "pack")
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    assert clipkit.load(tmp_path / "mean", "cpu").model.config.image_tower == "vit_tiny_patch16_224"


def test_an_average_is_released_and_trained_from_as_a_run_is(packs, pair, tmp_path):
    average(pair, tmp_path / "mean")
    release(tmp_path / "mean", tmp_path / "given")
    shares = find(tmp_path / "given", "clip").state["averaged"]
    assert shares == [{"run": run.name, "share": 0.5} for run in pair]  # no folders of this machine
    a, b = (clipkit.load(tmp_path / name, "cpu") for name in ("mean", "given"))
    ids = a.tokenizer(["a red car"])
    with torch.no_grad():
        assert (a.model.encode_text(ids) * b.model.encode_text(ids)).sum() > 0.9999
    tuned(packs, tmp_path / "mean", tmp_path / "on")
    assert weights(tmp_path / "on").keys() == weights(tmp_path / "mean").keys()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        tuned(packs, pair[0], tmp_path / "mean", "optim.lr=1e-2")  # as the last run, which has its optimizer


def test_runs_that_do_not_fit_each_other(packs, pair, tmp_path):
    wider = tuned(packs, pair[0], tmp_path / "wider", "finetune.init=text", *VIT)
    with pytest.raises(CheckpointError, match=r"has other encoders than .*: image\..* differs"):
        average([pair[0], wider], tmp_path / "mean")
    found = find(pair[0], "clip")
    texts = {"tokenizer.json": clipkit.Tokenizer.train(["a vocabulary of other captions"]).to_json()}
    checkpoint.save(tmp_path / "words", found.state, {"ema": weights(pair[0])}, texts, keep_last=1)
    with pytest.raises(
        CheckpointError, match=r"has another tokenizer than .*; average models that started from the same weights"
    ):
        average([tmp_path / "words", pair[0]], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_recipe_that_would_be_refused_today_is_no_hindrance(pair, tmp_path, monkeypatch):
    """Of the last run's recipe only the data matters here; bounds that came later need not hold for the rest."""
    monkeypatch.setattr(room, "_BATCHES", 1)
    found = find(pair[1], "clip")
    state = copy.deepcopy(found.state)
    state["recipe"]["optim"]["lr"], state["recipe"]["run"]["ema_decay"] = -1.0, 1.0
    texts = {"tokenizer.json": found.text("tokenizer.json")}
    checkpoint.save(tmp_path / "old", state, {"ema": weights(pair[1])}, texts, keep_last=1)
    expected, mean = (
        average([pair[0], last], tmp_path / out) for last, out in ((pair[1], "a"), (tmp_path / "old", "b"))
    )
    assert (mean / "ema.safetensors").read_bytes() == (expected / "ema.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("runs", "shares", "message"),
    [
        (1, (), "1 run; an average is of two or more"),
        (2, (1, 2, 3), "shares 1, 2, 3 for 2 runs"),
        (2, (1, -1), "shares 1, -1 for 2 runs"),
        (2, (0, 0), "shares 0, 0 for 2 runs"),
        (2, (1, float("nan")), "shares 1, nan for 2 runs"),
        (2, (1, float("inf")), "shares 1, inf for 2 runs"),
    ],
)
def test_shares_that_are_none(pair, tmp_path, runs, shares, message):
    with pytest.raises(UsageError, match=message):
        average(pair[:runs], tmp_path / "mean", shares)


def test_a_run_is_never_written_over(pair):
    with pytest.raises(UsageError, match=r"is not empty: it holds .* give a new folder"):
        average(pair, pair[0])


def test_statistics_are_measured_on_a_pack_that_is_here(pair, tmp_path):
    """A release keeps the name alone of its pack's folder: the run beside it has the data, in any order."""
    released = tmp_path / "released"
    release(pair[0], released)
    given = find(released, "clip").state["recipe"]["data"]["shards"]
    assert not is_pack(given)
    for order in ([pair[1], released], [released, pair[1]]):
        out = tmp_path / str(order.index(released))
        average(order, out)
        assert find(out, "clip").state["recipe"]["data"]["shards"] != given


def test_data_that_is_gone(packs, pair, tmp_path):
    shutil.copytree(packs / "train", tmp_path / "pack")
    last = tuned(packs, pair[0], tmp_path / "last", f"data.shards={tmp_path / 'pack'}")
    shutil.rmtree(tmp_path / "pack")
    with pytest.raises(ShardError, match="no pack at"):
        average([last, last], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_the_command(command, pair, tmp_path):
    code, out, _ = command("average", *pair, tmp_path / "mean", "--shares", "0.3,0.7")
    assert code == 0
    assert out.strip().startswith(str(tmp_path / "mean"))
    code, _, err = command("average", *pair, tmp_path / "other", "--shares", "a third")
    assert (code, err.strip()) == (2, "clipkit: --shares is 'a third'; it must be numbers, such as 0.3,0.7")
    assert command("average", "--help")[1].count("clipkit average runs/clip")
