"""Recipes for data that is not drawings run on a little of it, in its own format."""

import numpy as np
import pytest
from external_models import write_fashion_mnist
from PIL import Image
from toy_distributions import TINY

from clipkit.cli import cli


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Sixty-four stripes for garments, in idx files; the current folder is theirs."""
    chance = np.random.default_rng(0)
    labels = [int(i) for i in chance.permutation(64) % 10]
    stripes = np.stack([np.tile((np.arange(28) * (label + 1) * 9) % 256, (28, 1)) for label in labels]).astype(np.uint8)
    write_fashion_mnist(tmp_path / "data", (stripes, labels), (stripes[:20], labels[:20]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_fashion_mnist_from_its_files_to_pictures(fashion, command):
    words = [line[1:].split() for name in ("clip", "denoiser", "noisy_clip") for line in recipe_head(name)]
    commands = [line[1:] for line in words if line[:1] == ["clipkit"]]
    assert [line[0] for line in commands] == ["pack", "pack", "pretrain", "denoiser", "guided-sample", "noisy-clip"]
    commands.append(commands.pop(4))  # drawn when the guide is there too
    for line in commands[:-1]:
        own = [word for word in line if word != "--download"]  # it is there
        cli.main([*own, *(TINY if line[0] != "pack" else ())], standalone_mode=False)
    code, _, err = command("guided-sample", "sandal", *commands[-1][2:], "--n", 2, "--steps", 2, "--scale", 1)
    assert code == 0, err
    with Image.open("grid.png") as sheet:
        assert sheet.size == (2 * (28 * 4 + 2) + 2, 28 * 4 + 4)
    code, _, err = command("guided-sample", "rocket", "--model", "runs/fashion-mnist")
    assert (code, err.count("\n")) == (2, 1)
    assert "no class 'rocket' was trained" in err


def recipe_head(name):
    from importlib.resources import files

    text = files("clipkit.train").joinpath(f"recipes/fashion_mnist_{name}.toml").read_text()
    return [line for line in text.splitlines() if line.startswith("#")]
