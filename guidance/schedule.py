"""Noise schedules and step spacings, as functions of lambda = log(a^2 / s^2), the log signal-to-noise ratio.

x_t = a x_0 + s e with a^2 + s^2 = 1 (variance preserving), so a^2 = sigmoid(lambda) and s^2 = sigmoid(-lambda).
Schedules map time to lambda in float64. Samplers take a list of lambdas; they know no timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clipkit.errors import UsageError, did_you_mean
from clipkit.registry import SPACINGS

TIMESTEPS = 1000
Spacing = Callable[[Tensor, int], Tensor]
"""(lambdas of a schedule [T], decreasing; steps) -> lambdas of the steps, noisiest first, float64."""


def alphas_cumprod(name: str, timesteps: int = TIMESTEPS) -> Tensor:
    """a_t^2 for t = 1 ... T, float64 [T].

    "linear": betas from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, section 4). "scaled_linear": their square roots are
    evenly spaced, from 0.00085 to 0.012 (Rombach et al. 2022, latent diffusion). "cosine": Nichol & Dhariwal 2021
    (arXiv 2102.09672), eq. 17, betas clipped at 0.999. "sigmoid": Jabri et al. 2022 (arXiv 2212.11972), from -3 to 3.
    Raises UsageError for another name.
    """
    if name not in _SCHEDULES:
        raise UsageError(f"unknown noise schedule {name!r}; {did_you_mean(name, _SCHEDULES)}")
    kept: Tensor = 1 - _SCHEDULES[name](timesteps)
    return torch.cumprod(kept, dim=0)


def _linear(timesteps: int) -> Tensor:
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def _scaled_linear(timesteps: int) -> Tensor:
    scale = (1000 / timesteps) ** 0.5
    return torch.linspace(scale * 0.00085**0.5, scale * 0.012**0.5, timesteps, dtype=torch.float64) ** 2


def _cosine(timesteps: int) -> Tensor:
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    return _betas(torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


def _sigmoid(timesteps: int) -> Tensor:
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    low, high = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
    return _betas((high - (6 * t - 3).sigmoid()) / (high - low))


def _betas(a2: Tensor) -> Tensor:
    """From a^2 at t = 0 ... T."""
    return (1 - a2[1:] / a2[:-1]).clamp(max=0.999)


_SCHEDULES = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine, "sigmoid": _sigmoid}


def zero_terminal_snr(a2: Tensor) -> Tensor:
    """The table of a_t^2 rescaled to zero terminal SNR (Lin et al. 2023, arXiv 2305.08891, algorithm 1).

    Its last lambda is -infinity, where a network must predict v or x0.
    """
    a = a2.sqrt()
    shifted: Tensor = (a - a[-1]) * (a[0] / (a[0] - a[-1]))
    return shifted.square()


def log_snr(name: str, timesteps: int = TIMESTEPS) -> Tensor:
    """lambda_t for t = 1 ... T, float64 [T], decreasing: log a^2 - log(1 - a^2) without cancellation near t = 0.

    Beside the schedules of `alphas_cumprod`: "flow", the rectified flow's straight lines, x_t = (1 - t) x_0 + t e up to
    a factor (Liu et al. 2022, arXiv 2209.03003), so that lambda = 2 log((1 - t) / t), at the middles of T steps; "edm",
    the quantiles of log sigma ~ N(-1.2, 1.2^2), sigma being s / a (Karras et al. 2022, table 1).
    """
    middle = (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps
    if name == "flow":
        return 2 * torch.log((1 - middle) / middle)
    if name == "edm":
        quantiles: Tensor = torch.special.ndtri(middle)
        return -2 * (-1.2 + 1.2 * quantiles)
    log_a2 = torch.log(alphas_cumprod(name, timesteps))
    return log_a2 - torch.log(-torch.expm1(log_a2))


def sample_log_snr(name: str, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Noise levels for a training batch, float32 [count]: stratified uniform times of the schedule.

    One random offset and `count` equal strata (Kingma et al. 2021, arXiv 2107.00630, appendix I.1) between the shares
    `low` and `high` of time, interpolated between the table's steps; in random order.
    """
    u = (torch.randperm(count) + torch.rand(())).double() / count
    return at_time(log_snr(name), low + (high - low) * u).float()


def at_time(table: Tensor, share: Tensor) -> Tensor:
    """lambda at shares of time (0: the cleanest level of the table, 1: the noisiest), interpolated between levels."""
    position = share * (len(table) - 1)
    below = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below)


def until(table: Tensor, share: float) -> Tensor:
    """The part of a schedule's table up to this share of time, whose level is appended as the noisiest."""
    last = at_time(table, torch.tensor([share], dtype=torch.float64))
    return torch.cat([table[table > last], last])


def later_log_snr(name: str, lam: Tensor) -> Tensor:
    """The level one of the 1,000 timesteps cleaner than lam [B], float64; the cleanest for levels above it."""
    table = log_snr(name).flip(0)  # ascending
    place = torch.searchsorted(table, lam.double().cpu().clamp(table[0], table[-1])).clamp(1, len(table) - 1)
    below, above = table[place - 1], table[place]
    exact = place - 1 + (lam.double().cpu() - below) / (above - below).clamp(min=1e-12) + 1
    exact = exact.clamp(0, len(table) - 1)
    lower = exact.long().clamp(max=len(table) - 2)
    return torch.lerp(table[lower], table[lower + 1], exact - lower).to(lam.device)


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

    Their sigma is s / a = exp(-lambda / 2). A sampler's last step goes from `high` to the clean image.
    """
    first, last = math.exp(-low / 2) ** (1 / rho), math.exp(-high / 2) ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return -2 * rho * torch.log(first + ramp * (last - first))


def spaced(table: Tensor, steps: int, how: str | Spacing = "linspace") -> Tensor:
    """`steps` lambdas of a schedule's table [T], decreasing, by a spacing or its name in clipkit.registry.SPACINGS.

    Raises UsageError for an unknown name.
    """
    spacing = SPACINGS[how] if isinstance(how, str) else how
    return spacing(table, steps)


def karras_spacing(table: Tensor, steps: int) -> Tensor:
    """`karras` between the ends of a schedule's table [T] -> [steps]."""
    return karras(float(table[-1]), float(table[0]), steps)


def linspace(table: Tensor, steps: int) -> Tensor:
    """`steps` lambdas of a schedule's table [T] at equal distances, noisiest first, with both ends of the table.

    Every gap is within one level of T / steps, whether that is a whole number or not. Raises UsageError for more steps
    than levels; so do `leading` and `trailing` (Lin et al. 2023, arXiv 2305.08891, table 2).
    """
    return _spaced(table, steps, len(table) - 1, 0)


def leading(table: Tensor, steps: int) -> Tensor:
    """The same with the cleanest level of the table, but not its noisiest."""
    return _spaced(table, steps, len(table) - len(table) / steps, 0)


def trailing(table: Tensor, steps: int) -> Tensor:
    """The same with the noisiest level of the table, but not its cleanest."""
    return _spaced(table, steps, len(table) - 1, len(table) / steps - 1)


def _spaced(table: Tensor, steps: int, start: float, end: float) -> Tensor:
    if steps > len(table):
        raise UsageError(f"{steps} steps asked for, the schedule has {len(table)} levels; use at most that many")
    index = torch.linspace(start, end, steps, dtype=torch.float64)
    return table[index.round().long()]
