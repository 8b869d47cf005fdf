"""Samplers: DDIM, DDPM, DPM-Solver++, Heun (EDM) and UniPC, as pure functions of a denoiser and a list of lambdas.

A sampler is `(denoise, x, lambdas, generator=None, watch=None) -> x0`. It takes any `Denoise`, so every guider composes
with every sampler. `lambdas` are float64 on the CPU, noisiest first. The first may be -infinity (zero terminal SNR).
The last step goes to the clean image. Repeated levels count once. `watch` is called with the x0 of each step.
`generator` is one for the batch, or one for each picture, whose noise then does not depend on the batch size. NFE:
network function evaluations. Names are registered in clipkit.registry.SAMPLERS, or by entry points of the group
"clipkit.samplers".

A sampler may declare by attributes (`clipkit.registry.declares`): `spacing`, the name of its default spacing ("karras"
without), and `renoises = True` if each step adds the noise `Prediction.renoise` where there is one, which CFG++ needs.

Other names of these samplers: Euler (Karras et al. 2022), and Euler for a rectified flow, are DDIM; Euler ancestral is
DDIM with eta = 1, and so is DDPM with the posterior's variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clipkit.guidance.denoiser import Denoise, Prediction
from clipkit.registry import declares

Watch = Callable[[Tensor], None]
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for the batch, or one for each picture."""


class _Level(NamedTuple):
    """A noise level as Python floats, computed in float64: x_t = a x_0 + s e."""

    lam: float
    a: float
    s: float


def _level(lam: float) -> _Level:
    return _Level(lam, math.sqrt(_sigmoid(lam)), math.sqrt(_sigmoid(-lam)))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0  # beyond it exp overflows


_Step = Callable[[Tensor, Prediction, _Level, _Level], Tensor]
"""(x, its prediction, its level, the next level) -> x at the next level."""


def _walk(denoise: Denoise, x: Tensor, lambdas: Tensor, watch: Watch | None, step: _Step) -> Tensor:
    """Take `step` from each level to the next, and from the last one to the predicted x0.

    Every first-order rule makes that last step.
    """
    levels = [_level(lam) for lam, _ in groupby(lambdas.tolist())]

    def look(x: Tensor, level: _Level) -> Prediction:
        prediction = denoise(x, torch.tensor(level.lam))
        if watch is not None:
            watch(prediction.x0)
        return prediction

    for here, there in pairwise(levels):
        x = step(x, look(x, here), here, there)
    return look(x, levels[-1]).x0


def _noise(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal like x, from the generator's device: a seed gives the same noise for all devices of x."""
    if isinstance(generator, Sequence):
        each = zip(generator, range(len(x)), strict=True)
        drawn = [torch.randn(x.shape[1:], generator=own, device=own.device, dtype=x.dtype) for own, _ in each]
        return torch.stack(drawn).to(x.device)  # one transfer
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def first_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal [N, ...], float32 on the CPU; that of picture i is a function of (seed, i), whatever N is.

    torch draws sixteen numbers at a time, and the end of a tensor of another size differently: it is cut off.
    """
    count = math.prod(shape)
    drawn = torch.randn(-(-count // 16) * 16, generator=torch.Generator().manual_seed(seed))
    return drawn[:count].reshape(*shape)


def generators(n: int, seed: int) -> list[torch.Generator]:
    """A generator for each of `n` pictures, a function of (seed, i), for the noise of their steps."""
    states = [np.random.SeedSequence([seed, i]).generate_state(1) for i in range(n)]
    return [torch.Generator().manual_seed(int(state[0])) for state in states]


_Noise = Callable[[Tensor], Tensor]
"""Standard normal like a tensor, different in each call."""


class Sampler(Protocol):
    """x at the first of `lambdas`, pure noise or a noised picture -> the clean image."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        lambdas: Tensor,
        generator: Generators = None,
        watch: Watch | None = None,
    ) -> Tensor: ...


def _sampler(make_step: Callable[[Denoise, Tensor, _Noise], _Step]) -> Sampler:
    """A rule for one step, which may keep a history -> the sampler of that rule."""

    def sample(
        denoise: Denoise,
        x: Tensor,
        lambdas: Tensor,
        generator: Generators = None,
        watch: Watch | None = None,
    ) -> Tensor:
        step = make_step(denoise, lambdas, lambda like: _noise(like, generator))
        return _walk(denoise, x, lambdas, watch, step)

    sample.__name__ = sample.__qualname__ = make_step.__name__
    sample.__doc__ = make_step.__doc__
    return sample


# ---------------------------------------------------------------------------------------------------------------------
# DDIM (Song et al. 2020, arXiv 2010.02502).


@declares(spacing="linspace", renoises=True)
def ddim(
    denoise: Denoise,
    x: Tensor,
    lambdas: Tensor,
    generator: Generators = None,
    watch: Watch | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (equation 12): deterministic for eta = 0, DDPM's variance for eta = 1; 1 NFE a step."""

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        # eq. 16: sigma^2 = eta^2 (s_next^2 / s^2) (1 - a^2 / a_next^2)
        sigma = eta * there.s / here.s * math.sqrt(max(0.0, 1 - (here.a / there.a) ** 2))
        eps = prediction.eps if prediction.renoise is None else prediction.renoise
        mean = there.a * prediction.x0 + math.sqrt(max(0.0, there.s**2 - sigma**2)) * eps
        return mean + sigma * _noise(x, generator) if eta > 0 else mean

    return _walk(denoise, x, lambdas, watch, step)


# ---------------------------------------------------------------------------------------------------------------------
# DDPM (Ho et al. 2020, arXiv 2006.11239).


@declares(spacing="linspace")
@_sampler
def ddpm(denoise: Denoise, lambdas: Tensor, noise: _Noise) -> _Step:
    """DDPM: ancestral sampling from q(x_s | x_t, x0) (equations 6 and 7), for any spacing; 1 NFE a step.

    The variance is the denoiser's, if it learned one (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15). Otherwise
    it is the posterior's (fixed-small) up to 799 steps, and beta (fixed-large) from 800 on, where both nearly agree and
    the large one blurs less.
    """

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        # The share of x_t's noise that this step takes away: beta_t / s_t^2 in the notation of the paper.
        share = max(0.0, 1 - (here.a / here.s * there.s / there.a) ** 2)
        mean = here.a / there.a * (there.s / here.s) ** 2 * x + there.a * share * prediction.x0
        if prediction.v is not None:
            deviation = math.sqrt(share) * here.s**prediction.v * there.s ** (1 - prediction.v)
            return mean + deviation * noise(x)
        variance = share * (here.s if len(lambdas) >= 800 else there.s) ** 2
        return mean + math.sqrt(max(0.0, variance)) * noise(x)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095).


@_sampler
def dpmpp_2m(denoise: Denoise, lambdas: Tensor, noise: _Noise) -> _Step:
    """DPM-Solver++(2M) (algorithm 2): deterministic, second order, multistep; 1 NFE a step.

    h is the step in log(a / s), which is the paper's lambda and half of ours. The first and the last step are of first
    order.
    """
    previous: list[tuple[Tensor, float]] = []

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        h, d = (there.lam - here.lam) / 2, prediction.x0
        if previous:
            before, h_before = previous.pop()
            d = d + (d - before) * (h / (2 * h_before))
        previous.append((prediction.x0, h))
        return (there.s / here.s) * x - there.a * math.expm1(-h) * d

    return step


@_sampler
def dpmpp_2m_sde(denoise: Denoise, lambdas: Tensor, noise: _Noise) -> _Step:
    """SDE-DPM-Solver++(2M) (section 5): 2M for the reverse SDE, stochastic; 1 NFE a step."""
    previous: list[tuple[Tensor, float]] = []

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        h, d = (there.lam - here.lam) / 2, prediction.x0
        if previous:
            before, h_before = previous.pop()
            d = d + (d - before) * (h / (2 * h_before))
        previous.append((prediction.x0, h))
        mean = there.s / here.s * math.exp(-h) * x - there.a * math.expm1(-2 * h) * d
        return mean + there.s * math.sqrt(-math.expm1(-2 * h)) * noise(x)

    return step


@_sampler
def dpmpp_2s(denoise: Denoise, lambdas: Tensor, noise: _Noise) -> _Step:
    """DPM-Solver++(2S) (algorithm 1, r = 1/2): second order, singlestep; 2 NFE a step, the second at its middle."""

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        h = (there.lam - here.lam) / 2
        middle = _level((here.lam + there.lam) / 2)
        u = middle.s / here.s * x - middle.a * math.expm1(-h / 2) * prediction.x0
        d = denoise(u, torch.tensor(middle.lam)).x0
        return there.s / here.s * x - there.a * math.expm1(-h) * d

    return step


# ---------------------------------------------------------------------------------------------------------------------
# EDM (Karras et al. 2022, arXiv 2206.00364).


@_sampler
def heun(denoise: Denoise, lambdas: Tensor, noise: _Noise) -> _Step:
    """Heun's method on d(x / a) / d(s / a) = eps (algorithm 1): second order; 2 NFE a step, the second at its end."""

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        if here.a == 0:  # pure noise: x / a is infinite; an Euler step from it is exact
            return there.a * prediction.x0 + there.s * prediction.eps
        ratio, distance = there.a / here.a, there.a * (there.s / there.a - here.s / here.a)
        first = ratio * x + distance * prediction.eps
        eps = denoise(first, torch.tensor(there.lam)).eps
        return ratio * x + distance * (prediction.eps + eps) / 2

    return step


# ---------------------------------------------------------------------------------------------------------------------
# UniPC (Zhao et al. 2023, arXiv 2302.04867).


@_sampler
def unipc(denoise: Denoise, lambdas: Tensor, noise: _Noise) -> _Step:
    """UniPC of order 2, B(h) = e^h - 1, on x0 (algorithms 5 and 6): predictor-corrector; 1 NFE a step.

    The prediction at the end of a step corrects that step before it predicts the next one.
    """
    last: list[_Past] = []

    def step(x: Tensor, prediction: Prediction, here: _Level, there: _Level) -> Tensor:
        if last:
            x = _corrected(last[-1], last[-2] if len(last) > 1 else None, here, prediction.x0)
        h = (there.lam - here.lam) / 2
        base = there.s / here.s * x - there.a * math.expm1(-h) * prediction.x0
        if last:
            r = (last[-1].level.lam - here.lam) / 2 / h
            slope = (last[-1].x0 - prediction.x0) / r
            base = base - there.a * math.expm1(-h) * slope / 2
        if here.a > 0:  # an infinite step has no slope
            last.append(_Past(x, here, prediction.x0))
        del last[:-2]
        return base

    return step


class _Past(NamedTuple):
    """The beginning of a step: x, its level, and the x0 predicted there."""

    x: Tensor
    level: _Level
    x0: Tensor


def _corrected(start: _Past, before: _Past | None, here: _Level, x0: Tensor) -> Tensor:
    """UniC: the step from `start` to `here`, corrected by the prediction x0 at its end."""
    h = (here.lam - start.level.lam) / 2
    phi = math.expm1(-h)
    base = here.s / start.level.s * start.x - here.a * phi * start.x0
    if before is None:
        return base - here.a * phi * (x0 - start.x0) / 2
    # Two differences, r and 1 steps from the start, weighted so that terms of second and third order vanish (eq. 9).
    r = (before.level.lam - start.level.lam) / 2 / h
    first = phi / -h - 1
    b1, b2 = first / phi, 2 * (first / -h - 0.5) / phi
    rho_end = (b2 - r * b1) / (1 - r)
    rho_before = b1 - rho_end
    slope = rho_before * (before.x0 - start.x0) / r + rho_end * (x0 - start.x0)
    return base - here.a * phi * slope
