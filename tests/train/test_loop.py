import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from toy_distributions import TINY

from clipkit import checkpoint, distributed, log
from clipkit.config import OptimConfig, load_recipe
from clipkit.data.shards import Shards
from clipkit.errors import CheckpointError, NonFiniteError, RecipeError, ShardError, StoppedError, UsageError
from clipkit.train import batchnorm, denoiser, launch, loop, optim, pretrain, resume, signals
from clipkit.train.pretrain import PretrainRecipe

FP32 = "run.precision=fp32"  # "auto" is bf16 on some machines
WORDS = ["run.batch_size=16", "run.log_every=1", "optim.warmup=2", "data.workers=0", "run.save_every=2", FP32]


def words(packs, out, steps=6, *more):
    return [*WORDS, f"data.shards={packs / 'train'}", "data.val=", f"run.out={out}", f"run.steps={steps}", *more]


def final(run):
    found = checkpoint.latest(run)
    return {name: found.tensors(name) for name in ("model", "ema", "optimizer")}


def same(a, b):
    return all(torch.equal(a[group][k], b[group][k]) for group in a for k in a[group])


def losses(run):
    return [line["loss"] for line in log.read(run / "log.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(packs, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    pretrain.run("drawings_clip", words(packs, out))
    return out


def test_the_loss_goes_down(packs, tmp_path):
    pretrain.run("drawings_clip", words(packs, tmp_path, 30, "run.save_every=30"))
    curve = losses(tmp_path)
    assert sum(curve[-5:]) < sum(curve[:5])


def test_a_stopped_run_resumes_to_the_same_bits(packs, uninterrupted, tmp_path, monkeypatch):
    """Stopped in step 5, after the checkpoint of step 4: weights, averages, optimizer and log end up the same."""
    step = pretrain.Pretraining.forward
    calls = []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(pretrain.Pretraining, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run("drawings_clip", words(packs, tmp_path))
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path).step == 4
    pretrain.run("drawings_clip", words(packs, tmp_path))
    assert same(final(tmp_path), final(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)


CNN = ("model.image_tower=clipkit_resnet", "model.image_kwargs={channels=[8, 8], depths=[1, 1]}")


def test_two_ranks_train_the_same_model(packs, tmp_path):
    """Two gloo ranks with half of the batch each: the same loss curve as one process, to rounding."""
    pretrain.run("drawings_clip", words(packs, tmp_path / "one", 3, *CNN))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "clipkit"]
    subprocess.run(
        [*launch, "pretrain", "drawings_clip", *words(packs, tmp_path / "two", 3, *CNN)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("parts", [1, 2])
def test_bf16_follows_fp32_to_its_rounding(packs, tmp_path, capsys, parts):
    """The autocast towers' 8 bits of mantissa: near fp32's curve, and not on it; weights and log stay fp32."""
    more = [f"run.micro_batches={parts}", "optim.lr=5e-4"]  # at the recipe's rate six steps multiply any rounding
    pretrain.run("drawings_clip", words(packs, tmp_path / "fp32", 6, *more))
    pretrain.run("drawings_clip", words(packs, tmp_path / "bf16", 6, *more, "run.precision=bf16"))
    assert re.findall(r"on cpu in (\w+)", capsys.readouterr().err) == ["fp32", "bf16"]
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != pytest.approx(exact, rel=1e-5)
    assert {t.dtype for t in final(tmp_path / "bf16")["model"].values() if t.is_floating_point()} == {torch.float32}


def test_auto_is_bf16_where_the_hardware_computes_in_it(monkeypatch):
    for computes in (True, False):
        monkeypatch.setattr(loop.distributed, "computes_in_bf16", lambda device, computes=computes: computes)
        assert loop.precision_of(torch.device("cpu"), "auto") == ("bf16" if computes else "fp32")
        assert loop.precision_of(torch.device("cpu"), "fp32") == "fp32"


VARIANTS = {
    "parts": (1, ["run.micro_batches=4"]),
    "ranks": (2, []),
    "pieces": (2, ["run.parallel=fsdp"]),
    "pieces in parts": (2, ["run.parallel=fsdp", "run.micro_batches=2"]),
    "ranks and parts": (2, ["run.micro_batches=2"]),
    "checkpointed": (1, ["model.grad_checkpointing=true"]),
}


@pytest.fixture(scope="module")
def plain_curve(packs, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    pretrain.run("drawings_clip", words(packs, out, 100, *CURVE))
    return losses(out)


CURVE = ["run.save_every=100", "run.batch_size=32", "optim.lr=5e-4", "optim.warmup=50"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hundred_steps_follow_the_same_curve(packs, tmp_path, plain_curve, variant):
    ranks, more = VARIANTS[variant]
    recipe = ["drawings_clip", *words(packs, tmp_path, 100, *CURVE, *more)]
    if ranks == 1:
        pretrain.run(recipe[0], recipe[1:])
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "clipkit"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, "pretrain", *recipe], check=True, capture_output=True, env=environment)
    assert losses(tmp_path) == pytest.approx(plain_curve, rel=1e-4)
    assert plain_curve[-1] < 0.8 * plain_curve[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0 alone
def test_a_compiled_run_follows_the_curve(packs, tmp_path):
    tower = "model.image_kwargs={patch_size=6, depth=1, embed_dim=32, num_heads=2}"
    vit = ["model.image_tower=vit_tiny_patch16_224", tower]
    pretrain.run("drawings_clip", words(packs, tmp_path / "eager", 3, *vit))
    pretrain.run("drawings_clip", words(packs, tmp_path / "compiled", 3, *vit, "run.compile=true"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_a_changed_recipe_is_refused_with_its_differences(packs, uninterrupted):
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.002 there, 0\.5 here") as error:
        pretrain.run("drawings_clip", words(packs, uninterrupted, 6, "optim.lr=0.5"))
    assert "model" not in str(error.value)


def test_a_run_made_before_a_key_existed_resumes_with_its_default(packs, tmp_path):
    pretrain.run("drawings_clip", words(packs, tmp_path, 2))
    state = checkpoint.latest(tmp_path).path / "state.json"
    older = json.loads(state.read_text())
    del older["recipe"]["run"]["micro_batches"]
    found = dataclasses.replace(checkpoint.latest(tmp_path), state=older)
    recipe = load_recipe(pretrain.PretrainRecipe, "drawings_clip", words(packs, tmp_path, 2))
    resume.check_recipe(found, recipe)
    with pytest.raises(CheckpointError, match=r"run\.micro_batches: 1 there, 2 here"):
        resume.check_recipe(found, dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, micro_batches=2)))


def test_the_refusal_points_to_fine_tuning(packs, uninterrupted, chain):
    with pytest.raises(
        CheckpointError, match=rf"fine-tune from it, finetune\.init_from={uninterrupted} and a new run\.out"
    ):
        pretrain.run("drawings_clip", words(packs, uninterrupted, 6, "optim.lr=0.5"))
    with pytest.raises(CheckpointError, match=r"optim\.lr") as error:
        denoiser.run(
            "drawings_denoiser",
            [*TINY, f"data.shards={packs / 'train'}", f"run.out={chain / 'denoiser'}", "optim.lr=0.5"],
        )
    assert "fine-tune" not in str(error.value)  # a denoiser has no finetune.init_from
    with pytest.raises(CheckpointError, match=r"run of another kind \(clip there, denoiser here\)"):
        denoiser.run("drawings_denoiser", [*TINY, f"data.shards={packs / 'train'}", f"run.out={uninterrupted}"])


def rates(run):
    return {line["step"]: line["lr"] for line in log.read(run / "log.jsonl") if "lr" in line}


def test_a_run_becomes_longer_finished_or_not(packs, tmp_path, capsys):
    """From the resumed step on it is a run of the new length; what it was is in what it had done."""
    for steps in (4, 8, 10):
        pretrain.run("drawings_clip", words(packs, tmp_path / "run", steps))
        lines = [line for line in capsys.readouterr().err.splitlines() if "schedule" in line]
        done = {4: None, 8: 4, 10: 8}[steps]
        before = {8: 4, 10: 8}.get(steps)
        assert lines == (
            [f"run.steps: {before} there, {steps} here; from step {done} on the schedule is that of {steps} steps"]
            * (done is not None)
        )
        assert checkpoint.latest(tmp_path / "run").state["recipe"]["run"]["steps"] == steps
    config = load_recipe(pretrain.PretrainRecipe, "drawings_clip", words(packs, tmp_path, 4)).optim
    expected = {s + 1: optim.learning_rate(s, 4 if s < 4 else 8 if s < 8 else 10, config) for s in range(10)}
    assert rates(tmp_path / "run") == pytest.approx(expected)


def test_a_lengthened_run_ends_with_the_same_bits_however_often_it_is_stopped(packs, tmp_path):
    pretrain.run("drawings_clip", words(packs, tmp_path / "a", 4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    pretrain.run("drawings_clip", words(packs, tmp_path / "a", 8))
    pretrain.run("drawings_clip", words(packs, tmp_path / "b", 8))
    shutil.rmtree(checkpoint.latest(tmp_path / "b").path)  # as if it had been killed after step 6
    pretrain.run("drawings_clip", words(packs, tmp_path / "b", 8))
    assert same(final(tmp_path / "a"), final(tmp_path / "b"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_run_whose_recipe_would_be_refused_today_becomes_longer(packs, tmp_path, monkeypatch):
    """What it recorded is compared, not used: bounds that came later need not hold for it."""
    pretrain.run("drawings_clip", words(packs, tmp_path, 4))
    latest = checkpoint.latest

    def of_before(folder):
        found = latest(folder)
        if found is not None and found.step == 4:
            found.state["recipe"]["data"]["max_bad_fraction"] = float("inf")
            del found.state["recipe"]["loss"], found.state["recipe"]["data"]["progressive_size"]  # younger than the run
        return found

    monkeypatch.setattr(checkpoint, "latest", of_before)
    with pytest.raises(CheckpointError, match=r"data\.max_bad_fraction: inf there, 0\.01 here"):
        pretrain.run("drawings_clip", words(packs, tmp_path, 8))
    monkeypatch.setattr("clipkit.train.resume.FREE_TO_CHANGE", resume.FREE_TO_CHANGE | {"data.max_bad_fraction"})
    pretrain.run("drawings_clip", words(packs, tmp_path, 8))
    assert latest(tmp_path).step == 8


def test_a_run_becomes_shorter_only_before_its_end(packs, tmp_path):
    pretrain.run("drawings_clip", words(packs, tmp_path, 8))
    shutil.rmtree(checkpoint.latest(tmp_path).path)  # six of eight are done
    for steps in (6, 5, 1):
        with pytest.raises(CheckpointError, match=rf"has done 6 of 8 steps; run\.steps={steps} must be more"):
            pretrain.run("drawings_clip", words(packs, tmp_path, steps))
    pretrain.run("drawings_clip", words(packs, tmp_path, 7))
    assert checkpoint.latest(tmp_path).step == 7
    assert rates(tmp_path)[7] == pytest.approx(
        optim.learning_rate(6, 7, load_recipe(pretrain.PretrainRecipe, "drawings_clip", words(packs, tmp_path)).optim)
    )


def test_sizes_follow_the_new_length(packs, tmp_path):
    """Small pictures for three fifths of the steps: of 10 the first 6, so 5 of 5 are followed by a small one."""
    early = [*CNN, "data.progressive_size=16"]
    seen = []
    forward = pretrain.Pretraining.forward

    def noted(self, batch):
        seen.append(batch.images.shape[-1])
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "forward", noted)
        for steps in (5, 10):
            pretrain.run("drawings_clip", words(packs, tmp_path, steps, *early))
    assert seen == [16, 16, 16, 24, 24, 16, 24, 24, 24, 24]


def test_a_run_of_before_batchnorm_was_synchronised_resumes(packs, tmp_path, monkeypatch, capsys):
    """Its recipe recorded false, or nothing; on one process that is nothing, on several a line says what is new."""
    pretrain.run("drawings_clip", words(packs, tmp_path, 2, *CNN, "run.sync_batchnorm=false"))
    pretrain.run("drawings_clip", words(packs, tmp_path, 4, *CNN))
    assert "sync_batchnorm" not in capsys.readouterr().err
    monkeypatch.setattr(batchnorm, "over_ranks", lambda model: True)
    pretrain.run("drawings_clip", words(packs, tmp_path, 6, *CNN))
    assert "sync_batchnorm" not in capsys.readouterr().err  # the last four steps were under true
    state = checkpoint.latest(tmp_path).path / "state.json"
    found = dataclasses.replace(checkpoint.latest(tmp_path), state=json.loads(state.read_text()))
    del found.state["recipe"]["run"]["sync_batchnorm"]
    monkeypatch.setattr(checkpoint, "latest", lambda run: found)
    pretrain.run("drawings_clip", words(packs, tmp_path, 6, *CNN))
    assert "run.sync_batchnorm: from step 6 on BatchNorm takes its statistics over all ranks" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "inf", "1e-3"])
def test_no_clipping_is_a_norm_of_0(packs, tmp_path, value):
    """The norm is still logged; what is clipped to a small one moves less."""
    pretrain.run("drawings_clip", words(packs, tmp_path, 2, f"run.grad_clip={value}"))
    plain = tmp_path / "plain"
    pretrain.run("drawings_clip", words(packs, plain, 2, "run.grad_clip=1e30"))
    norms = [next(line["grad_norm"] for line in log.read(run / "log.jsonl")) for run in (tmp_path, plain)]
    assert norms[0] == norms[1] > 1e-3
    assert same(final(tmp_path), final(plain)) == (value != "1e-3")


def test_seeds_that_were_taken_mean_what_they_meant_and_large_ones_are_taken():
    for seed, step, rank in ((0, 0, 0), (3, 17, 1), (2**27, 5, 0)):
        loop.seed_everything(seed, step, rank)
        ours = torch.rand(4)
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
        assert torch.equal(ours, torch.rand(4))
    drawn = []
    for seed in (2**63 - 1, 2**62, 2**62 + 1):
        loop.seed_everything(seed, 10**6, 7)
        drawn.append(tuple(torch.rand(4).tolist()))
    assert len(set(drawn)) == 3


def test_a_large_seed_trains(packs, tmp_path):
    pretrain.run("drawings_clip", words(packs, tmp_path, 1, f"run.seed={2**63 - 1}"))


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_done(packs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(launch, "seed_everything", None)  # nothing is built
    with pytest.raises(UsageError, match=rf"cannot write into {tmp_path / 'file' / 'run'}: Not a directory"):
        pretrain.run("drawings_clip", words(packs, tmp_path / "file" / "run"))
    for name in ("run\0", "a" * 300):
        with pytest.raises(UsageError, match="cannot write into"):
            pretrain.run("drawings_clip", words(packs, tmp_path / name))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_validation_pack_that_is_missing_is_missed_at_once(packs, tmp_path):
    with pytest.raises(ShardError, match=r"no pack at .*nowhere"):
        pretrain.run("drawings_clip", [*words(packs, tmp_path / "run"), f"data.val={tmp_path / 'nowhere'}"])
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("ranks", "word", "message"),
    [
        (3, "run.batch_size=16", r"run\.batch_size is 16; it must be a multiple of the 3 ranks"),
        (2, "run.micro_batches=9", r"run\.micro_batches is 9, more than the 8 samples that each of 2 ranks has"),
    ],
)
def test_a_batch_that_ranks_cannot_share(packs, tmp_path, monkeypatch, ranks, word, message):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    with pytest.raises(RecipeError, match=message):
        pretrain.run("drawings_clip", words(packs, tmp_path / "run", 2, word))
    assert not (tmp_path / "run").exists()


def test_one_sample_at_a_time_and_batchnorm_is_a_line(packs, tmp_path):
    """A ResNet's last stage has one position of 24 pixels, so that a micro-batch of one has no variance."""
    tower = ["model.image_tower=resnet18", "model.image_kwargs={channels=[4, 4, 4, 4], layers=[1, 1, 1, 1]}"]
    with pytest.raises(UsageError, match=r"lower run\.micro_batches"):
        pretrain.run("drawings_clip", words(packs, tmp_path, 1, *tower, "run.batch_size=2", "run.micro_batches=2"))


def test_a_vocabulary_of_a_recipe_that_never_began_is_not_taken_over(packs, tmp_path):
    small = [*words(packs, tmp_path, 1), "model.vocab_size=520"]
    with pytest.raises(RecipeError, match="timm has no model"):
        pretrain.run("drawings_clip", [*small, "model.image_tower=resnet1"])
    pretrain.run("drawings_clip", words(packs, tmp_path, 1))
    kept = json.loads((tmp_path / "tokenizer.json").read_text())
    assert len(kept["model"]["vocab"]) > 520
    with pytest.raises(RecipeError, match=r"model\.vocab_size is 10; it must be at least 514"):
        pretrain.run("drawings_clip", [*words(packs, tmp_path / "other", 1), "model.vocab_size=10"])


def test_every_rank_refuses_a_vocabulary_that_is_too_small(packs, tmp_path, monkeypatch):
    """One that did not would wait for the others, or miss the file that the first did not write."""
    recipe = load_recipe(PretrainRecipe, "drawings_clip", [*words(packs, tmp_path / "run", 1), "model.vocab_size=513"])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(RecipeError, match=r"model\.vocab_size is 513; it must be at least 514"):
            pretrain.make_tokenizer(recipe, Shards(packs / "train"))


def test_a_run_that_has_its_vocabulary_resumes_whatever_size_its_recipe_has(packs, tmp_path, monkeypatch):
    """There were runs before there was a bound."""
    monkeypatch.setattr(pretrain, "SMALLEST_VOCABULARY", 1)
    pretrain.run("drawings_clip", [*words(packs, tmp_path, 1), "model.vocab_size=300"])
    monkeypatch.undo()
    pretrain.run("drawings_clip", [*words(packs, tmp_path, 2), "model.vocab_size=300"])
    assert checkpoint.latest(tmp_path).step == 2


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedError)])
@pytest.mark.parametrize("step", [0, 3])
def test_what_is_said_at_a_stop_is_true(packs, tmp_path, monkeypatch, capsys, number, error, step):
    """Before the first step there is nothing to save, and nothing is promised."""
    save_or_stop = loop._Loop.save_or_stop

    def stopped(self, at, interruption):
        if at == step:
            os.kill(os.getpid(), number)
        save_or_stop(self, at, interruption)

    monkeypatch.setattr(loop._Loop, "save_or_stop", stopped)
    with pytest.raises(error) as raised:
        pretrain.run("drawings_clip", words(packs, tmp_path, 6, "run.save_every=6"))
    said = capsys.readouterr().err.splitlines()[-1] if error is KeyboardInterrupt else str(raised.value)
    found = checkpoint.latest(tmp_path)
    if step:
        assert said.endswith("saved at step 3; the same command resumes")
        assert found.step == 3
    else:
        assert said.endswith("no step was done, nothing is saved")
        assert found is None


def test_logging_may_change_on_resume(packs, uninterrupted):
    pretrain.run("drawings_clip", words(packs, uninterrupted, 6, "run.log_every=3", "data.workers=1"))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_changes_no_weight(packs, tmp_path, monkeypatch, poison):
    original = pretrain.Pretraining.loss
    seen = {}

    def poisoned(self, features, batch):
        seen["before"] = {n: t.clone() for n, t in self.model.state_dict().items()}
        seen["model"] = self.model
        loss, values = original(self, features, batch)
        if poison == "loss":
            return loss * float("nan"), values
        scale = features[2]
        return loss + (scale - scale.detach()).abs().sqrt().sum(), values

    monkeypatch.setattr(pretrain.Pretraining, "loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 0: loss .* no weight was changed") as error:
        pretrain.run("drawings_clip", words(packs, tmp_path))
    assert error.value.exit_code == 3
    assert all(torch.equal(seen["before"][n], t) for n, t in seen["model"].state_dict().items())


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_device_that_is_not_waited_for_changes_no_weight_either(packs, tmp_path, monkeypatch, method):
    """As on a GPU: the bad step is noticed when the next log line is due, with the weights as before it."""
    original, steps, seen = pretrain.Pretraining.loss, [], {}

    def poisoned(self, features, batch):
        steps.append(1)
        if len(steps) == 2:
            seen["before"], seen["model"] = {n: t.clone() for n, t in self.model.named_parameters()}, self.model
        loss, values = original(self, features, batch)
        return loss * (float("nan") if len(steps) == 2 else 1.0), values

    monkeypatch.setattr(pretrain.Pretraining, "loss", poisoned)
    made = loop._Guard.__init__

    def patient(self, device):
        made(self, device)
        self.waits = False

    monkeypatch.setattr(loop._Guard, "__init__", patient)
    recipe = words(packs, tmp_path, 6, "run.log_every=4", "run.save_every=6", f"optim.method={method}")
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan, gradient norm nan on rank 0; no weight was changed"):
        pretrain.run("drawings_clip", recipe)
    assert len(steps) == 4
    assert all(torch.equal(seen["before"][n], p) for n, p in seen["model"].named_parameters())


def test_log_lines_say_what_is_needed(uninterrupted):
    line = json.loads((uninterrupted / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "grad_norm", "logit_scale", "samples_per_s", "data_wait", "lr"} <= line.keys()


def test_schedule_warms_up_and_ends_at_its_floor():
    config = OptimConfig(lr=1.0, warmup=10, final_lr_fraction=0.1)
    rates = [optim.learning_rate(s, 100, config) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_stable_and_constant_schedules():
    wsd = OptimConfig(lr=1.0, warmup=10, schedule="wsd", decay_fraction=0.2)
    rates = [optim.learning_rate(s, 100, wsd) for s in range(101)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0
    constant = OptimConfig(lr=1.0, warmup=10, schedule="constant")
    assert {optim.learning_rate(s, 100, constant) for s in range(9, 100)} == {1.0}


def test_decay_spares_biases_norms_embeddings_and_the_scale():
    from clipkit.models.clip import CLIP, CLIPConfig

    model = CLIP(CLIPConfig("convnext_atto", 32, {"patch_size": 2, "depths": [1] * 4, "dims": [8] * 4}), 50, 2)
    decayed, spared = (
        group["params"] for group in optim.make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    )
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    assert all(p.ndim >= 2 for p in decayed)
    for name in ("text.tokens.weight", "text.positions", "log_logit_scale", "image.trunk.stem.0.bias"):
        assert name in {names[id(p)] for p in spared}


def test_muon_takes_the_hidden_matrices_only():
    from clipkit.models.clip import CLIP, CLIPConfig

    model = CLIP(CLIPConfig("clipkit_resnet", 32, {"channels": [8], "depths": [1]}, text_layers=1), 50, 2)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = optim.make_optimizer(model, OptimConfig(method="muon")).param_groups
    blocks = {"first.0", "second.0"}
    text = {"qkv", "out", "mlp.0", "mlp.2"}
    assert {names[id(p)] for p in groups[2]["params"]} == {
        *(f"image.trunk.stages.0.0.{b}.weight" for b in blocks),
        *(f"text.blocks.0.{t}.weight" for t in text),
    }
    assert sum(len(g["params"]) for g in groups) == len(names)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
def test_orthogonalising_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(s.clamp(min=0.2 * s.max())) @ vh
    levelled = u.T @ optim.orthogonalise(matrix, steps=5) @ vh.T
    values = levelled.diagonal()
    torch.testing.assert_close(levelled, torch.diag(values), rtol=0, atol=1e-10)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_under_autocast_only_the_products_with_the_matrix_are_rounded():
    matrix = torch.randn(64, 576) * torch.logspace(0, -3, 64)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = optim.orthogonalise(matrix)
    exact = optim.orthogonalise(matrix)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.006  # it is 0.013 with the steps in bf16


@pytest.mark.parametrize("nohup", [False, True])
def test_the_end_of_the_terminal_is_nothing_under_nohup(nohup, monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda number: False)  # pytest's own is to be heard on
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with signals.Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal == (0 if nohup else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_keeps_its_pages_and_updates_in_the_run_s_precision(packs, tmp_path, monkeypatch):
    """What makes a step fast and changes no result must be seen to be there."""
    seen, kept = [], []

    @contextmanager
    def keep():
        kept.append(True)
        yield
        kept.pop()

    def orthogonalise(matrix):
        seen.append((bool(kept), torch.is_autocast_enabled("cpu")))
        return matrix

    monkeypatch.setattr(loop, "keep_pages", keep)
    monkeypatch.setattr(optim, "orthogonalise", orthogonalise)
    for precision in ("fp32", "bf16"):
        muon = ("optim.method=muon", f"run.precision={precision}")
        pretrain.run("drawings_clip", words(packs, tmp_path / precision, 1, *muon))
    assert set(seen) == {(True, False), (True, True)}
    assert not kept


def test_muon_resumes_to_the_same_bits(packs, tmp_path):
    muon = "optim.method=muon"
    pretrain.run("drawings_clip", words(packs, tmp_path / "whole", 4, muon))
    pretrain.run("drawings_clip", words(packs, tmp_path / "parts", 4, muon))
    shutil.rmtree(checkpoint.latest(tmp_path / "parts").path)
    pretrain.run("drawings_clip", words(packs, tmp_path / "parts", 4, muon))
    assert same(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_ema_is_the_written_formula():
    layer = torch.nn.Linear(2, 2)
    ema = optim.EMA(layer, 0.9)
    expected = layer.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            layer.weight.add_(1.0)
        ema.update(layer, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], expected)


def test_a_checkpoint_is_due_by_time_too(packs, tmp_path):
    recipe = words(packs, tmp_path, 4, "run.save_every=100", "run.save_minutes=0", "run.keep_last=10")
    pretrain.run("drawings_clip", recipe)
    assert sorted(int(p.name[-8:]) for p in (tmp_path / "checkpoints").iterdir()) == [1, 2, 3, 4]


def test_the_end_of_an_epoch_is_summed_up_also_after_a_stop(packs, tmp_path, monkeypatch):
    """30 steps of 16 are two epochs of 240; stopped in between, no sample of the first is forgotten."""
    recipe = words(packs, tmp_path, 30, "run.log_every=5", "run.save_every=4")
    original, calls = pretrain.Pretraining.forward, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run("drawings_clip", recipe)
    pretrain.run("drawings_clip", recipe)
    epochs = [line for line in log.read(tmp_path / "log.jsonl") if "epoch" in line]
    assert epochs == [{"step": 15 * e, "epoch": e, "seen": 240, "skipped": {}} for e in (1, 2)]


def test_what_was_never_indexed_is_said_and_logged_with_every_epoch(packs, tmp_path, capsys):
    folder = shutil.copytree(packs / "heldout", tmp_path / "pack", ignore=shutil.ignore_patterns("pack.json"))
    with tarfile.open(folder / "shard-000000.tar", "a") as archive:
        link = tarfile.TarInfo("more.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        archive.addfile(link)
    pretrain.run("drawings_clip", [*words(packs, tmp_path / "run", 8), f"data.shards={folder}"])
    assert "not taken into the index: 1 link or device" in capsys.readouterr().err
    epochs = [line for line in log.read(tmp_path / "run" / "log.jsonl") if "epoch" in line]
    assert epochs
    assert all((line["skipped"], line["not_indexed"]) == ({}, {"link or device": 1}) for line in epochs)


def test_a_shard_that_is_not_what_the_index_says_stops_the_run(packs, tmp_path):
    folder = shutil.copytree(packs / "train", tmp_path / "pack")
    damaged = folder / "shard-000001.tar"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    recipe = [*words(packs, tmp_path / "run", 50), f"data.shards={folder}"]
    with pytest.raises(ShardError, match=r"shard-000001\.tar is damaged: its sha256"):
        pretrain.run("drawings_clip", recipe)
