"""A classifier of noised pictures learns, loads and guides."""

import json

import pytest
import torch
from toy_distributions import TINY

from clipkit.errors import RecipeError
from clipkit.guidance.guiders import gradient, score_shift
from clipkit.guidance.loading import load_classifier, load_denoiser
from clipkit.train import noisy_classifier


@pytest.fixture(scope="module")
def trained(chain, packs, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier") / "noisy_classifier"
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={out}", f"model.clip={chain / 'clip'}"]
    noisy_classifier.run("drawings_noisy_classifier", [*words, "run.steps=8"])
    return out


def test_it_is_a_distribution_over_the_classes(trained):
    model, classes = load_classifier(trained)
    log_p = model(torch.randn(3, 3, 24, 24), torch.tensor([-4.0, 0.0, torch.inf]))
    assert log_p.shape == (3, len(classes)) == (3, 128)
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(3))


def test_it_learns(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(0 <= line["accuracy"] <= 1 for line in lines if "accuracy" in line)


def test_it_guides(trained, chain):
    model, _ = load_classifier(trained)
    denoiser = load_denoiser(chain)
    x, lam = torch.randn(2, 3, 24, 24), torch.tensor(0.5)
    with torch.no_grad():
        guided = score_shift(model.log_prob(7), 2.0)(denoiser)(x, lam)
        g = gradient(model.log_prob(7), x, lam.expand(2))
        a, s = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
        torch.testing.assert_close(guided.x0, denoiser(x, lam).x0 + 2 * s**2 / a * g)


def test_it_may_see_another_size_than_its_clip(chain, packs, tmp_path):
    out = tmp_path / "noisy_classifier"
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={out}", f"model.clip={chain / 'clip'}"]
    noisy_classifier.run("drawings_noisy_classifier", [*words, "model.image_size=36"])
    model, _ = load_classifier(out)
    assert model.tower.clip.config.image_size == 36
    assert torch.isfinite(model(torch.randn(2, 3, 36, 36), torch.tensor([0.0, 1.0]))).all()


def test_a_pack_without_classes_is_refused(chain, packs, tmp_path):
    words = [*TINY, f"data.shards={packs / 'train'}", f"run.out={tmp_path}", f"model.clip={chain / 'clip'}"]
    with pytest.raises(RecipeError, match="a classifier needs one such pack"):
        noisy_classifier.run("drawings_noisy_classifier", [*words, f'data.mix={{"{packs / "heldout"}"=0.2}}'])
