import pytest
import torch

from clipkit.guidance.networks.noisy_clip import GuidanceTarget, NoisyCLIP, noised
from clipkit.models.clip import CLIP, CLIPConfig
from clipkit.models.towers import residual_blocks

TOWERS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}, 2),
    "convnext": ("convnext_atto", {"patch_size": 2, "depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}, 5),
    "resnet": ("resnet18", {"channels": [8, 8, 16, 16]}, 9),
    "small resnet": ("clipkit_resnet", {"channels": [8, 16], "depths": [1, 2]}, 3),
    "pooled resnet": ("clipkit_resnet9", {"channels": [4, 8, 16], "depths": [1, 2]}, 5),
}


def make(name):
    torch.manual_seed(0)
    tower, arguments, blocks = TOWERS[name]
    config = CLIPConfig(tower, 32, arguments, embed_dim=16, text_width=32, text_layers=1, text_heads=2)
    return NoisyCLIP(CLIP(config, 50, 2), width=16).eval(), blocks


@pytest.mark.parametrize("name", TOWERS)
def test_before_training_features_equal_the_clean_models(name):
    model, blocks = make(name)
    assert len(residual_blocks(model.clip.image.trunk)) == blocks
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    for lam in (torch.inf, 3.0, -5.0):
        features, tau = model.encode_image(x, torch.full((3,), lam))
        torch.testing.assert_close(features, model.clip.encode_image(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tau, model.clip.logit_scale.expand(3))


@pytest.mark.parametrize("name", TOWERS)
def test_every_block_hears_the_noise_level(name):
    model, _ = make(name)
    x, lam = torch.randn(2, 3, 32, 32), torch.tensor([0.0, 4.0])
    for layer in model.modulations:
        torch.nn.init.normal_(layer.weight, std=0.1)
    features, _ = model.encode_image(x, lam)
    features.sum().backward()
    assert all(layer.weight.grad.any() for layer in model.modulations)
    assert not torch.allclose(model.encode_image(x, lam + 2)[0], features)


def test_the_clean_tower_inside_is_not_modulated():
    model, _ = make("convnext")
    for layer in model.modulations:
        torch.nn.init.normal_(layer.weight)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = model.clip.encode_image(images)
    model.encode_image(torch.randn(2, 3, 32, 32), torch.zeros(2))
    assert torch.equal(model.clip.encode_image(images), before)


def test_noised_leaves_clean_rows_alone():
    x0, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    clean = torch.tensor([True, False, True])
    x, lam = noised(x0, torch.zeros(3), noise, clean)
    assert torch.equal(x[clean], x0[clean])
    assert lam.tolist() == [torch.inf, 0.0, torch.inf]
    torch.testing.assert_close(x[1], (x0[1] + noise[1]) * 0.5**0.5)


def test_log_prob_is_a_distribution_over_texts():
    model, _ = make("convnext")
    texts = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    x, lam = torch.randn(2, 3, 32, 32), torch.zeros(2)
    each = [
        model.log_prob([GuidanceTarget(texts[i : i + 1], torch.cat([texts[:i], texts[i + 1 :]]))])(x, lam)
        for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(each).exp().sum(0), torch.ones(2))
