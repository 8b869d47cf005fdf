"""The registry of tasks: commands, loaders, release and recipes follow from it; other packages add to it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clipkit
import clipkit.train
from clipkit.cli import TRAINING, cli
from clipkit.config import SHIPPED, load_recipe
from clipkit.convert.release import release
from clipkit.registry import LOSSES, TASKS, task_entry
from clipkit.train.launch import TaskSpec

ROOT = Path(clipkit.__file__).resolve().parent


@pytest.mark.parametrize("kind", TASKS.own)
def test_a_task_has_a_command_a_recipe_and_a_loader(kind, command):
    spec, entry = TASKS[kind], task_entry(kind)
    assert isinstance(spec, TaskSpec)
    assert spec.task.kind == kind
    assert callable(spec.load)
    assert (SHIPPED / entry.example).is_file()
    assert cli.commands[entry.command] in TRAINING
    code, out, _ = command(entry.command, entry.example, "run.steps=2000", "--dry-run")
    assert code == 0
    assert "\nsteps = 2000\n" in out
    assert entry.help in command(entry.command, "--help")[1]


def test_what_a_task_trains_its_loader_loads_and_release_takes(chain, packs, tmp_path):
    words = ["run.steps=1", "run.batch_size=8", "optim.warmup=1", "data.workers=0", "run.device=cpu"]
    words += [f"data.shards={packs / 'train'}", f"run.out={tmp_path / 'runs' / 'noisy_classifier'}"]
    TASKS["noisy_classifier"].run("drawings_noisy_classifier", [*words, f"model.clip={chain / 'clip'}"])
    for kind in ("clip", "denoiser", "noisy_clip"):
        (tmp_path / "runs" / kind).symlink_to(chain / kind)
        TASKS[kind].load(tmp_path / "runs")
    folders = release(tmp_path / "runs", tmp_path / "out")
    assert [folder.parents[1].name for folder in folders] == ["clip", "denoiser", "noisy_clip", "noisy_classifier"]
    _, classes = TASKS["noisy_classifier"].load(tmp_path / "out")
    assert classes


FOREIGN = '''
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from clipkit.config import Recipe
from clipkit.distributed import mean_over_batch
from clipkit.train import Task, TaskSpec


@dataclass(frozen=True)
class ModelConfig:
    """A linear model."""

    width: int = 8
    """Pixels of a side."""


@dataclass(frozen=True)
class MeanRecipe(Recipe):
    """A regression."""

    model: ModelConfig


class Mean(Task):
    """Learn the mean brightness of an image."""

    kind = "mean"

    def __init__(self, recipe, shards):
        super().__init__()
        self.image_size = recipe.model.width
        self.model = torch.nn.Linear(3 * self.image_size**2, 1)

    def forward(self, batch):
        x = batch.images.float().flatten(1) / 255
        return (F.mse_loss(self.model(x).squeeze(1), x.mean(dim=1), reduction="none"),)

    def loss(self, features, batch):
        return mean_over_batch(features[0]), {}


SPEC = TaskSpec(MeanRecipe, Mean, lambda run: run)


def hinge(image, text, logit_scale):
    return mean_over_batch((1 - logit_scale * (image * text).sum(dim=1)).relu())
'''


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A separate package with a task, a loss and a recipe."""
    (tmp_path / "meanings.py").write_text(FOREIGN)
    info = tmp_path / "meanings-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: meanings\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[clipkit.tasks]\nmean = meanings:SPEC\n[clipkit.losses]\nhinge = meanings:hinge\n"
    )
    (tmp_path / "drawings_mean.toml").write_text(
        "[run]\nout = 'runs/mean'\nsteps = 2\nbatch_size = 8\n[data]\nshards = 'x'\nworkers = 0\n[optim]\nwarmup = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "meanings", raising=False)
    monkeypatch.chdir(tmp_path)
    for table in (TASKS, LOSSES):
        vars(table).pop("entries", None)
    yield tmp_path
    for table in (TASKS, LOSSES):
        vars(table).pop("entries", None)


def test_a_task_of_another_package_is_a_command_and_trains(foreign, packs, command):
    assert "mean " in command("--help")[1]
    assert "Train a mean (from meanings)." in command("mean", "--help")[1]
    words = [f"data.shards={packs / 'train'}"]
    code, _, err = command("mean", "drawings_mean.toml", *words)
    assert code == 0, err
    assert (foreign / "runs/mean/checkpoints/step-00000002/ema.safetensors").is_file()
    assert command("mean", "drawings_mean.toml", *words, "run.steps=3")[0] == 0  # resumes
    assert "[model] of mean: A linear model." in command("recipe", "--keys", "--task", "mean")[1]
    assert "# Pixels of a side.\nwidth = 8" in command("recipe", "drawings_mean.toml")[1]
    assert command("release", "runs/mean", "out")[0] == 0
    assert (
        "progressive_size: the images of a mean have one size"
        in (command("mean", "drawings_mean.toml", *words, "run.out=runs/small", "data.progressive_size=4")[2])
    )


def test_a_loss_of_another_package_trains(foreign, packs, command):
    words = ["run.steps=1", "run.batch_size=8", "optim.warmup=1", "data.workers=0", "data.val=", "run.out=runs/clip"]
    code, _, err = command("pretrain", "drawings_clip", *words, f"data.shards={packs / 'train'}", "loss.kind=hinge")
    assert code == 0, err
    assert '("info_nce" | "sigmoid" | "hinge", default "info_nce")' in command("recipe", "--keys")[1]


def test_a_task_with_the_name_of_a_command_has_none(foreign, command):
    (foreign / "meanings-1.0.dist-info" / "entry_points.txt").write_text("[clipkit.tasks]\npack = meanings:SPEC\n")
    code, _, err = command("--help")
    assert (code, err) == (
        0,
        "clipkit: task 'pack' (from meanings) has no command: clipkit has one of that name\n",
    )


def test_an_unknown_command_is_still_unknown(foreign, command):
    code, _, err = command("meen")
    assert (code, err.count("\n")) == (2, 1)


def test_a_task_of_a_package_that_cannot_be_imported_is_one_line(foreign, command):
    (foreign / "meanings.py").write_text("import nothing_of_this_name\n")
    assert "mean " in command("--help")[1]
    code, _, err = command("mean", "drawings_mean.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "task 'mean' (from meanings) cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'"
        in err
    )


def test_libraries_reach_training_through_the_registry_alone():
    """Commands and the registry's tables name clipkit.train; no other module outside of it imports from it."""
    importing = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("train", "commands"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        tree.body = [node for node in tree.body if node not in typing]
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            importing += [f"{relative}: {name}" for name in names if name.startswith("clipkit.train")]
    assert not importing


def test_commands_import_no_torch():
    code = "import sys, clipkit.cli, clipkit.train; print('torch' in sys.modules, 'importlib.metadata' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_shipped_recipes_are_of_a_task():
    from clipkit.reference import kind_of

    for path in SHIPPED.glob("*.toml"):
        assert load_recipe(TASKS[kind_of(path)].recipe, path).run.steps
