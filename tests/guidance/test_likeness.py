"""Against scikit-image, torchmetrics' networks and closed forms."""

import math
import warnings

import pytest
import torch

from clipkit.errors import UsageError
from clipkit.guidance.likeness import (
    gram,
    lpips,
    perceptual_distance,
    perceptual_path_length,
    psnr,
    slerp,
    ssim,
    style_distance,
)


def pictures(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_psnr_and_ssim_equal_scikit_image():
    theirs = pytest.importorskip("skimage.metrics")
    x = pictures(0, 3, 3, 24, 31)
    y = (x + 0.2 * pictures(1, 3, 3, 24, 31)).clamp(-1, 1)
    for i in range(3):
        one, other = (side[i].permute(1, 2, 0).numpy() for side in (x, y))
        assert abs(float(psnr(x, y)[i]) - theirs.peak_signal_noise_ratio(one, other, data_range=2)) < 1e-6
        expected = theirs.structural_similarity(
            one, other, channel_axis=2, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert abs(float(ssim(x, y)[i]) - expected) < 1e-6


def test_equal_pictures():
    x = pictures(0, 2, 3, 16, 16)
    assert psnr(x, x).isinf().all()
    torch.testing.assert_close(ssim(x, x), torch.ones(2).double())


def test_lpips_equals_torchmetrics_given_the_same_features():
    pytest.importorskip("torchmetrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional.image.lpips import _LPIPS
    torch.manual_seed(0)
    theirs = _LPIPS(pretrained=False, net="alex", pnet_rand=True, use_dropout=False).eval()
    for layer in theirs.lins:
        torch.nn.init.uniform_(layer.model[-1].weight)
    x, y = (pictures(seed, 2, 3, 64, 64).float() for seed in (0, 1))
    with torch.no_grad():
        expected = theirs(x, y).flatten()
        a, b = (list(theirs.net(theirs.scaling_layer(image))) for image in (x, y))
        ours = lpips(a, b, [layer.model[-1].weight.flatten() for layer in theirs.lins])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_unlearned_lpips_perceptual_and_style_by_hand():
    a, b = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)], [torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)]
    assert float(lpips(a, b)) == pytest.approx(2 * 0.2**2)
    assert float(perceptual_distance(a, b)) == 1.0
    # Gram matrices over C H W = 2: [[9, 12], [12, 16]] / 2 and [[16, 12], [12, 9]] / 2
    assert float(style_distance(a, b)) == pytest.approx(2 * 3.5**2)


def test_style_does_not_know_where():
    x = pictures(0, 2, 4, 5, 6)
    moved = x.flatten(2)[..., torch.randperm(30)].view_as(x)
    torch.testing.assert_close(gram(x), gram(moved))
    assert float(perceptual_distance([x], [moved]).min()) > 0.1


def test_slerp_keeps_the_length_and_ends_where_it_should():
    a, b = (torch.nn.functional.normalize(pictures(s, 5, 8), dim=1) for s in (0, 1))
    t = torch.linspace(0, 1, 5).double()
    torch.testing.assert_close(slerp(a, b, t).norm(dim=1), torch.ones(5).double())
    torch.testing.assert_close(slerp(a, b, torch.zeros(5).double()), a)
    torch.testing.assert_close(slerp(a, b, torch.ones(5).double()), b)


def test_path_length_of_the_identity_is_the_squared_angle():
    latents = torch.zeros(8, 2, dtype=torch.float64)
    angle = 1.1
    latents[:4, 0] = 1
    latents[4:] = torch.tensor([math.cos(angle), math.sin(angle)])

    def squared(x, y):
        return (x - y).square().sum(dim=1)

    found = perceptual_path_length(lambda z: z, squared, latents)
    assert found == pytest.approx(angle**2, rel=1e-6)
    assert perceptual_path_length(lambda z: 3 * z, squared, latents) == pytest.approx(9 * angle**2, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(pictures(0, 1, 3, 8, 8), pictures(0, 1, 3, 8, 9)), r"\[1, 3, 8, 8\] and \[1, 3, 8, 9\]"),
        (lambda: ssim(pictures(0, 1, 3, 8, 8), pictures(0, 1, 3, 8, 8)), "window of 11 pixels"),
        (lambda: perceptual_path_length(lambda z: z, lambda x, y: x, pictures(0, 1, 3)), "two latents; found 1"),
    ],
)
def test_what_cannot_be_compared(call, message):
    with pytest.raises(UsageError, match=message):
        call()
