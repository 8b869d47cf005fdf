"""Samplers: pure functions that walk from noise to an image along a list of lambdas, noisiest first.

Each takes any `Denoise`, so that every guider composes with every sampler. `lambdas` are float64 on the CPU; the step
after the last one goes to the clean image. `watch`, if given, is called with each step's x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from clipkit.guidance.denoiser import Denoise
from torch import Tensor

Watch = Callable[[Tensor], None]


def _levels(lambdas: Tensor) -> list[tuple[float, float, float]]:
    """(lambda, a, s) of each step as Python floats, computed in float64."""
    a, s = torch.sigmoid(lambdas.double()).sqrt(), torch.sigmoid(-lambdas.double()).sqrt()
    return list(zip(lambdas.tolist(), a.tolist(), s.tolist(), strict=True))


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal like x, drawn on the generator's device, so that a seed means the same noise everywhere."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def ddim(
    denoise: Denoise,
    x: Tensor,
    lambdas: Tensor,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12); eta = 0 is deterministic, eta = 1 has DDPM's variance."""
    levels = _levels(lambdas)
    for (lam, a, s), (_, a_next, s_next) in pairwise(levels):
        x0, eps = denoise(x, torch.tensor(lam))
        if watch is not None:
            watch(x0)
        # eq. 16: sigma^2 = eta^2 (s_next^2 / s^2) (1 - a^2 / a_next^2)
        spread = eta * s_next / s * math.sqrt(max(0.0, 1 - (a / a_next) ** 2))
        x = a_next * x0 + math.sqrt(max(0.0, s_next**2 - spread**2)) * eps
        if eta > 0:
            x = x + spread * _noise(x, generator)
    return _finish(denoise, x, levels, watch)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    lambdas: Tensor,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Ancestral sampling from q(x_s | x_t, x0) (Ho et al. 2020, arXiv 2006.11239, eq. 6-7), any spacing.

    The variance follows the step count: the posterior's (fixed-small) for respaced chains, beta (fixed-large) from 800
    steps on, where the two hardly differ and the large one is less prone to blur.
    """
    levels = _levels(lambdas)
    for (lam, a, s), (_, a_next, s_next) in pairwise(levels):
        x0, _ = denoise(x, torch.tensor(lam))
        if watch is not None:
            watch(x0)
        ratio = a / a_next
        beta = 1 - (a / s * s_next / a_next) ** 2  # of s_t^2: the share of x_t's noise that this step takes away
        mean = ratio * (s_next / s) ** 2 * x + a_next * beta * x0
        variance = beta * s**2 if len(levels) >= 800 else beta * s_next**2
        x = mean + math.sqrt(max(0.0, variance)) * _noise(x, generator)
    return _finish(denoise, x, levels, watch)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    lambdas: Tensor,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), deterministic, second order.

    h is the step in log(a / s) = lambda / 2; the first and the last step are of first order.
    """
    levels = _levels(lambdas)
    previous: tuple[Tensor, float] | None = None
    for (lam, _, s), (lam_next, a_next, s_next) in pairwise(levels):
        x0, _ = denoise(x, torch.tensor(lam))
        if watch is not None:
            watch(x0)
        h, d = (lam_next - lam) / 2, x0
        if previous is not None:
            before, h_before = previous
            d = x0 + (x0 - before) * (h / (2 * h_before))
        x = (s_next / s) * x - a_next * math.expm1(-h) * d
        previous = (x0, h)
    return _finish(denoise, x, levels, watch)


def _finish(denoise: Denoise, x: Tensor, levels: list[tuple[float, float, float]], watch: Watch | None) -> Tensor:
    """From the last level to clean: what the denoiser takes for the image (every first-order rule agrees on it)."""
    x0 = denoise(x, torch.tensor(levels[-1][0])).x0
    if watch is not None:
        watch(x0)
    return x0
