import json

import numpy as np
import pytest
import torch
from external_models import write_fashion_mnist
from PIL import Image

import clipkit
from clipkit.cli import cli
from clipkit.data.pack import pack
from clipkit.data.sources import class_source
from clipkit.errors import UsageError
from clipkit.zeroshot import probe
from clipkit.zeroshot.datasets import open_set


def blobs(n, classes=4, dim=12, spread=1.0, seed=0):
    """Overlapping clusters of points, x [n, dim] and y [n]."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, dim))
    y = rng.integers(0, classes, n)
    return torch.from_numpy(centres[y] + spread * rng.normal(size=(n, dim))), torch.from_numpy(y)


@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0, 100.0])
def test_the_fit_is_scikit_learns(C):
    linear = pytest.importorskip("sklearn.linear_model")
    (x, y), (x2, y2) = blobs(400), blobs(1000, seed=1)
    ours = probe.LogisticRegression(4, C).fit(x, y)
    theirs = linear.LogisticRegression(C=C, max_iter=5000, tol=1e-10).fit(x.numpy(), y.numpy())
    assert np.allclose(ours.weight.detach().numpy(), theirs.coef_, atol=2e-4 * max(1, np.abs(theirs.coef_).max()))
    assert ours.accuracy(x2, y2) == pytest.approx(theirs.score(x2.numpy(), y2.numpy()), abs=0.002)


def test_the_strength_is_chosen_on_held_out_images():
    found = probe.probe(blobs(300, spread=3.0), blobs(2000, spread=3.0, seed=1), 4)
    accuracies = {C: probe.LogisticRegression(4, C).fit(*blobs(300, spread=3.0)) for C in (1e-3, found.C, 1e6)}
    scores = {C: m.accuracy(*blobs(2000, spread=3.0, seed=1)) for C, m in accuracies.items()}
    assert found.accuracy == scores[found.C]
    assert found.accuracy >= max(scores.values()) - 0.03


def test_few_shots():
    x, y = blobs(200)
    rows = probe.few(y, 5, seed=3)
    assert y[rows].bincount().tolist() == [5] * 4
    assert rows.equal(probe.few(y, 5, seed=3))
    assert not rows.equal(probe.few(y, 5, seed=4))
    found = probe.probe((x, y), blobs(500, seed=1), 4, shots=5)
    assert (found.train, found.shots) == (20, 5)
    assert found.accuracy > 0.5
    assert probe.probe((x, y), blobs(500, seed=1), 4, shots=1).train == 4
    with pytest.raises(UsageError, match="training images; 100 shots need as many"):
        probe.few(y, 100, 0)


def test_a_probe_of_images(chain, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    words = ["probe", "--model", str(chain), "--train", f"folder:{tmp_path / 'train'}"]
    cli.main([*words, "--test", f"folder:{tmp_path / 'test'}"], standalone_mode=False)
    assert "16 training images, 8 test images, 2 classes" in capsys.readouterr().out
    clip = clipkit.load(chain / "clip", "cpu")
    x, y, skipped = probe.features(clip.model, open_set(f"folder:{tmp_path / 'test'}", tmp_path))
    assert not skipped
    assert (x.shape, x.dtype, y.bincount().tolist()) == ((8, clip.model.config.embed_dim), torch.float64, [4, 4])
    (tmp_path / "test" / "green").mkdir()
    Image.new("RGB", (24, 24), "green").save(tmp_path / "test" / "green" / "0.png")
    with pytest.raises(UsageError, match="they have 2 and 3, and differ first in 'red' and 'green'"):
        cli.main([*words, "--test", f"folder:{tmp_path / 'test'}"], standalone_mode=False)
    names = {"blue": ["blue", "azure"], "red": ["red"]}  # further names do not make other classes
    pack(class_source(tmp_path / "train", names, ["a {}"], 0), tmp_path / "packed")
    cli.main([*words, "--test", f"shards:{tmp_path / 'packed'}"], standalone_mode=False)
    assert "16 training images, 16 test images, 2 classes" in capsys.readouterr().out


def test_a_named_set_is_trained_on_its_training_part(chain, tmp_path, monkeypatch, capsys):
    chance = np.random.default_rng(0)
    parts = [(chance.integers(0, 256, (n, 28, 28), dtype=np.uint8), [i % 10 for i in range(n)]) for n in (40, 20)]
    write_fashion_mnist(tmp_path / "data", *parts)
    monkeypatch.chdir(tmp_path)
    words = ["probe", "--model", str(chain), "--train", "fashion-mnist", "--test", "fashion-mnist", "--json"]
    cli.main(words, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["train"], found["test"]) == (40, 20)


def test_features_are_encoded_once(chain, tmp_path, monkeypatch):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (24, 24), (80 * i, 0, 0)).save(tmp_path / "set" / "a" / f"{i}.png")
    clip, images = clipkit.load(chain / "clip", "cpu"), open_set(f"folder:{tmp_path / 'set'}", tmp_path)
    first, *_ = probe.features(clip.model, images, batch_size=2, cache=tmp_path / "cache")
    seen, encode = [], clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda x: seen.append(len(x)) or encode(x))
    again, *_ = probe.features(clip.model, images, batch_size=2, cache=tmp_path / "cache")
    assert (seen, again.equal(first)) == ([], True)
    Image.new("RGB", (24, 24), "white").save(tmp_path / "set" / "a" / "2.png")  # under its old name
    probe.features(clip.model, images, batch_size=2, cache=tmp_path / "cache")
    assert seen == [1]
