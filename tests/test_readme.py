"""The README's promises: its Python runs, its commands exist, it is short."""

import re
import shlex
from pathlib import Path

import pytest
from click import Context

from clipkit.cli import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_first_command_comes_early():
    first = next(i for i, line in enumerate(README.splitlines(), 1) if line.startswith("make "))
    assert first <= 15


@pytest.mark.parametrize("line", [c for c in commands() if "clipkit " in c and "git clone" not in c])
def test_every_command_parses(line, tmp_path):
    """Options, arguments and choices are checked by click itself, without running the command."""
    name, *words = shlex.split(line)[shlex.split(line).index("clipkit") + 1 :]
    command = cli.commands[name]
    with command.make_context(name, words, Context(cli)) as context:
        assert context.params


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("torchrun")])
def test_torchrun_lines_name_scripts_and_recipes_that_exist(line):
    words = shlex.split(line)
    script = next((w for w in words if w.endswith(".py")), None)
    if script is None:
        assert words[words.index("-m") + 1 :][:2] == ["clipkit", "pretrain"]
    else:
        assert (ROOT / script).is_file()
    assert (ROOT / "train" / "recipes" / next(w for w in words if w.endswith(".toml"))).is_file()


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {c.split()[1] for c in commands() if c.startswith("make ")} <= set(targets)


def code(example):
    return [line for line in example.splitlines() if line and not line.startswith(("import", "from"))]


def test_the_zero_shot_example_runs(chain, tmp_path, monkeypatch):
    from PIL import Image

    example = next(e for e in blocks("python") if "clipkit.load" in e)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(chain)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(code(example)) <= 5
    scope = {}
    exec(example, scope)
    assert abs(sum(scope["probabilities"][0].tolist()) - 1) < 1e-5


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file()
