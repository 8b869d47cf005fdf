"""Runs of earlier releases are resumed."""

import json
import shutil
from pathlib import Path

import pytest

from clipkit import checkpoint
from clipkit.data.pack import pack
from clipkit.data.sources import drawings_source
from clipkit.errors import CheckpointError
from clipkit.train import pretrain

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-format-1"
TINY = [  # as in tests/fixtures/make.py
    *("run.batch_size=16", "run.save_every=2", "run.keep_last=1", "optim.warmup=1", "data.workers=0", "run.out=run"),
    *("model.image_tower=clipkit_resnet", "model.image_kwargs={channels=[4], depths=[1]}", "model.embed_dim=8"),
    *("model.text_width=8", "model.text_layers=1", "model.text_heads=2", "model.vocab_size=300", "data.val="),
    *("data.shards=pack", "run.precision=auto", "run.steps=3"),
]


def test_a_run_of_before_keys_were_renamed_resumes_silently(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pack(drawings_source("train", 64, 24, 0), Path("pack"))
    shutil.copytree(FIXTURE / "checkpoints", "run/checkpoints")
    shutil.copy(next(Path("run/checkpoints").glob("*/tokenizer.json")), "run")
    with pytest.raises(CheckpointError, match=r"optim\.final_lr_fraction: 0\.0 there, 0\.5 here"):
        pretrain.run("drawings_clip", [*TINY, "optim.final_lr_fraction=0.5"])
    capsys.readouterr()
    pretrain.run("drawings_clip", TINY)
    assert "is now" not in capsys.readouterr().err
    assert checkpoint.latest(Path("run")).step == 3
    stored = json.loads(next(Path("run").glob("checkpoints/*3/state.json")).read_text())["recipe"]
    assert "decay_fraction" in stored["optim"]
    assert "tune" not in stored


def test_former_names_in_the_recipe_of_a_run_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pack(drawings_source("train", 64, 24, 0), Path("pack"))
    shutil.copytree(FIXTURE / "checkpoints", "run/checkpoints")
    shutil.copy(next(Path("run/checkpoints").glob("*/tokenizer.json")), "run")
    pretrain.run("drawings_clip", [*TINY, "optim.final_lr=0.0"])
    assert capsys.readouterr().err.splitlines()[0] == "clipkit: optim.final_lr is now optim.final_lr_fraction"
    assert checkpoint.latest(Path("run")).step == 3
