"""The denoiser interface `denoise(x_t, lam) -> (x0, eps)`: parametrisations, loss weights, learned variance, networks.

Every parametrisation (eps, x0, v, flow, EDM) becomes such a function. Samplers use nothing else; guiders take one and
return one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import UsageError
from clipkit.guidance.networks.condition import Condition, Conditioner
from clipkit.guidance.networks.dit import DiT, DiTConfig
from clipkit.guidance.networks.unet import UNet, UNetConfig
from clipkit.guidance.schedule import TIMESTEPS, alpha, expand, log_snr, sigma

NetworkConfig = UNetConfig | DiTConfig


class Prediction(NamedTuple):
    """The prediction for x_t: the clean image and the noise, tied by x_t = a x0 + s eps; both [B, ...]."""

    x0: Tensor
    eps: Tensor
    v: Tensor | None = None
    """A learned variance (Nichol & Dhariwal 2021, equation 15): the log variance of a DDPM step interpolates between
    its lower bound (0) and its upper bound (1)."""
    renoise: Tensor | None = None
    """The noise that DDIM adds to x0 for the next level, where that is not eps (CFG++)."""


Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t [B, ...], lambda scalar or [B]) -> Prediction."""


@dataclass(frozen=True)
class DiffusionConfig:
    """Forward process, parametrisation and loss."""

    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm"] = "cosine"
    """Noise schedule that training times are drawn from."""
    prediction: Literal["eps", "x0", "v", "flow", "edm"] = "v"
    """Parametrisation of the network's output; x0 suits flat drawings, v photographs."""
    weight: Literal["simple", "min_snr", "p2"] = "simple"
    """Loss weight over noise levels: "simple" is constant, "min_snr" and "p2" lower it where there is little noise."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Distance between the network's output and its target."""
    variance: Literal["fixed", "learned"] = "fixed"
    """Variance of a DDPM step: fixed, or learned by the hybrid loss (Nichol & Dhariwal 2021)."""


def from_x0(x: Tensor, x0: Tensor, lam: Tensor) -> Prediction:
    """Complete the pair: eps = (x_t - a x0) / s."""
    return Prediction(x0, (x - expand(alpha(lam), x) * x0) / expand(sigma(lam), x))


def from_output(kind: str, output: Tensor, x: Tensor, lam: Tensor) -> Prediction:
    """A network's output -> the pair.

    "v" is a eps - s x0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D). "flow" is eps - x0, the velocity of a
    rectified flow (Liu et al. 2022, arXiv 2209.03003). "edm" is (x0 - c_skip x / a) / c_out, for data of standard
    deviation d = 1/2 (Karras et al. 2022, arXiv 2206.00364, equation 7), here without a division by a or s.
    """
    a, s = expand(alpha(lam), x), expand(sigma(lam), x)
    if kind == "x0":
        return from_x0(x, output, lam)
    if kind == "v":
        return Prediction(a * x - s * output, s * x + a * output)
    if kind == "flow":
        return Prediction((x - s * output) / (a + s), (x + a * output) / (a + s))
    if kind == "edm":
        norm = _edm_norm(a, s)
        skipped, rest = x / norm**2, _DATA_STD / norm * output
        return Prediction(_DATA_STD**2 * a * skipped + s * rest, s * skipped - a * rest)
    return Prediction((x - s * output) / a, output)


_DATA_STD = 0.5


def _edm_norm(a: Tensor, s: Tensor) -> Tensor:
    """Standard deviation of x_t: c_skip = (a d / norm)^2, c_out = s d / norm, c_in = 1 / norm for x_t."""
    return ((a * _DATA_STD) ** 2 + s**2).sqrt()


def target(kind: str, x0: Tensor, eps: Tensor, lam: Tensor) -> Tensor:
    """The network's target for x_t = a x0 + s eps."""
    a, s = expand(alpha(lam), x0), expand(sigma(lam), x0)
    if kind == "v":
        return a * eps - s * x0
    if kind == "flow":
        return eps - x0
    if kind == "edm":
        return (s / _DATA_STD * x0 - a * _DATA_STD * eps) / _edm_norm(a, s)
    return x0 if kind == "x0" else eps


def loss_weight(config: DiffusionConfig, lam: Tensor) -> Tensor:
    """The weight of the output's squared error at each lambda [B] -> [B].

    In terms of x0's error, "min_snr" is min(SNR, 5) (Hang et al. 2023, arXiv 2303.09556, section 3.4) and "p2" is
    SNR / (1 + SNR) (Choi et al. 2022, arXiv 2204.00227, equation 8, k = gamma = 1), for every parametrisation.
    """
    if config.weight == "simple":
        return torch.ones_like(lam)
    a, s = alpha(lam), sigma(lam)
    # Squared error of x0 over that of the output, and SNR times that: finite, one or the other, at every lambda.
    of_x0, of_snr = {
        "x0": (torch.ones_like(lam), lam.exp()),
        "eps": ((-lam).exp(), torch.ones_like(lam)),
        "v": (s**2, a**2),
        "flow": ((s / (a + s)) ** 2, (a / (a + s)) ** 2),
        "edm": ((_DATA_STD * s / _edm_norm(a, s)) ** 2, (_DATA_STD * a / _edm_norm(a, s)) ** 2),
    }[config.prediction]
    return torch.minimum(of_snr, 5 * of_x0) if config.weight == "min_snr" else 1 / (1 / of_snr + 1 / of_x0)


def loss_of(config: DiffusionConfig, output: Tensor, wanted: Tensor, lam: Tensor) -> Tensor:
    """Each image's weighted loss, [B], of outputs [B, ...]."""
    if config.loss == "l2":
        errors = F.mse_loss(output, wanted, reduction="none")
    elif config.loss == "l1":
        errors = F.l1_loss(output, wanted, reduction="none")
    else:
        errors = F.huber_loss(output, wanted, reduction="none")
    return errors.flatten(1).mean(dim=1) * loss_weight(config, lam)


def moved(prediction: Prediction, x: Tensor, x0: Tensor, lam: Tensor) -> Prediction:
    """The prediction with another x0, and its eps."""
    return from_x0(x, x0, lam)._replace(v=prediction.v, renoise=prediction.renoise)


def variational_loss(x0: Tensor, said: Tensor, v: Tensor, lam: Tensor, later: Tensor) -> Tensor:
    """Each image's KL of a DDPM step's true posterior to the one drawn from, [B], in nats for each number.

    The step goes from `lam` to `later` [B], finite and not below it; its mean is that of `said`, the predicted x0, and
    has no gradient. Nichol & Dhariwal 2021 (arXiv 2102.09672, equations 15 and 16): log variance =
    v log(most) + (1 - v) log(least), where most = share s^2, least = share s_later^2, and share =
    1 - SNR / SNR_later is the share of the noise that the step removes. With d = log(most / least) and u = v d,

        KL = (u + exp(-u) - 1 + share SNR_later (x0 - said)^2 exp(-u)) / 2

    in which no share is divided by, nor its logarithm taken: a step of no length has the KL 0 and the gradient 0.
    """
    lam, later = lam.double(), later.double()
    share = -torch.expm1(torch.where(lam < later, lam - later, 0.0))
    d = (F.logsigmoid(-lam) - F.logsigmoid(-later)).clamp(min=0)  # log s^2 - log s_later^2
    u = v * expand(d.to(v), x0)
    apart = expand((share * later.exp()).to(x0), x0) * (x0 - said.detach()).square()
    kl = (u + torch.expm1(-u) + apart * (-u).exp()) / 2
    return kl.flatten(1).mean(dim=1)


class Denoiser(nn.Module):
    """A network with its parametrisation: an unconditional `Denoise` for images in [-1, 1] or latents."""

    def __init__(
        self,
        network: NetworkConfig,
        diffusion: DiffusionConfig,
        conditioner: Conditioner | None = None,
        latent_channels: int = 0,
    ) -> None:
        super().__init__()
        self.diffusion, self.image_size, self.conditioner = diffusion, network.image_size, conditioner
        self.latent_channels, self.channels = latent_channels, latent_channels or 3
        widths = (conditioner.width, conditioner.cross_attention_dim) if conditioner is not None else (0, 0)
        kind = UNet if isinstance(network, UNetConfig) else DiT
        made = kind(network, self.channels, *widths, learns_variance=diffusion.variance == "learned")  # type: ignore[arg-type]
        self.network: nn.Module = made.to(memory_format=torch.channels_last)

    def output(self, x: Tensor, lam: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor | None]:
        """The raw network: x [B, C, S, S], lam [B] -> [B, C, S, S], and v, if it learns the variance."""
        if self.diffusion.prediction == "edm":  # c_in of equation 7, for x / a: unit variance at every lambda
            x = x / expand(_edm_norm(alpha(lam), sigma(lam)), x)
        raw: Tensor = self.network(x, lam) if condition is None else self.network(x, lam, condition)
        if self.diffusion.variance == "fixed":
            return raw, None
        output, v = raw.chunk(2, dim=1)
        return output, (v + 1) / 2

    def forward(self, x: Tensor, lam: Tensor) -> Prediction:
        return self._predict(x, lam, self._described(""))

    def conditioned_on(self, description: str) -> Denoise:
        """The denoiser conditioned on a caption or class; "" is unconditional.

        Raises UsageError if it was trained without descriptions.
        """
        if self.conditioner is None:
            raise UsageError("this denoiser was trained without descriptions; train one with condition.kind")
        condition = self._described(description)
        return lambda x, lam: self._predict(x, lam, condition)

    def _described(self, description: str) -> Condition | None:
        return self.conditioner([description]) if self.conditioner is not None else None

    def _predict(self, x: Tensor, lam: Tensor, condition: Condition | None) -> Prediction:
        lam = lam.to(x).expand(len(x))
        if condition is not None:  # one row, for all pictures
            condition = condition.expand(len(x))
        output, v = self.output(x, lam, condition)
        return from_output(self.diffusion.prediction, output, x, lam)._replace(v=v)

    def lambda_range(self) -> tuple[float, float]:
        """(lowest, highest) lambda of its schedule, the highest limited to 10: noise below 1/150 of the signal is
        under the images' own 8-bit steps."""
        table = log_snr(self.diffusion.schedule, TIMESTEPS)
        return float(table[-1].clamp(min=-10)), float(table[0].clamp(max=10))


def clipped(denoise: Denoise) -> Denoise:
    """Clip x0 to [-1, 1], the range of images (Ho et al. 2020, section 4); eps changes by the opposite amount."""

    def wrapped(x: Tensor, lam: Tensor) -> Prediction:
        prediction = denoise(x, lam)
        x0 = prediction.x0.clamp(-1, 1)
        lam = lam.to(x).expand(len(x))
        eps = prediction.eps + expand(alpha(lam) / sigma(lam), x) * (prediction.x0 - x0)
        return prediction._replace(x0=x0, eps=eps)

    return wrapped
