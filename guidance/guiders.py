"""Guiders: classifier guidance, classifier-free guidance, autoguidance, CFG++, universal guidance, ILVR, inpainting.

A guider takes a `Denoise` and returns one, so guiders compose with each other and with every sampler.

A guider with a name on the command line (`--guider NAME:key=value`) comes from a factory, registered in
clipkit.registry.GUIDERS or by an entry point of the group "clipkit.guiders":

    def factory(context: GuiderContext, *, scale: float = 1.0) -> Guider: ...

The context (clipkit/guidance/guider_factories.py) holds the pipeline, the request (prompts, negative prompts, seed,
scales) and the lambdas of the steps. The parameters after it that a keyword can give are the keys on the command line;
each is annotated as str, int, float or bool, and one without a default is required. A factory raises UsageError for a
value that it cannot use, and for a request on which it would have no effect. One that uses negative prompts declares it
by the attribute `reads = {"negative"}` (`clipkit.registry.declares`); without it, and without other guidance that uses
them, they are refused. A guider that is an object may have this attribute too.

The score shift of classifier guidance: with g = grad_x log p(c | x_t), x0' = x0 + w (s^2 / a) g, which is
eps' = eps - w s g (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.2, algorithm 2). With exact p(c | x_t) and w = 1
it is the conditional score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit._renamed import former_name
from clipkit.errors import UsageError
from clipkit.guidance.denoiser import Denoise, Denoiser, Prediction, moved
from clipkit.guidance.schedule import alpha, expand, sigma

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], lambda [B]) -> log p(c | x_t) [B], differentiable in x_t."""

Guider = Callable[[Denoise], Denoise]

GuiderFactory = Callable[..., Guider]
"""(GuiderContext, *, keyword parameters) -> Guider."""

Scale = float | Callable[[float], float]
"""A guidance scale, constant or a function of lambda. Where it is 0, the guide is not evaluated."""


def __getattr__(name: str) -> Any:  # PEP 562: names of version 0.1
    return former_name(__name__, name)


def _at(scale: Scale, lam: Tensor) -> float:
    """The scale at this lambda, a scalar or the same for all images. Raises UsageError for one that is not finite."""
    found = scale(float(lam.reshape(-1)[0])) if callable(scale) else scale
    if not math.isfinite(found):
        raise UsageError(f"a guidance scale is {found}; it must be a finite number")
    return found


def _shift_at(scale: Scale, lam: Tensor) -> float:
    """The scale of a gradient: 0 at lambda = -infinity, where x_t is pure noise."""
    return 0.0 if float(lam.reshape(-1)[0]) == -math.inf else _at(scale, lam)


def guidance_interval(low: float, high: float, scale: float, outside: float = 0.0) -> Callable[[float], float]:
    """`scale` for lambdas in [low, high], `outside` beyond (Kynkaanniemi et al. 2024, arXiv 2404.07724).

    Raises UsageError for an interval that is empty.
    """
    if not low <= high:
        raise UsageError(f"the interval from {low:g} to {high:g} is empty; give the noisier log SNR first")
    return lambda lam: scale if low <= lam <= high else outside


# ---------------------------------------------------------------------------------------------------------------------
# Classifier guidance: the gradient of a noise-aware classifier or CLIP (Dhariwal & Nichol 2021, arXiv 2105.05233).


def score_shift(log_prob: LogProb, scale: Scale) -> Guider:
    """Classifier guidance: add `scale` times the gradient of `log_prob` to the score; scale 0 is the denoiser."""
    return _shift(log_prob, scale, lambda lam: lam)


def mean_shift(log_prob: LogProb, scale: Scale, lambdas: Tensor) -> Guider:
    """Classifier guidance as in ADM and GLIDE: the mean of a step moves by `scale` times its variance times g.

    mu + w Sigma g (Dhariwal & Nichol 2021, algorithm 1), with Sigma the posterior's variance for the step from one of
    `lambdas` to the next, is x0 + w (s^2 / a) g with s and a of the level where the step ends. The score shift takes
    those of the level where it begins. With few steps the mean shift guides too little; it is here for comparison.
    """
    levels = lambdas.double().cpu()

    def where_the_step_ends(lam: Tensor) -> Tensor:
        after = levels[levels > float(lam[0]) + 1e-6]
        return torch.full_like(lam, float(after[0]) if len(after) else torch.inf)

    return _shift(log_prob, scale, where_the_step_ends)


def _shift(log_prob: LogProb, scale: Scale, level: Callable[[Tensor], Tensor]) -> Guider:
    """x0 + scale (s^2 / a) g, with s and a those of `level(lambda)`."""

    def guider(denoise: Denoise) -> Denoise:
        if scale == 0:
            return denoise

        def guided(x: Tensor, lam: Tensor) -> Prediction:
            strength = _shift_at(scale, lam)
            lam = lam.to(x).expand(len(x))
            if strength == 0:
                return denoise(x, lam)
            at = level(lam)
            shift = strength * expand(sigma(at) ** 2 / alpha(at), x)
            plain = denoise(x, lam)
            return moved(plain, x, plain.x0 + shift * gradient(log_prob, x, lam), lam)

        return guided

    return guider


# ---------------------------------------------------------------------------------------------------------------------
# Universal guidance: the gradient of a clean model, through x0 and the denoiser (Bansal et al. 2023, arXiv 2302.07121).


def through_x0(log_prob: Callable[[Tensor], Tensor], scale: Scale, cutouts: int = 0, seed: int = 0) -> Guider:
    """Universal guidance: the gradient of `log_prob` at the predicted x0, back-propagated through the denoiser.

    Crowson 2021 (CLIP-guided diffusion); Bansal et al. 2023, equation 6. The model behind `log_prob`, images [B, C, H,
    W] -> [B], needs no training on noise. With `cutouts`, log_prob is averaged over that many random square crops of at
    least half the side. The cost is a backward pass through the denoiser.
    """

    def guider(denoise: Denoise) -> Denoise:
        if scale == 0:
            return denoise
        generator = torch.Generator().manual_seed(seed)

        def guided(x: Tensor, lam: Tensor) -> Prediction:
            strength = _shift_at(scale, lam)
            lam = lam.to(x).expand(len(x))
            if strength == 0:
                return denoise(x, lam)
            with torch.enable_grad():
                seen = x.detach().requires_grad_()
                plain = denoise(seen, lam)
                x0 = plain.x0
                views = [_cutout(x0, generator) for _ in range(cutouts)] or [x0]
                total = torch.stack([log_prob(view) for view in views]).mean(dim=0).sum()
                (g,) = torch.autograd.grad(total, seen)
            plain = Prediction(*(None if t is None else t.detach() for t in plain))  # type: ignore[arg-type]
            return moved(plain, x, plain.x0 + strength * expand(sigma(lam) ** 2 / alpha(lam), x) * g, lam)

        return guided

    return guider


def _cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random square crop of [B, C, S, S], resized to S; the same one for the batch."""
    size = images.shape[-1]
    side = int(torch.randint(size // 2, size + 1, (), generator=generator))
    top, left = (int(torch.randint(0, size - side + 1, (), generator=generator)) for _ in range(2))
    crop = images[..., top : top + side, left : left + side]
    return F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# Classifier-free guidance, autoguidance and CFG++: extrapolation from another denoiser (Ho & Salimans 2022, arXiv
# 2207.12598; Karras et al. 2024, arXiv 2406.02507; Chung et al. 2024, arXiv 2406.08070). Composition of prompts.


def classifier_free(other: Denoise, scale: Scale, rescale: float = 0.0, renoise: bool = False) -> Guider:
    """x0' = other + scale (x0 - other): away from the denoiser `other`. Scale 1 is the denoiser itself, 0 is `other`.

    Classifier-free guidance if `other` is the same network, unconditional or conditioned on a negative prompt (Ho &
    Salimans 2022); autoguidance if it is a weaker network (Karras et al. 2024, equation 3). `rescale` in [0, 1]
    restores the standard deviation of each image's x0 (Lin et al. 2023, arXiv 2305.08891, equations 15 and 16). With
    `renoise`, DDIM adds the noise predicted by `other`: CFG++ for a scale in (0, 1] (Chung et al. 2024, algorithm 2).
    """

    def guider(denoise: Denoise) -> Denoise:
        if scale == 1 and not renoise:
            return denoise
        if scale == 0 and not (renoise or rescale):
            return other

        def guided(x: Tensor, lam: Tensor) -> Prediction:
            strength = _at(scale, lam)
            lam = lam.to(x).expand(len(x))
            plain = denoise(x, lam)
            if strength == 1 and not renoise:
                return plain
            away = other(x, lam)
            x0 = away.x0 + strength * (plain.x0 - away.x0)
            if rescale:
                spread = plain.x0.flatten(1).std(dim=1) / x0.flatten(1).std(dim=1)
                x0 = x0 * expand(rescale * spread + 1 - rescale, x)
            extrapolated = moved(plain, x, x0, lam)
            return extrapolated._replace(renoise=away.eps) if renoise else extrapolated

        return guided

    return guider


def compose(denoisers: Mapping[Denoise, float]) -> Denoise:
    """The weighted mean of several denoisers' predictions (Liu et al. 2022, arXiv 2206.01714, equation 11).

    A learned variance is the first denoiser's. Raises UsageError for weights whose sum is not above 0: the prompts
    would be avoided rather than drawn.
    """
    total = sum(denoisers.values())
    if not 0 < total < math.inf:
        raise UsageError(f"the weights of the prompts add up to {total:g}; their sum must be above 0 and finite")

    def composed(x: Tensor, lam: Tensor) -> Prediction:
        predictions = [(denoise(x, lam), weight / total) for denoise, weight in denoisers.items()]
        x0 = torch.stack([prediction.x0 * share for prediction, share in predictions]).sum(dim=0)
        return moved(predictions[0][0], x, x0, lam.to(x).expand(len(x)))

    return next(iter(denoisers)) if len(denoisers) == 1 else composed


def conditioned(denoiser: Denoiser, prompts: Mapping[str, float]) -> Denoise:
    """A conditional denoiser for weighted prompts; an unconditional one as it is."""
    if denoiser.conditioner is None:
        return denoiser
    return compose({denoiser.conditioned_on(text): weight for text, weight in prompts.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Image conditions: ILVR (Choi et al. 2021, arXiv 2108.02938) and inpainting.


def ilvr(reference: Tensor, factor: int, until: float = torch.inf) -> Guider:
    """Keep the coarse shape of `reference` [B or 1, C, H, W]: x0 + LP(reference) - LP(x0), as long as lambda < `until`.

    ILVR (Choi et al. 2021, equation 8), applied to x0, where the reference needs no noise. LP averages blocks
    of factor x factor pixels. Raises UsageError when the sides do not divide by `factor`.
    """
    if reference.shape[-1] % factor or reference.shape[-2] % factor:
        raise UsageError(f"{list(reference.shape[-2:])} pixels do not divide by {factor}; choose another factor")

    def low_pass(x: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="nearest")

    def guider(denoise: Denoise) -> Denoise:
        def guided(x: Tensor, lam: Tensor) -> Prediction:
            prediction = denoise(x, lam)
            if float(lam.reshape(-1)[0]) >= until:
                return prediction
            x0 = prediction.x0 + low_pass(reference.to(x)) - low_pass(prediction.x0)
            return moved(prediction, x, x0, lam.to(x).expand(len(x)))

        return guided

    return guider


def inpaint(image: Tensor, mask: Tensor) -> Guider:
    """Inpainting: keep `image` [B or 1, C, H, W] where `mask` [1, 1, H, W] is 0, and draw where it is 1."""

    def guider(denoise: Denoise) -> Denoise:
        def guided(x: Tensor, lam: Tensor) -> Prediction:
            plain = denoise(x, lam)
            x0 = torch.where(mask.to(x.device) > 0.5, plain.x0, image.to(x))
            return moved(plain, x, x0, lam.to(x).expand(len(x)))

        return guided

    return guider


def gradient(log_prob: LogProb, x: Tensor, lam: Tensor) -> Tensor:
    """d log p(c | x_t) / d x_t, like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(log_prob(x, lam).sum(), x)
    return g


def softmax_log_prob(similarity: Tensor, temperature: Tensor, wanted: int) -> Tensor:
    """log softmax_j(tau <f, g_j>) of the first `wanted` texts together -> [B].

    similarity: [B, J] cosine similarities to the wanted prompts and then all others; temperature: [B]. The softmax
    removes the part of the score that all captions share, which a raw dot product (GLIDE, arXiv 2112.10741, section
    3.2) keeps.
    """
    log_p = (temperature[:, None] * similarity).log_softmax(dim=1)
    return log_p[:, :wanted].logsumexp(dim=1)
