"""Small runs, and closed-form worlds: data whose optimal denoiser, classifier and samples are known exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.guidance.denoiser import Prediction, from_x0
from clipkit.guidance.schedule import alpha, sigma

TINY = (
    *("run.steps=4", "run.batch_size=32", "run.log_every=2", "run.save_every=2", "run.precision=fp32"),
    *("optim.warmup=1", "data.workers=0"),
)
"""Overrides that make four steps of any recipe for drawings, the same on machines with bf16 units and without."""

LATENT = (
    *("autoencoder.image_size=24", "autoencoder.channels=8", "autoencoder.groups=4", "autoencoder.multipliers=[1,2]"),
)
"""Overrides that make a small autoencoder of drawings, with latents 4 x 12 x 12."""


def gaussian(mean: float, std: float):
    """Exact denoiser for x0 ~ N(mean, std^2) in every coordinate, and the exact solution of its ODE."""

    def denoise(x: Tensor, lam: Tensor) -> Prediction:
        lam = lam.double()
        a, s = alpha(lam), sigma(lam)
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        return from_x0(x, x0, lam)

    def transport(x: Tensor, lam: float) -> Tensor:
        """Where the probability flow takes x at lambda when the noise is gone: quantiles are kept."""
        a, s = alpha(torch.tensor(lam).double()), sigma(torch.tensor(lam).double())
        return mean + std * (x - a * mean) / (a**2 * std**2 + s**2).sqrt()

    return denoise, transport


class Mixture:
    """Two-dimensional Gaussian mixture of three classes that overlap, one mode each.

    One mode each, because with several the noise in how many samples each gets would hide everything else.
    """

    def __init__(self) -> None:
        angles = torch.arange(3).double() * torch.pi * 2 / 3
        self.means = torch.stack([angles.cos(), angles.sin()], dim=1)  # [3, 2]
        self.std, self.labels = 0.4, torch.arange(3)

    def _log_joint(self, x: Tensor, lam: Tensor) -> Tensor:
        """log p(x_t, mode) up to a constant: [B, 3]."""
        lam = lam.double().reshape(-1, 1)
        a, s = alpha(lam), sigma(lam)
        variance = a**2 * self.std**2 + s**2
        return -((x[:, None] - a[..., None] * self.means) ** 2).sum(-1) / (2 * variance)

    def denoise(self, x: Tensor, lam: Tensor) -> Prediction:
        lam = lam.double().expand(len(x))
        a, s = alpha(lam)[:, None, None], sigma(lam)[:, None, None]
        weights = self._log_joint(x, lam).softmax(1)[..., None]  # [B, 3, 1]
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        x0 = (weights * (self.means + gain * (x[:, None] - a * self.means))).sum(1)
        return from_x0(x, x0, lam)

    def log_prob(self, label: int):
        """Exact log p(class | x_t): the noise-aware classifier."""

        def log_p(x: Tensor, lam: Tensor) -> Tensor:
            joint = self._log_joint(x, lam)
            return joint[:, self.labels == label].logsumexp(1) - joint.logsumexp(1)

        return log_p

    def sample(self, label: int, n: int, generator: torch.Generator) -> Tensor:
        modes = self.means[self.labels == label]
        chosen = modes[torch.randint(len(modes), (n,), generator=generator)]
        return chosen + self.std * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def sliced_w2(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """Sliced 2-Wasserstein distance between two samples of the same size."""
    angles = torch.arange(directions).double() * torch.pi / directions
    rays = torch.stack([angles.cos(), angles.sin()])  # [2, directions]
    difference = (x @ rays).sort(0).values - (y @ rays).sort(0).values
    return float(difference.square().mean().sqrt())
