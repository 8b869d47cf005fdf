"""The model that comes along works straight away, offline, and is what its card says."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

import clipkit
from clipkit.cli import cli
from clipkit.data import drawings
from clipkit.data.sources import encode_png
from clipkit.guidance.image_grid import grid
from clipkit.guidance.pipeline import Pipeline
from clipkit.models.source import find
from clipkit.zeroshot.similarity import classify

KINDS = ("clip", "denoiser", "noisy_clip")
FOLDER = Path(str(files("clipkit"))) / "assets" / clipkit.DEFAULT_MODEL
DATA = Path(os.environ.get("DATA", Path(__file__).parents[3] / "shared" / "data"))  # as the Makefile has it


def run(capsys, *words):
    cli.main(list(map(str, words)), standalone_mode=False)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Drawings in folders of their classes, of (object, colour) pairs that were held out."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(60):
        drawn = drawings.draw("heldout", 5, i)
        folder = root / drawings.PAIRS[drawn.label][0]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(encode_png(drawn.image))
    return root


def test_it_is_small_and_whole_and_in_half_precision():
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert size < 40e6
    for kind in KINDS:
        found = find(clipkit.DEFAULT_MODEL, kind)
        assert {t.dtype for t in found.tensors("ema").values() if t.ndim > 1} == {torch.float16}
        for name in ("out", "shards"):
            section = "run" if name == "out" else "data"
            assert not Path(found.state["recipe"][section][name]).is_absolute()


def test_it_is_the_one_that_loads_without_a_name():
    assert find("clipkit-tiny", "clip").path.is_relative_to(FOLDER)
    clip = clipkit.load(device="cpu")
    assert clip.model.config.image_size == 32


def test_zero_shot_on_a_folder(photographs, capsys):
    found = json.loads(run(capsys, "zeroshot", "--dataset", f"folder:{photographs}", "--json"))
    assert found["model"] == "clipkit-tiny"
    assert found["n"] == 60
    assert found["top1"] > 0.4  # of sixteen


def test_classifying_one_picture(photographs, capsys):
    picture = next((photographs / "car").glob("*.png"))
    out = run(capsys, "classify", picture, "--labels", "car,rocket,tree,heart", "--json")
    (found,) = json.loads(out).values()
    assert max(found, key=found.get) == "car"


def test_drawing(tmp_path, capsys):
    words = ["guided-sample", "a red heart", "--n", "4", "--steps", "6", "--out", tmp_path / "grid.png", "--json"]
    found = json.loads(run(capsys, *words))
    assert len(found["clip_scores"]) == 4
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.text["prompt"] == "a red heart"


def test_guided_pictures_are_of_the_prompt():
    """By the model's own clean CLIP; docs/results.md has an independent judge."""
    pipeline = Pipeline.open("clipkit-tiny", "cpu")
    objects = ["red heart", "blue car", "green tree", "yellow star"]
    drawn = pipeline.draw("a red heart", n=8, steps=10)
    guesses = classify(pipeline.clip, [grid(image[None], 1, 1) for image in drawn.images], objects)
    assert sum(guess[0].label == "red heart" for guess in guesses) >= 6


def test_the_card_has_the_numbers_that_the_recipes_say():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for kind in KINDS:
        run_ = find("clipkit-tiny", kind).state["recipe"]["run"]
        assert f"{run_['steps']:,} steps of {run_['batch_size']}" in card
    for word in ("tiny-imagenet", "emoji", "drawings", "CIFAR-10", "seed"):
        assert word in card


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="DATA names no folder with cifar10/ and tiny-imagenet-32/")
def test_it_sees_what_its_card_says(tmp_path, capsys):
    """On photographs, from the archives: what it was made to reach, and the card's figures."""
    tiny = DATA / "tiny-imagenet-32"
    run(capsys, "pack", tiny / "val.tar.xz", tmp_path / "val", "--classnames", tiny / "classes.json")
    sets = {"tiny-imagenet val": f"shards:{tmp_path / 'val'}", "CIFAR-10": f"tar:{DATA / 'cifar10' / 'images.tar.xz'}"}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for (name, where), hoped in zip(sets.items(), (0.45, 0.50), strict=True):
        found = json.loads(run(capsys, "zeroshot", "--dataset", where, "--json"))["top1"]
        said = re.search(rf"^\| {name}.*top-1 \| ([0-9.]+) %", card, re.MULTILINE)
        assert found >= hoped
        assert 100 * found == pytest.approx(float(said[1]), abs=0.15)  # another machine rounds otherwise


@pytest.mark.slow
def test_it_needs_no_network_and_no_other_folder(tmp_path):
    code = """
import socket, sys
def refuse(*address):
    raise OSError("there is no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from clipkit.cli import main
main(sys.argv[1:])
"""
    words = ["guided-sample", "a rocket", "--n", "1", "--steps", "2", "--out", "rocket.png"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rocket.png").is_file()
