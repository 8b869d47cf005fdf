"""The curve counts what is right, on the same noise for all."""

import io
import json
import math
import tarfile

import pytest
import torch
from PIL import Image

from clipkit.cli import cli
from clipkit.guidance.loading import load_guide
from clipkit.guidance.metrics.noise_curve import LEVELS, accuracy_at, clean, noise_aware


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
        about = json.loads((folder / "pack.json").read_text())
        (tmp_path / "pack").mkdir()
        for file in folder.iterdir():
            (tmp_path / "pack" / file.name).symlink_to(file)
        (tmp_path / "pack" / "pack.json").unlink()
        (tmp_path / "pack" / "pack.json").write_text(json.dumps({**about, "classes": []}))
        folder = tmp_path / "pack"
    words = ["noise-curve", "--model", str(chain), "--shards", str(folder), "--n", "20"]
    cli.main([*words, "--out", str(tmp_path / "curve.png"), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 20
    assert found["targets"] == (128 if classed else 14)  # equal captions are one target
    assert len(found["log_snr"]) == len(found["noise-aware"]) == len(found["clean"]) == len(LEVELS)
    assert found["log_snr"][-1] == "clean"
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 500
    cli.main(words, standalone_mode=False)
    assert "top-1 of 20 pictures" in capsys.readouterr().out


def test_a_curve_skips_bad_pictures_counts_equal_captions_once_and_needs_two(chain, tmp_path, command):
    def pack(name, pairs):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "a.tar", "w") as tar:
            for i, (image, caption) in enumerate(pairs):
                for suffix, data in (("png", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return ["noise-curve", "--model", chain, "--shards", tmp_path / name]

    def picture(colour):
        buffer = io.BytesIO()
        Image.new("RGB", (24, 24), colour).save(buffer, "PNG")
        return buffer.getvalue()

    some = [(picture("red"), "red"), (b"no picture", "blue"), (picture("blue"), "blue"), (picture("red"), "red")]
    code, out, _ = command(*pack("some", some), "--json")
    found = json.loads(out)
    assert (code, found["n"], found["targets"], found["skipped"]) == (0, 3, 2, {"not an image": 1})
    # Two pictures are one and the same: both are right or both are wrong.
    assert {round(3 * value) for value in found["clean"]} <= {0, 1, 2, 3}
    assert found["clean"][-1] in (0, 1 / 3, 2 / 3, 1)
    code, _, err = command(*pack("one", [(picture("red"), "red"), (picture("blue"), "red")]))
    assert (code, "one class or caption" in err) == (2, True)
    code, _, err = command(*pack("none", [(b"no", "red"), (b"", "blue")]))
    assert (code, "no picture of" in err, err.count("\n")) == (1, True, 1)
    for out, part in (("curve.xyz", "must end in one of .pdf, .png, .svg"), ("some/a.tar/x.png", "cannot write into")):
        code, _, err = command("noise-curve", "--model", "none", "--shards", "none", "--out", tmp_path / out)
        assert (code, part in err, err.count("\n")) == (2, True, 1)
