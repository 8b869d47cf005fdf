"""The benchmarks run and print what a script can read; what they measure belongs in docs/performance.md, not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_distributions import TINY

from clipkit.train import denoiser

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name, *words):
    done = subprocess.run([sys.executable, BENCHMARKS / name, *words, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_loss_memory():
    rows = run("loss_memory.py", "--batches", "256")
    assert [row["loss"] for row in rows] == ["plain", "info_nce", "sigmoid"]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.usefixtures("nightly")
def test_train_step():
    (row,) = run("train_step.py", "--model", "vit_tiny", "--batch", "2", "--rounds", "1")
    assert row["clipkit_s"] > 0
    assert row["ratio"] == pytest.approx(row["clipkit_s"] / row["open_clip_s"])
    assert row["unkept_ratio"] == pytest.approx(row["unkept_s"] / row["open_clip_s"])


@pytest.mark.usefixtures("nightly")
def test_paired_training(packs):
    words = ["--shards", str(packs / "train"), "--val", str(packs / "heldout"), "--batch", "16"]
    found = run("paired_training.py", *words, "--steps", "4", "--turn", "2")
    assert found["ratio"] > 0
    for side in ("clipkit", "open_clip"):
        assert found[side]["images_per_s"] > 0
        assert 0 < found[side]["loss"] < 6
        assert 0 <= found[side]["top1"] <= 1


def test_learning_curves(chain, tmp_path):
    runs = [str(chain / name) for name in ("clip", "denoiser")]
    found = run("learning_curves.py", *runs)
    assert {name: len(lines) for name, lines in found.items()} == {
        "loss": 2,
        "logit_scale": 1,
        "zeroshot_top1": 1,
        "samples_per_s": 2,
    }
    assert [step for step, _ in found["loss"][f"{chain.name}/denoiser"]] == [2, 4]
    drawn = subprocess.run(
        [sys.executable, BENCHMARKS / "learning_curves.py", *runs, "--out", tmp_path / "curves.png"], check=True
    )
    assert drawn.returncode == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    wrong = subprocess.run(
        [sys.executable, BENCHMARKS / "learning_curves.py", tmp_path], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "has no log.jsonl" in wrong.stderr


@pytest.mark.usefixtures("nightly")
def test_loader():
    row = run("loader.py", "--samples", "256", "--rounds", "1")
    assert row["clipkit_samples_per_s"] > 0
    assert row["ratio"] == pytest.approx(row["clipkit_samples_per_s"] / row["open_clip_samples_per_s"])


@pytest.mark.usefixtures("nightly")
def test_tokenizer():
    rows = run("tokenizer.py", "--captions", "1000", "--rounds", "1")
    assert [(row["captions"], row["memory"]) for row in rows] == [
        (captions, memory) for captions in ("common words", "long tail") for memory in ("fresh", "warm")
    ]
    assert all(row["ids_equal"] for row in rows)


@pytest.mark.usefixtures("nightly")
def test_class_head():
    row = run("class_head.py", "--classes", "1")
    assert row["ratio"] > 0
    assert row["largest_difference"] < 1e-5


def test_search():
    row = run("search.py", "--count", "3000", "--queries", "2")
    assert row["milliseconds"] > 0


def test_frechet():
    row = run("frechet.py", "--dim", "32", "--pictures", "100", "--repeat", "1")
    assert row["difference"] < 1e-6
    assert row["ratio"] == pytest.approx(row["seconds"] / row["seconds_sqrtm"])


def test_sampling(chain):
    pytest.importorskip("diffusers")
    row = run("sampling.py", "--model", str(chain), "--batch", "1", "--rounds", "1", "--steps", "5")
    assert row["noise_aware_over_unguided"] > 0
    assert row["unet_clipkit_million"] == pytest.approx(row["unet_diffusers_million"], rel=0.15)
    assert row["clipkit_ddim_us"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("world", ["drawings", "pack"])
def test_guidance_study(chain, packs, tmp_path, world, request):
    if world == "pack":
        request.getfixturevalue("nightly")
    pytest.importorskip("matplotlib")
    for name, folder in (("clip", "clip"), ("judge", "clip"), ("noisy_clip", "noisy_clip")):
        (tmp_path / name).symlink_to(chain / folder)
    (tmp_path / "packs").symlink_to(packs)
    told = [f"run.out={tmp_path / 'denoiser'}", "condition.kind=text", f"condition.clip={chain / 'clip'}"]
    denoiser.run("drawings_denoiser", [*TINY, f"data.shards={packs / 'train'}", *told])
    words = ["--runs", str(tmp_path), "--out", str(tmp_path / "study"), "--each", "1", "--steps", "2"]
    words += ["--few", "--train", *TINY]
    if world == "pack":
        words += ["--pack", str(packs / "train"), "--names", "blue rocket,green rocket,red house"]
    rows = run("guidance_study.py", *words)
    assert len({row["guidance"] for row in rows}) == 10
    assert all(0 <= row["named right"] <= 1 for row in rows)
    assert {"study.json", "study.md", "study.png", "scales.png", "costs.png"} <= {
        p.name for p in (tmp_path / "study").iterdir()
    }


@pytest.mark.usefixtures("nightly")
def test_nouns(chain, tmp_path):
    words = [
        "--judge",
        str(chain),
        "--model",
        str(chain),
        "--each",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "x.png"),
    ]
    row = run("nouns.py", *words)
    assert len(row) == 25
    assert 0 <= row["guided"] <= 1
    assert (tmp_path / "x.png").is_file()
