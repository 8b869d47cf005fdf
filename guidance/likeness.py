"""How alike two pictures are: PSNR, SSIM, LPIPS, perceptual and style distance; how smooth a generator is: PPL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import UsageError


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 4:
        raise UsageError(f"pictures are {list(x.shape)} and {list(y.shape)}; both must be [B, C, H, W] of one size")
    return x.double(), y.double()


def psnr(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair: [B, C, H, W] twice, on a scale of `data_range` -> [B]."""
    x, y = _pair(x, y)
    return 10 * (data_range**2 / (x - y).square().flatten(1).mean(dim=1)).log10()


def ssim(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each pair, [B] (Wang et al. 2004, equation 13): Gaussian window of deviation 1.5.

    The window is 11 pixels wide and lies within the picture. Raises UsageError for pictures smaller than that.
    """
    x, y = _pair(x, y)
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
    """From a to b [B, ...] along the great circle, t [B] in [0, 1] (Shoemake 1985)."""
    shape = (-1, *[1] * (a.ndim - 1))
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1))
    angle = cosine.clamp(-1 + 1e-12, 1 - 1e-12).acos()
    near, far = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    return near.view(shape) * a + far.view(shape) * b


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
    pictures hardly differ. Raises UsageError for fewer than two latents.
    """
    if len(latents) < 2:
        raise UsageError(f"a path needs two latents; found {len(latents)}")
    half = len(latents) // 2
    a, b = latents[:half], latents[half : 2 * half]
    t = torch.rand(half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(latents)
    lengths = distance(generate(slerp(a, b, t)), generate(slerp(a, b, t + epsilon))) / epsilon**2
    low, high = lengths.double().quantile(torch.tensor([0.01, 0.99], dtype=torch.float64, device=lengths.device))
    return float(lengths[(lengths >= low) & (lengths <= high)].double().mean())
