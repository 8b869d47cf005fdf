"""Metrics of picture pairs: PSNR, SSIM, LPIPS, perceptual and style distance; perceptual path length (PPL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import DataError, UsageError


def _pair(x: Tensor, y: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Both in float64. Raises UsageError for pictures of unequal sizes or beyond the range, DataError for NaN in them.

    A range R is [0, R] or [-R / 2, R / 2]; rounding may step a ten-thousandth beyond.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise UsageError(f"pictures are {list(x.shape)} and {list(y.shape)}; both must be [B, C, H, W] of one size")
    if not 0 < data_range < torch.inf:
        raise UsageError(f"data_range is {data_range}; it must be the width of the pictures' range, above 0")
    x, y = x.double(), y.double()
    values = torch.cat([x.flatten(), y.flatten(), torch.zeros(1).to(x)])  # both ranges hold 0
    if not values.isfinite().all():
        raise DataError("pictures hold NaN or infinities; they cannot be compared")
    (low, high), rounding = (float(end) for end in values.aminmax()), 1e-4 * data_range
    if max(-low, high) > data_range / 2 + rounding and not (-rounding <= low and high <= data_range + rounding):
        raise UsageError(
            f"pictures go from {low:g} to {high:g}, which is neither in [0, {data_range:g}] nor in "
            f"[{-data_range / 2:g}, {data_range / 2:g}]; give data_range the width of their range"
        )
    return x, y


def psnr(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair: [B, C, H, W] twice, on a scale of `data_range` -> [B].

    `data_range` is the width of the range that the pictures lie in: 2 for [-1, 1], 1 for [0, 1], 255 for bytes.
    Infinite for equal pictures. Raises UsageError for pictures beyond that range, DataError for NaN.
    """
    x, y = _pair(x, y, data_range)
    return 10 * (data_range**2 / (x - y).square().flatten(1).mean(dim=1)).log10()


def mean_psnr(decibels: Tensor) -> tuple[float, int]:
    """Mean PSNR [B] of the pairs that differ, and how many are equal: with one of those the mean would be infinite.

    Infinite when all are equal.
    """
    differing = decibels[decibels.isfinite()].double()
    return float(differing.mean()) if len(differing) else torch.inf, len(decibels) - len(differing)


def ssim(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each pair, [B] (Wang et al. 2004, equation 13): Gaussian window of deviation 1.5.

    The window is 11 pixels wide and lies within the picture. Raises UsageError for pictures smaller than that or
    beyond `data_range` (see `psnr`), DataError for NaN.
    """
    x, y = _pair(x, y, data_range)
    if min(x.shape[-2:]) < 11:
        raise UsageError(f"SSIM looks through a window of 11 pixels; these pictures have {list(x.shape[-2:])}")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    places = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    weights = (-places.square() / (2 * 1.5**2)).exp()
    weights = weights / weights.sum()
    channels = x.shape[1]

    def local(image: Tensor) -> Tensor:
        rows = F.conv2d(image, weights.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(rows, weights.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    mx, my = local(x), local(y)
    vx, vy, covariance = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    alike = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return alike.flatten(1).mean(dim=1)


def lpips(x: Sequence[Tensor], y: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """LPIPS from the layers' activations, each [B, C, H, W] -> [B] (Zhang et al. 2018, arXiv 1801.03924, equation 1).

    `weights` are the learned ones, [C] for each layer; without them all channels weigh the same (its "baseline").
    """
    total = torch.zeros(len(x[0]), device=x[0].device)
    for i, (one, other) in enumerate(zip(x, y, strict=True)):
        apart = (_unit(one) - _unit(other)).square()
        weighed = apart if weights is None else apart * weights[i].to(apart).view(1, -1, 1, 1)
        total = total + weighed.sum(dim=1).mean(dim=(1, 2))
    return total


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def perceptual_distance(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of layers' activations [B, C, H, W] -> [B] (Johnson et al. 2016, 1603.08155, eq. 2)."""
    return torch.stack([(a - b).square().flatten(1).mean(dim=1) for a, b in zip(x, y, strict=True)]).mean(dim=0)


def style_distance(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Squared Frobenius distance of the Gram matrices, over layers (Johnson et al. 2016, equations 3 and 4) -> [B]."""
    apart = [(gram(a) - gram(b)).square().sum(dim=(1, 2)) for a, b in zip(x, y, strict=True)]
    return torch.stack(apart).mean(dim=0)


def gram(features: Tensor) -> Tensor:
    """[B, C, H, W] -> inner products of the channels [B, C, C], over C H W."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """From a to b [B, ...] along the great circle, t [B] in [0, 1] (Shoemake 1985).

    Between ends of one direction that is the straight line. Opposite ends have many great circles: the one is taken
    that goes through the axis on which a is least. Computed in float64: between nearly opposite ends the factors are as
    large as the ends' sum is small.
    """
    flat_a, flat_b, t = a.flatten(1).double(), b.flatten(1).double(), t[:, None].double()
    one, other = F.normalize(flat_a, dim=1), F.normalize(flat_b, dim=1)
    apart, sum_ = (one - other).norm(dim=1, keepdim=True), (one + other).norm(dim=1, keepdim=True)
    angle = 2 * torch.atan2(apart, sum_)  # exact for small ones too (Kahan 2006, section 12)
    # sin(x angle) / sin(angle) = x sinc(x angle) / sinc(angle): no 0 / 0 where the angle is 0.
    near, far = (x * torch.sinc(x * angle / torch.pi) / torch.sinc(angle / torch.pi) for x in (1 - t, t))
    line = near * flat_a + far * flat_b
    opposite = sum_ < 8 * torch.finfo(sum_.dtype).eps
    if not bool(opposite.any()):
        return line.view_as(a).to(a.dtype)
    least = F.one_hot(one.abs().argmin(dim=1), one.shape[1]).to(one)
    across = F.normalize(least - (least * one).sum(dim=1, keepdim=True) * one, dim=1)
    length = torch.lerp(flat_a.norm(dim=1, keepdim=True), flat_b.norm(dim=1, keepdim=True), t)
    turn = length * ((torch.pi * t).cos() * one + (torch.pi * t).sin() * across)
    return torch.where(opposite, turn, line).view_as(a).to(a.dtype)


def perceptual_path_length(
    generate: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    seed: int = 0,
    epsilon: float = 1e-4,
) -> float:
    """PPL of a generator over the paths from the first half of `latents` [2 B, ...] to the second.

    d(G(slerp(a, b, t)), G(slerp(a, b, t + epsilon))) / epsilon^2, t uniform (Karras et al. 2019, arXiv 1812.04948,
    equation 2); the mean without the lowest and highest hundredth, as there. Float64 latents are advised: the two
    pictures hardly differ. Raises UsageError for fewer than two latents, DataError for distances that are not finite.
    """
    if len(latents) < 2:
        raise UsageError(f"a path needs two latents; found {len(latents)}")
    half = len(latents) // 2
    a, b = latents[:half], latents[half : 2 * half]
    t = torch.rand(half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(latents)
    lengths = distance(generate(slerp(a, b, t)), generate(slerp(a, b, t + epsilon))) / epsilon**2
    if bad := int((~lengths.isfinite()).sum()):
        raise DataError(f"{bad} of {half} paths have no finite length; check the latents and the generator")
    low, high = lengths.double().quantile(torch.tensor([0.01, 0.99], dtype=torch.float64, device=lengths.device))
    return float(lengths[(lengths >= low) & (lengths <= high)].double().mean())
