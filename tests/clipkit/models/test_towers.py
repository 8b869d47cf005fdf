import os
import subprocess
import sys

import pytest
import torch

from clipkit.errors import RecipeError
from clipkit.models.clip import CLIPConfig, ImageTower
from clipkit.models.towers import PooledResNet, SmallResNet, residual_blocks
from clipkit.registry import TOWERS, Entry


@pytest.mark.parametrize("tower", [SmallResNet((8, 16, 24), (1, 2, 1)), PooledResNet((4, 8, 16, 24), (1, 2, 0))])
def test_keeps_sixteen_positions_and_names_its_stages(tower):
    tower.eval()
    seen = {}
    for info in tower.feature_info:
        stage = tower.get_submodule(info["module"])
        stage.register_forward_hook(lambda _, __, out, name=info["module"]: seen.update({name: tuple(out.shape[1:])}))
    assert tower(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert seen == {"stages.0": (8, 16, 16), "stages.1": (16, 8, 8), "stages.2": (24, 4, 4)}


def test_pooling_keeps_the_strongest_of_what_was_made_at_the_finer_side():
    """A side that is odd loses its last row and column, as max pooling does it; BatchNorm follows, so order matters."""
    tower = PooledResNet((4, 8), (0,)).eval()
    x = torch.randn(2, 3, 10, 10)
    fine = tower.stages[0][0][0](tower.stem(x))
    assert fine.shape == (2, 8, 10, 10)
    torch.testing.assert_close(
        tower(x), tower.stages[0][0][2](fine.view(2, 8, 5, 2, 5, 2).amax((3, 5))).relu().mean((2, 3))
    )
    assert tower(torch.randn(1, 3, 9, 9)).shape == (1, 8)


def test_blocks_start_as_their_shortcuts():
    """With the last gain at zero, a block whose shortcut is the identity passes what is positive through unchanged."""
    block = SmallResNet((8,), (2,)).eval().stages[0][1]
    x = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_a_block_may_halve_the_side_and_keep_the_width():
    assert SmallResNet((8, 8), (1, 1))(torch.randn(2, 3, 24, 24)).shape == (2, 8)


@pytest.mark.parametrize(("name", "depths"), [("clipkit_resnet", [1, 1]), ("clipkit_resnet9", [1])])
def test_is_an_image_tower_by_name(name, depths):
    tower = ImageTower(CLIPConfig(name, 32, {"channels": [8, 16], "depths": depths}, embed_dim=12))
    assert tower(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 12)


def test_channels_and_depths_must_agree():
    with pytest.raises(RecipeError, match="2 channels for 1 depths"):
        ImageTower(CLIPConfig("clipkit_resnet", 32, {"channels": [8, 16], "depths": [1]}))
    with pytest.raises(RecipeError, match="2 channels for 2 depths"):
        ImageTower(CLIPConfig("clipkit_resnet9", 32, {"channels": [8, 16], "depths": [1, 1]}))


PACKAGE = """
from torch import nn

class PatchMean(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.blocks = nn.Sequential(nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1))
        self.feature_info = [{"module": "blocks", "num_chs": width}]

    def forward(self, x):
        return self.blocks(self.stem(x)).mean(dim=(2, 3))
"""


def test_a_tower_of_another_package_is_trained_by_a_recipe(packs, tmp_path):
    """In another process, as a user has it: the package is installed, and the recipe names its tower."""
    site = tmp_path / "site"
    info = site / "patchwork-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "patchwork.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: patchwork\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[clipkit.towers]\nmy-tower = patchwork:PatchMean\n")
    words = [
        *("model.image_tower=my-tower", "model.image_kwargs={width=12}", f"data.shards={packs / 'train'}", "data.val="),
        *("run.steps=2", "run.batch_size=16", "optim.warmup=1", "data.workers=0", f"run.out={tmp_path / 'run'}"),
        *("finetune.layer_decay=0.5", "finetune.lock=image", "finetune.unlock_blocks=1"),
    ]
    code = f"from clipkit.cli import main; main({['pretrain', 'drawings_clip', *words]!r})"
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    load = f"import clipkit; print(type(clipkit.load({str(tmp_path / 'run')!r}, 'cpu').model.image.trunk).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", load], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "PatchMean", run.stderr


def test_a_tower_of_another_package_does_not_replace_a_model_of_timm(monkeypatch):
    foreign = {"resnet18": Entry("torch.nn:Identity", "from patchwork")}
    monkeypatch.setitem(vars(TOWERS), "entries", {**TOWERS.entries, **foreign})
    with pytest.raises(RecipeError, match=r"'resnet18' \(from patchwork\) has the name of a timm model; rename it"):
        ImageTower(CLIPConfig("resnet18"))


def test_a_tower_without_the_names_of_its_blocks_is_refused():
    with pytest.raises(RecipeError, match="image tower Identity has no feature_info, which names its blocks"):
        residual_blocks(torch.nn.Identity())
