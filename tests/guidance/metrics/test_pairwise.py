"""Against scikit-image, torchmetrics' networks and closed forms."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import DataError, UsageError
from clipkit.guidance.metrics.pairwise import (
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 3), (4, 1)])
def test_slerp_of_equal_and_opposite_ends_is_what_it_tends_to(dtype, shape):
    a, t = pictures(0, *shape).to(dtype), torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=dtype)
    weight = t.view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(slerp(a, a, t), a)
    torch.testing.assert_close(slerp(a, 2 * a, t), (1 + weight) * a)  # of one direction: the straight line
    turned = slerp(a, -a, t)
    torch.testing.assert_close(turned[0], a[0])
    torch.testing.assert_close(turned[3], -a[3])
    along = (turned * a).flatten(1).sum(dim=1) / a.flatten(1).square().sum(dim=1)
    torch.testing.assert_close(along, (torch.pi * t).cos())
    if a[0].numel() > 1:  # on a line there is no way around
        torch.testing.assert_close(turned.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))


@given(st.floats(0, math.pi), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_slerp_in_the_plane_turns_evenly(angle, t, dtype):
    near = 1e-3 if dtype == torch.float32 else 1e-9
    if math.pi - angle < 10 * near:  # there the way depends on digits that the ends do not have
        angle = math.pi / 2
    a, b = (torch.tensor([[math.cos(x), math.sin(x), 0.0]], dtype=dtype) for x in (0.0, angle))
    wanted = torch.tensor([[math.cos(t * angle), math.sin(t * angle), 0.0]], dtype=dtype)
    torch.testing.assert_close(slerp(a, b, torch.tensor([t], dtype=dtype)), wanted, rtol=0, atol=near)


@pytest.mark.parametrize("gap", [1e-5, 2e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_of_nearly_opposite_ends(gap, dtype):
    """|a + b| is the gap, and both ends are exact in float32, of unit length but for the square of the gap."""
    t = torch.linspace(0, 1, 7, dtype=dtype)
    a, b = (torch.tensor([x, y, 0.0], dtype=dtype).expand(7, -1) for x, y in ((1.0, 0.0), (-1.0, gap)))
    angle = (math.pi - math.atan(gap)) * t.double()
    wanted = torch.stack([angle.cos(), angle.sin(), 0 * angle], dim=1).to(dtype)
    found = slerp(a, b, t)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=gap)


def test_slerp_from_nothing_is_finite():
    zero, b, half = torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([0.5])
    assert slerp(zero, b, half).isfinite().all()
    assert not slerp(zero, zero, half).any()


def test_path_length_between_equal_latents_is_zero():
    latents = pictures(0, 3, 5).repeat(2, 1)
    assert perceptual_path_length(lambda z: z, lambda x, y: (x - y).square().sum(dim=1), latents) < 1e-20


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


@pytest.mark.parametrize(("low", "high", "data_range"), [(-1, 1, 2.0), (0, 2, 2.0), (0, 1, 1.0), (0, 255, 255)])
def test_pictures_may_fill_their_range(low, high, data_range):
    x = torch.linspace(low, high, 3 * 16 * 16).view(1, 3, 16, 16)
    for measure in (psnr, ssim):
        assert measure(x, x.flip(-1), data_range).isfinite().all()
        assert measure((x * 1.00001).float(), x, data_range).isfinite().all()  # rounding


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    ("x", "data_range", "error", "message"),
    [
        (torch.full((1, 3, 16, 16), 255.0), 2.0, UsageError, r"from 0 to 255, .* \[0, 2\] nor in \[-1, 1\]"),
        (torch.full((1, 3, 16, 16), -0.5), 1.0, None, ""),
        (torch.full((1, 3, 16, 16), -0.6), 1.0, UsageError, r"from -0.6 to 0"),
        (torch.full((1, 3, 16, 16), 200, dtype=torch.uint8), 1.0, UsageError, "from 0 to 200"),
        (torch.linspace(-1, 2, 768).view(1, 3, 16, 16), 2.0, UsageError, "from -1 to 2"),
        (torch.full((1, 3, 16, 16), torch.nan), 2.0, DataError, "NaN or infinities"),
        (torch.full((1, 3, 16, 16), -torch.inf), 2.0, DataError, "NaN or infinities"),
        (torch.zeros(1, 3, 16, 16), 0.0, UsageError, "data_range is 0"),
        (torch.zeros(1, 3, 16, 16), torch.nan, UsageError, "data_range is nan"),
        (torch.zeros(1, 3, 16, 16), torch.inf, UsageError, "data_range is inf"),
    ],
)
def test_pictures_lie_in_the_range_that_is_said(measure, x, data_range, error, message):
    for one, other in ((x, torch.zeros_like(x)), (torch.zeros_like(x), x)):
        if error is None:
            assert measure(one, other, data_range).isfinite().all()
            continue
        with pytest.raises(error, match=message):
            measure(one, other, data_range)


def test_a_path_without_a_length_is_said():
    with pytest.raises(DataError, match="2 of 2 paths have no finite length"):
        perceptual_path_length(lambda z: z, lambda x, y: x[:, 0] * torch.nan, pictures(0, 4, 3))


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
