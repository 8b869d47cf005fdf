"""Which network the features are of is never in doubt, and is what its name says."""

import json
import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clipkit
from clipkit.cli import cli
from clipkit.data.images import to_image
from clipkit.data.sources import encode_png, pictures
from clipkit.errors import CheckpointError, DataError, UsageError
from clipkit.guidance.metrics.extractors import activations, clip_extractor, extract, inception_extractor
from clipkit.models.clip import CLIP, CLIPConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`one`: 30 pictures; `other`: the same with noise."""
    root, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for name in ("one", "other"):
        (root / name).mkdir()
    for i in range(30):
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
        smooth = torch.nn.functional.interpolate(coarse, size=24, mode="bilinear")[0]
        noisy = smooth + 0.3 * torch.randn(3, 24, 24, generator=generator)
        for name, picture in (("one", smooth), ("other", noisy)):
            (root / name / f"{i}.png").write_bytes(encode_png(to_image(picture)))
    return root


def metrics(capsys, *words):
    cli.main(["metrics", *map(str, words)], standalone_mode=False)
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("tower", "arguments", "channels"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}, [32, 32]),
        ("clipkit_resnet", {"channels": [8, 16], "depths": [1, 2]}, [8, 16, 16]),
        ("clipkit_resnet9", {"channels": [4, 8, 16], "depths": [1, 0]}, [8, 8, 16]),
        ("swin_tiny_patch4_window7_224", {"patch_size": 2, "window_size": 2, "depths": [1, 1], "embed_dim": 16,
         "num_heads": [1, 2]}, [16, 32]),
    ],
)  # fmt: skip
def test_layers_of_any_tower_have_their_channels_first(tower, arguments, channels):
    config = CLIPConfig(tower, 32, arguments, embed_dim=16, text_width=32, text_layers=1, text_heads=2)
    model = CLIP(config, 50, 2).eval()
    found = activations(model.image, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert [layer.shape[1] for layer in found] == channels
    assert {layer.ndim for layer in found} == {4}


def test_the_command_on_collections(chain, folders, capsys):
    said = metrics(capsys, folders / "one", folders / "other", "--model", chain, "--prompt", "a red car", "--json")
    found = json.loads(said.out)
    assert found["extractor"] == f"CLIP {chain}"
    assert len(found["weights"]) == 16
    assert (found["reference"], found["samples"]) == (30, 30)
    assert min(found["frechet"], found["frechet_floor"]) > 1e-3
    assert {"cmmd", "precision", "recall", "frechet_bias", "clip_score"} <= set(found)
    assert "30 and 30 pictures are few for" in said.err
    same = json.loads(metrics(capsys, folders / "one", folders / "one", "--model", chain, "--json").out)
    assert abs(same["frechet"]) < 1e-6
    assert (same["precision"], same["recall"]) == (1, 1)


def test_the_command_on_packs_tars_and_a_training_set(chain, packs, folders, tmp_path, capsys):
    import tarfile

    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        archive.add(folders / "one", "one")
    said = metrics(
        capsys, tmp_path / "one.tar", packs / "heldout", "--train", folders / "one", "--model", chain, "--json"
    )
    found = json.loads(said.out)
    assert found["samples"] == 64
    assert abs(found["frechet_floor"]) < 1e-6


def test_the_command_on_pairs(chain, folders, capsys):
    found = json.loads(metrics(capsys, folders / "one", folders / "other", "--pairs", "--model", chain, "--json").out)
    assert found["pairs"] == 30
    assert 10 < found["psnr"] < 25
    assert 0 < found["ssim"] < 0.95
    assert min(found["lpips_unlearned"], found["perceptual"], found["style"]) > 0
    table = metrics(capsys, folders / "one", folders / "one", "--pairs", "--model", chain).out
    assert "weights" in table.splitlines()[0]
    assert "ssim                  1" in table
    assert "psnr                  inf" in table
    said = metrics(capsys, folders / "one", folders / "one", "--pairs", "--model", chain, "--json")
    same = json.loads(said.out, parse_constant=pytest.fail)
    assert (same["psnr"], same["identical"]) == (None, 30)
    assert "psnr is inf, which JSON cannot say: null" in said.err


def saved(folder, pictures):
    """A folder with PNGs of tensors [3, H, W] in [-1, 1], or of bytes as they are."""
    folder.mkdir()
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture if isinstance(picture, bytes) else encode_png(to_image(picture)))
    return folder


def test_one_equal_pair_spoils_no_mean(chain, tmp_path, capsys):
    x = torch.zeros(3, 16, 16)
    one = saved(tmp_path / "one", {"a.png": x, "b.png": x, "c.png": x})
    other = saved(tmp_path / "other", {"a.png": x, "b.png": x + 0.5, "c.png": x + 0.1})
    alone = saved(tmp_path / "alone", {"b.png": x + 0.5, "c.png": x + 0.1})
    found, without = (
        json.loads(metrics(capsys, one, side, "--pairs", "--model", chain, "--json").out) for side in (other, alone)
    )
    assert (found["pairs"], found["identical"], without["identical"]) == (3, 1, 0)
    assert found["psnr"] == without["psnr"]  # of the pairs that differ
    assert found["ssim"] > without["ssim"]  # of all


def test_pairs_count_what_they_leave_out(chain, tmp_path, capsys):
    x = torch.zeros(3, 16, 16)
    one = saved(tmp_path / "one", {"a.png": x, "b.png": b"no", "c.png": x, "d.png": x, "sub.png": x})
    other = saved(tmp_path / "other", {"a.png": x, "b.png": x, "c.png": b"", "e.png": x})
    said = metrics(capsys, one, other, "--pairs", "--model", chain, "--json")
    found = json.loads(said.out)
    counts = ("pairs", "unreadable", "only_in_reference", "only_in_samples")
    assert [found[key] for key in counts] == [1, 2, 2, 1]
    assert f"2 of 5 pictures are only in {one}: d.png, sub.png" in said.err
    assert f"1 of 4 pictures are only in {other}: e.png" in said.err
    assert "2 of 3 pictures skipped: 2 not an image (b.png)" in said.err


def test_a_tar_with_a_name_twice_makes_no_pairs(chain, folders, tmp_path, capsys):
    import tarfile

    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("0.png", "1.png"):
            archive.add(folders / "one" / name, "0.png")
    with pytest.raises(DataError, match=r"twice\.tar has two pictures named 0\.png"):
        metrics(capsys, tmp_path / "twice.tar", folders / "one", "--pairs", "--model", chain)


def test_unreadable_pictures_of_every_side_are_counted(chain, folders, tmp_path, capsys):
    sides = []
    for i, name in enumerate(("reference", "samples", "train")):
        good = {f"{j}.png": (folders / "one" / f"{j}.png").read_bytes() for j in range(5)}
        sides.append(saved(tmp_path / name, {**good, **{f"bad{j}.png": b"nothing" for j in range(i + 1)}}))
    said = metrics(capsys, *sides[:2], "--train", sides[2], "--model", chain, "--json")
    found = json.loads(said.out)
    assert (found["reference"], found["samples"], found["unreadable"]) == (5, 5, 6)
    assert f"{sides[1]}: 2 of 7 pictures skipped: 2 not an image (bad0.png)" in said.err


def test_what_cannot_be_read_is_skipped_and_said(chain, folders, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "good.png").write_bytes((folders / "one" / "0.png").read_bytes())
    extractor = clip_extractor(clipkit.load(chain, "cpu"), "x")
    names, features, skipped = extract(extractor, pictures(str(tmp_path)), source="mine")
    assert names == ["good.png"]
    assert len(features) == 1
    assert skipped == {"not an image": 1}
    assert "mine: 1 of 2 pictures skipped: 1 not an image (bad.png)" in capsys.readouterr().err
    (tmp_path / "good.png").unlink()
    with pytest.raises(DataError, match=r"none of its pictures can be read: 1 not an image \(bad.png\)"):
        extract(extractor, pictures(str(tmp_path)))


def test_complaints(chain, folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "0.png").write_bytes(encode_png(Image.new("RGB", (9, 9))))
    one, bad = folders / "one", saved(tmp_path / "bad", {"0.png": b"nothing"})
    few = saved(tmp_path / "few", {f"{i}.png": torch.zeros(3, 12, 12) for i in range(3)})
    tiny = saved(tmp_path / "tiny", {"0.png": torch.zeros(3, 8, 8)})
    for words, error, message in (
        ((tmp_path / "empty", one), DataError, "empty: it has no pictures"),
        ((one, bad), DataError, "bad: none of its pictures can be read: 1 not an image"),
        ((one, few), UsageError, "at least 4 pictures on each side; found 30 and 3"),
        ((one, one, "--train", tiny), UsageError, "at least 2 pictures that the model was trained on; found 1"),
        ((one, one, "--prompt", " "), UsageError, "--prompt is empty"),
        ((one, one, "--pairs", "--inception", tmp_path / "no.pth"), UsageError, "omit one of them"),
        ((one, bad, "--pairs"), DataError, "none of the 1 pairs can be read: 1 not an image"),
        ((tiny, tiny, "--pairs"), UsageError, "window of 11 pixels"),
        ((tmp_path / "nowhere", one), DataError, "no folder, tar or pack"),
        ((tmp_path / "single", one), UsageError, "at least 4 pictures on each side; found 1 and 30"),
        ((one, one, "--pairs", "--prompt", "x"), UsageError, "--prompt is for"),
        ((one, one, "--pairs", "--train", one), UsageError, "--train is the floor"),
        ((tmp_path / "single", one, "--pairs"), UsageError, "0.png is 9 x 9 and 24 x 24"),
        ((tmp_path / "empty", one, "--pairs"), DataError, "empty: it has no pictures"),
        ((one, folders, "--pairs"), UsageError, "has the name of one of"),
        ((one, one, "--inception", tmp_path / "no.pth"), UsageError, "omit --model"),
    ):
        with pytest.raises(error, match=message):
            metrics(capsys, *words, "--model", chain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "no file at .*pt_inception-2015-12-05"),
        ("folder", "folder", "no file at"),
        ("empty.pth", b"", "is empty; weights are files of safetensors or torch.save"),
        ("text.pth", b"not weights", "is a text file; weights are files of safetensors or torch.save"),
        ("text.safetensors", b"not weights, though long enough for a header", "is a text file"),
        ("cut.pth", b"PK\x03\x04 and no more", "damaged"),
        ("other.pth", {"fc.weight": torch.zeros(2)}, "does not hold the FID's Inception-V3"),
        ("none.pth", {"epoch": 3}, "holds no tensors"),
    ],
)
def test_inception_weights_of_another_kind_are_one_line(command, folders, tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    code, out, err = command("metrics", folders / "one", folders / "one", "--inception", path)
    assert code == 1
    assert not out
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_inception_equals_torch_fidelitys_and_refuses_others(tmp_path, folders, capsys):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    model = inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
    for name, tensor in model.state_dict().items():  # every statistic is its own, so that a mix-up shows
        if "running" in name or (".bn." in name and tensor.is_floating_point()):
            tensor.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    ours = inception_extractor(tmp_path / "weights.pth", "cpu")
    pixels = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    peer = theirs.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    features, logits = peer(pixels)
    torch.testing.assert_close(ours.features(pixels), features, rtol=1e-4, atol=1e-5)
    assert ours.logits is not None
    torch.testing.assert_close(ours.logits(features), logits, rtol=1e-4, atol=1e-4)
    few = tmp_path / "few"
    few.mkdir()
    for i in range(5):
        (few / f"{i}.png").write_bytes((folders / "one" / f"{i}.png").read_bytes())
    found = json.loads(metrics(capsys, few, few, "--inception", tmp_path / "weights.pth", "--json").out)
    assert found["extractor"] == "Inception-V3 (FID)"
    assert math.isfinite(found["inception_score"])
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold the FID's Inception-V3"):
        inception_extractor(tmp_path / "other.safetensors", "cpu")
