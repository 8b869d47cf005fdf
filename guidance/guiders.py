"""Guiders: a guider takes a `Denoise` and returns one, so that guiders compose with each other and every sampler.

The score shift: with g = grad_x log p(c | x_t), x0' = x0 + w (s^2 / a) g, which is eps' = eps - w s g (Dhariwal &
Nichol 2021, arXiv 2105.05233, section 4.2, algorithm 2). With exact p(c | x_t) and w = 1 it is the conditional score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipkit.guidance.denoiser import Denoise, Prediction, from_x0
from clipkit.guidance.schedule import alpha, expand, sigma

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], lambda [B]) -> log p(c | x_t) [B], differentiable in x_t."""

Guider = Callable[[Denoise], Denoise]


def score_shift(log_prob: LogProb, scale: float) -> Guider:
    """Guide by the gradient of `log_prob`, times `scale`; scale 0 returns the denoiser itself."""

    def guider(denoise: Denoise) -> Denoise:
        if scale == 0:
            return denoise

        def guided(x: Tensor, lam: Tensor) -> Prediction:
            lam = lam.to(x).expand(len(x))
            shift = scale * expand(sigma(lam) ** 2 / alpha(lam), x)
            return from_x0(x, denoise(x, lam).x0 + shift * gradient(log_prob, x, lam), lam)

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
    takes out of the score what every caption has in common, which a raw dot product (GLIDE, arXiv 2112.10741, section
    3.2) keeps.
    """
    log_p = (temperature[:, None] * similarity).log_softmax(dim=1)
    return log_p[:, :wanted].logsumexp(dim=1)
