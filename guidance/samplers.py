"""Samplers: pure functions that walk from noise to an image along a list of lambdas, noisiest first.

Each takes any `Denoise`, so that every guider composes with every sampler. `lambdas` are float64 on the CPU; the step
after the last one goes to the clean image. `watch`, if given, is called with each step's x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.guidance.denoiser import Denoise, Prediction

Watch = Callable[[Tensor], None]


class _Level(NamedTuple):
    """A noise level as Python floats, computed in float64: x_t = a x_0 + s e."""

    lam: float
    a: float
    s: float


_Step = Callable[[Tensor, Prediction, _Level, _Level], Tensor]
"""(x, what the denoiser says of it, its level, the next level) -> x at the next level."""


def _walk(denoise: Denoise, x: Tensor, lambdas: Tensor, watch: Watch | None, step: _Step) -> Tensor:
    """Take `step` from each level to the next, and at the last one what the denoiser takes for the image.

    Every first-order rule agrees on that last jump: nothing is left of x when the noise is gone.
    """
    a, s = torch.sigmoid(lambdas.double()).sqrt(), torch.sigmoid(-lambdas.double()).sqrt()
    levels = [_Level(*level) for level in zip(lambdas.tolist(), a.tolist(), s.tolist(), strict=True)]

    def look(x: Tensor, level: _Level) -> Prediction:
        prediction = denoise(x, torch.tensor(level.lam))
        if watch is not None:
            watch(prediction.x0)
        return prediction

    for here, there in pairwise(levels):
        x = step(x, look(x, here), here, there)
    return look(x, levels[-1]).x0


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

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        # eq. 16: sigma^2 = eta^2 (s_next^2 / s^2) (1 - a^2 / a_next^2)
        sigma = eta * there.s / here.s * math.sqrt(max(0.0, 1 - (here.a / there.a) ** 2))
        mean = there.a * prediction.x0 + math.sqrt(max(0.0, there.s**2 - sigma**2)) * prediction.eps
        return mean + sigma * _noise(x, generator) if eta > 0 else mean

    return _walk(denoise, x, lambdas, watch, step)


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

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        # The share of x_t's noise that this step takes away: beta_t / s_t^2 in the notation of the paper.
        share = 1 - (here.a / here.s * there.s / there.a) ** 2
        mean = here.a / there.a * (there.s / here.s) ** 2 * x + there.a * share * prediction.x0
        variance = share * (here.s if len(lambdas) >= 800 else there.s) ** 2
        return mean + math.sqrt(max(0.0, variance)) * _noise(x, generator)

    return _walk(denoise, x, lambdas, watch, step)


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
    previous: list[tuple[Tensor, float]] = []

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        h, d = (there.lam - here.lam) / 2, prediction.x0
        if previous:
            before, h_before = previous.pop()
            d = d + (d - before) * (h / (2 * h_before))
        previous.append((prediction.x0, h))
        return (there.s / here.s) * x - there.a * math.expm1(-h) * d

    return _walk(denoise, x, lambdas, watch, step)
