"""The U-Net denoiser network: residual blocks modulated by the noise level, self-attention where the picture is small.

Ho et al. 2020 (arXiv 2006.11239) with the scale-shift residual blocks of Dhariwal & Nichol 2021 (arXiv 2105.05233) and
a space-to-depth stem, so that on a CPU the highest resolution does not eat the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import RecipeError


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net."""

    image_size: int = 32
    """Side of the square images, in pixels."""
    patch_size: int = 2
    """Pixels are folded p x p into channels first (space-to-depth); 1 turns it off."""
    channels: int = 64
    """Width at the highest resolution."""
    multipliers: tuple[int, ...] = (1, 2, 3)
    """Width at each resolution, in multiples of `channels`; each next one halves the side."""
    blocks: int = 2
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    attention_from: int = 1
    """Resolutions with self-attention: this one (0 is the highest) and all below."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""

    def __post_init__(self) -> None:
        step = self.patch_size * 2 ** (len(self.multipliers) - 1)
        if self.image_size % step:
            raise RecipeError(
                f"image_size {self.image_size} does not divide by {step} (patch_size {self.patch_size} and "
                f"{len(self.multipliers)} resolutions); choose a multiple of {step}"
            )
        if self.channels % 16:
            raise RecipeError(f"channels is {self.channels}; it must be a multiple of 16 (group normalisation)")


def noise_embedding(log_snr: Tensor, width: int) -> Tensor:
    """Sinusoidal features of lambda / 4: log_snr [B] -> [B, width] float32.

    lambda / 4 is EDM's c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1) up to sign and a factor 2; frequencies go
    from 1 to 64 in geometric steps, because lambda moves over some 20 units rather than over 1000 timesteps.
    """
    frequencies = torch.exp(torch.linspace(0, math.log(64.0), width // 2, device=log_snr.device))
    angles = log_snr.float()[:, None] / 4 * frequencies  # [B, width / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class _ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice; the noise embedding modulates the second norm; the last conv starts at 0."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(16, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm2 = nn.GroupNorm(16, channels_out, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
        h = self.norm2(h) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return out


class _Attention(nn.Module):
    """Self-attention over the pixels, heads of 32 channels or fewer, residual, starting as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = nn.GroupNorm(16, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        qkv = self.qkv(tokens).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, H*W, C / heads] each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        out: Tensor = x + self.out(attended).transpose(1, 2).reshape(b, c, h, w)
        return out


class _Level(nn.Module):
    """One residual block, then attention if this resolution has it."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.block = _ResidualBlock(channels_in, channels_out, embedding, dropout)
        self.attention = _Attention(channels_out) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(x, embedding))
        return out


class UNet(nn.Module):
    """x [B, 3, H, W] and lambda [B] -> [B, 3, H, W], float32; what it predicts is the denoiser's business.

    The first half keeps every activation on a stack; the second half takes them off again, widest last.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        self.width, embedding, depth = config.channels, 4 * config.channels, 3 * config.patch_size**2
        self.embed = nn.Sequential(
            nn.Linear(self.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.stem = nn.Conv2d(depth, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_Level(width, out, embedding, level >= config.attention_from, config.dropout))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = _Level(width, width, embedding, True, config.dropout)
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(
                    _Level(width + skips.pop(), out, embedding, level >= config.attention_from, config.dropout)
                )
                width = out
            if level > 0:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Sequential(
            nn.GroupNorm(16, width), nn.SiLU(), _zero(nn.Conv2d(width, depth, 3, padding=1))
        )  # starts at zero: the untrained network predicts 0 everywhere

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        embedding = self.embed(noise_embedding(log_snr, self.width))
        x = self.stem(F.pixel_unshuffle(x, self.config.patch_size))  # [B, 3 p^2, H / p, W / p]
        skips = [x]
        for layer in self.down:
            x = layer(x, embedding) if isinstance(layer, _Level) else layer(x)
            skips.append(x)
        x = self.middle(x, embedding)
        for layer in self.up:
            if isinstance(layer, _Level):
                x = layer(torch.cat([x, skips.pop()], dim=1), embedding)
            else:
                x = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.head(x), self.config.patch_size).float()
