"""The curve counts what is right, on the same noise for all."""

import json
import math

import pytest
import torch
from PIL import Image

from clipkit.cli import cli
from clipkit.guidance.curve import LEVELS, accuracy_at, clean, noise_aware
from clipkit.guidance.loading import load_guide


def test_accuracy_counts_the_nearest_target():
    images = torch.full((6, 3, 2, 2), -1.0)
    images[3:] = 1
    targets, seen = torch.eye(2), []

    def encode(x, lam):
        seen.append((x, lam))
        bright = (x.mean(dim=(1, 2, 3)) > 0).long()
        return targets[bright]

    wanted = torch.tensor([0, 0, 1, 1, 1, 0])
    assert accuracy_at(encode, targets, images, wanted, math.inf) == 4 / 6
    assert seen[0][1].isinf().all()
    for level in (-3.0, -3.0):
        accuracy_at(encode, targets, images, wanted, level)
    assert torch.equal(seen[1][0], seen[2][0])
    assert not torch.equal(seen[1][0], seen[0][0])


def test_untrained_modulation_sees_what_the_clean_tower_sees(chain):
    guide = load_guide(chain)
    for layer in [*guide.model.modulations, guide.model.temperature]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x, lam = torch.randn(3, 3, 24, 24), torch.zeros(3)
    with torch.no_grad():
        torch.testing.assert_close(noise_aware(guide.model)(x, lam), clean(guide.model)(x, lam))


@pytest.mark.parametrize("classed", [True, False])
def test_the_command(chain, packs, tmp_path, capsys, classed):
    pytest.importorskip("matplotlib")
    folder = packs / "heldout"
    if not classed:
        about = json.loads((folder / "index.json").read_text())
        (tmp_path / "pack").mkdir()
        for file in folder.iterdir():
            (tmp_path / "pack" / file.name).symlink_to(file)
        (tmp_path / "pack" / "index.json").unlink()
        (tmp_path / "pack" / "index.json").write_text(json.dumps({**about, "classes": []}))
        folder = tmp_path / "pack"
    words = ["noise-curve", "--model", str(chain), "--shards", str(folder), "--n", "20"]
    cli.main([*words, "--out", str(tmp_path / "curve.png"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 20
    assert found["targets"] == (128 if classed else 20)
    assert len(found["log_snr"]) == len(found["noise-aware"]) == len(found["clean"]) == len(LEVELS)
    assert found["log_snr"][-1] == "clean"
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 500
    cli.main(words, standalone_mode=False)
    assert "top-1 of 20 pictures" in capsys.readouterr().out
