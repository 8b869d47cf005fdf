"""Noise levels: everything in guidance is a function of lambda = log(a^2 / s^2), the log signal-to-noise ratio.

x_t = a x_0 + s e with a^2 + s^2 = 1 (variance preserving), so a^2 = sigmoid(lambda) and s^2 = sigmoid(-lambda).
Schedules map time to lambda in float64; samplers walk a list of lambdas and never see a timestep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipkit.errors import UsageError

TIMESTEPS = 1000


def alphas_cumprod(name: str, timesteps: int = TIMESTEPS) -> Tensor:
    """a_t^2 for t = 1 ... T, float64 [T].

    "linear": betas from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, section 4). "cosine": Nichol & Dhariwal 2021 (arXiv
    2102.09672), eq. 17, betas clipped at 0.999. Raises UsageError for another name.
    """
    if name == "linear":
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
    elif name == "cosine":
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise UsageError(f"unknown noise schedule {name!r}; known: linear, cosine")
    return torch.cumprod(1 - betas, dim=0)


def log_snr(name: str, timesteps: int = TIMESTEPS) -> Tensor:
    """lambda_t for t = 1 ... T, float64 [T], decreasing: log a^2 - log(1 - a^2) without cancellation near t = 0."""
    log_a2 = torch.log(alphas_cumprod(name, timesteps))
    return log_a2 - torch.log(-torch.expm1(log_a2))


def sample_log_snr(name: str, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Noise levels for a training batch, float32 [count]: stratified uniform times of the schedule.

    One random offset and `count` equal strata (Kingma et al. 2021, arXiv 2107.00630, appendix I.1) between the shares
    `low` and `high` of time, interpolated between the table's steps; in random order.
    """
    table = log_snr(name)
    u = (torch.randperm(count) + torch.rand(())).double() / count
    position = (low + (high - low) * u) * (len(table) - 1)
    below = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below).float()


def alpha(lam: Tensor) -> Tensor:
    """a, the factor of the signal."""
    return torch.sigmoid(lam).sqrt()


def sigma(lam: Tensor) -> Tensor:
    """s, the factor of the noise."""
    return torch.sigmoid(-lam).sqrt()


def expand(lam: Tensor, x: Tensor) -> Tensor:
    """[B] or scalar -> [B or 1, 1, ...], to multiply x [B, ...]."""
    return lam.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
    """x_t = a x_0 + s e; x0, noise [B, ...], lam [B]."""
    return expand(alpha(lam), x0) * x0 + expand(sigma(lam), x0) * noise


def karras(low: float, high: float, steps: int, rho: float = 7.0) -> Tensor:
    """`steps` lambdas from `low` (noisiest) to `high`, float64: Karras et al. 2022 (arXiv 2206.00364), eq. 5.

    Their sigma is s / a = exp(-lambda / 2); the last step of a sampler goes from `high` to clean.
    """
    first, last = math.exp(-low / 2) ** (1 / rho), math.exp(-high / 2) ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return -2 * rho * torch.log(first + ramp * (last - first))


def leading(table: Tensor, steps: int) -> Tensor:
    """`steps` lambdas picked from a schedule's table at equal distances, noisiest first; any count up to the table's.

    The noisiest level is always included, and the rounding keeps every gap within one step of T / steps.
    Raises UsageError for more steps than levels.
    """
    if steps > len(table):
        raise UsageError(f"{steps} steps asked for, the schedule has {len(table)} levels; use at most that many")
    index = torch.linspace(len(table) - 1, 0, steps, dtype=torch.float64).round().long()
    return table[index]
