"""The one denoiser interface: `denoise(x_t, lam) -> (x0, eps)`.

Networks, whatever they predict, become such a function; samplers use nothing else; guiders take one and return one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.guidance.dit import DiT, DiTConfig
from clipkit.guidance.schedule import TIMESTEPS, alpha, expand, log_snr, sigma
from clipkit.guidance.unet import UNet, UNetConfig

NetworkConfig = UNetConfig | DiTConfig


class Prediction(NamedTuple):
    """What a denoiser says of x_t: the clean image and the noise, tied by x_t = a x0 + s eps; both [B, ...]."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t [B, ...], lambda scalar or [B]) -> Prediction."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts."""

    schedule: Literal["linear", "cosine"] = "cosine"
    """Noise schedule that training times are drawn from."""
    prediction: Literal["eps", "x0", "v"] = "v"
    """What the network's output means; x0 suits flat drawings, v photographs."""


def from_x0(x: Tensor, x0: Tensor, lam: Tensor) -> Prediction:
    """Complete the pair: eps = (x_t - a x0) / s."""
    return Prediction(x0, (x - expand(alpha(lam), x) * x0) / expand(sigma(lam), x))


def from_output(kind: str, output: Tensor, x: Tensor, lam: Tensor) -> Prediction:
    """A network's output -> the pair. "v" is a eps - s x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
    a, s = expand(alpha(lam), x), expand(sigma(lam), x)
    if kind == "x0":
        return from_x0(x, output, lam)
    if kind == "v":
        return Prediction(a * x - s * output, s * x + a * output)
    return Prediction((x - s * output) / a, output)


def target(kind: str, x0: Tensor, eps: Tensor, lam: Tensor) -> Tensor:
    """What the network should output for x_t = a x0 + s eps."""
    if kind == "v":
        return expand(alpha(lam), x0) * eps - expand(sigma(lam), x0) * x0
    return x0 if kind == "x0" else eps


class Denoiser(nn.Module):
    """A network with its parametrisation: itself a `Denoise` for images in [-1, 1]."""

    def __init__(self, network: NetworkConfig, diffusion: DiffusionConfig) -> None:
        super().__init__()
        self.diffusion, self.image_size = diffusion, network.image_size
        built = UNet(network) if isinstance(network, UNetConfig) else DiT(network)
        self.network = built.to(memory_format=torch.channels_last)

    def output(self, x: Tensor, lam: Tensor) -> Tensor:
        """The raw network: x [B, 3, S, S], lam [B] -> [B, 3, S, S]."""
        raw: Tensor = self.network(x, lam)
        return raw

    def forward(self, x: Tensor, lam: Tensor) -> Prediction:
        lam = lam.to(x).expand(len(x))
        return from_output(self.diffusion.prediction, self.output(x, lam), x, lam)

    def range(self) -> tuple[float, float]:
        """(lowest, highest) lambda of its schedule, the highest limited to 10: noise below 1/150 of the signal is
        under the images' own 8-bit steps."""
        table = log_snr(self.diffusion.schedule, TIMESTEPS)
        return float(table[-1].clamp(min=-10)), float(table[0].clamp(max=10))


def clipped(denoise: Denoise) -> Denoise:
    """Keep x0 within [-1, 1], as the images are (Ho et al. 2020, section 4), and eps consistent with it."""

    def wrapped(x: Tensor, lam: Tensor) -> Prediction:
        return from_x0(x, denoise(x, lam).x0.clamp(-1, 1), lam)

    return wrapped
