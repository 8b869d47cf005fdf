"""The U-Net denoiser: residual blocks modulated by the noise level, self-attention and cross-attention to captions.

Ho et al. 2020 (arXiv 2006.11239) with the scale-shift residual blocks of Dhariwal & Nichol 2021 (ADM, arXiv
2105.05233) and a space-to-depth stem, which keeps the highest resolution cheap on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkit.config import require
from clipkit.errors import RecipeError
from clipkit.guidance.networks.condition import Condition
from clipkit.guidance.networks.layers import attention, noise_embedding, zeroed


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
    head_channels: int = 32
    """Width of an attention head."""
    resample: Literal["conv", "residual"] = "conv"
    """Down- and upsampling: a convolution, or ADM's residual block (with two blocks in the middle)."""
    grad_checkpointing: bool = False
    """Activation checkpointing: recompute blocks in the backward pass."""

    def __post_init__(self) -> None:
        require("at least 1", "unet", self, "image_size", "patch_size", "channels", "blocks", "head_channels")
        require("at least 0", "unet", self, "attention_from")
        require("in [0, 1)", "unet", self, "dropout")
        if not self.multipliers or min(self.multipliers) < 1:
            raise RecipeError(
                f"unet.multipliers are {list(self.multipliers)}; give one of at least 1 for each resolution"
            )
        step = self.patch_size * 2 ** (len(self.multipliers) - 1)
        if self.image_size % step:
            raise RecipeError(
                f"image_size {self.image_size} does not divide by {step} (patch_size {self.patch_size} and "
                f"{len(self.multipliers)} resolutions); choose a multiple of {step}"
            )
        if self.channels % 16:
            raise RecipeError(f"channels is {self.channels}; it must be a multiple of 16 (group normalisation)")
        # The middle has attention as well.
        for width in {self.channels * m for m in (*self.multipliers[self.attention_from :], self.multipliers[-1])}:
            if width % (heads := _heads(width, self.head_channels)):
                raise RecipeError(
                    f"unet.head_channels is {self.head_channels}: a width of {width} makes {heads} heads, which do not "
                    "divide it; choose one that divides the widths with attention"
                )


def _heads(width: int, head_channels: int) -> int:
    return max(1, width // head_channels)


class _ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice; the noise embedding modulates the second norm; the last conv starts at 0.

    With `resample` 0.5 or 2 both branches change the resolution after the first norm.
    """

    def __init__(
        self, channels_in: int, channels_out: int, embedding: int, dropout: float, resample: float = 1.0
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(16, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm2 = nn.GroupNorm(16, channels_out, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample < 1:
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample > 1:
            x, h = (F.interpolate(t, scale_factor=2.0, mode="nearest") for t in (x, h))
        h = self.conv1(h)
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
        h = self.norm2(h) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return out


class _Attention(nn.Module):
    """Self-attention over pixels and cross-attention to a caption's tokens; residual, initialised to the identity."""

    def __init__(self, channels: int, head_channels: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.heads = _heads(channels, head_channels)
        self.norm = nn.GroupNorm(16, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = nn.Linear(cross_attention_dim, 2 * channels) if cross_attention_dim else None
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        qkv = self.qkv(tokens).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, H*W, C / heads] each
        attended = attention(q, k, v, self.context, condition).transpose(1, 2).reshape(b, h * w, c)
        out: Tensor = x + self.out(attended).transpose(1, 2).reshape(b, c, h, w)
        return out


class _Level(nn.Module):
    """One residual block, then attention if this resolution has it."""

    def __init__(
        self, channels_in: int, channels_out: int, config: UNetConfig, attention: bool, cross_attention_dim: int
    ) -> None:
        super().__init__()
        self.block = _ResidualBlock(channels_in, channels_out, 4 * config.channels, config.dropout)
        self.attention = _Attention(channels_out, config.head_channels, cross_attention_dim) if attention else None
        self.checkpointing = config.grad_checkpointing

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._forward, x, embedding, condition, use_reentrant=False)
            return again
        return self._forward(x, embedding, condition)

    def _forward(self, x: Tensor, embedding: Tensor, condition: Condition | None) -> Tensor:
        out: Tensor = self.block(x, embedding)
        return out if self.attention is None else self.attention(out, condition)


class UNet(nn.Module):
    """x [B, C, H, W], lambda [B] and optionally a condition -> [B, C, H, W], float32.

    The meaning of the output (eps, x0, v) is the denoiser's choice. Skip connections are a stack: the first half pushes
    its activations, the second half pops them.
    """

    def __init__(
        self,
        config: UNetConfig,
        channels: int = 3,
        condition_width: int = 0,
        cross_attention_dim: int = 0,
        learns_variance: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        self.width, embedding, depth = config.channels, 4 * config.channels, channels * config.patch_size**2
        self.embed = nn.Sequential(
            nn.Linear(self.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.condition = zeroed(nn.Linear(condition_width, embedding)) if condition_width else None
        self.stem = nn.Conv2d(depth, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        def level(inputs: int, outputs: int, attention: bool) -> _Level:
            return _Level(inputs, outputs, config, attention, cross_attention_dim)

        skips, width = [widths[0]], widths[0]
        for i, out in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(level(width, out, i >= config.attention_from))
                width = out
                skips.append(width)
            if i < len(widths) - 1:
                self.down.append(self._resample(width, 0.5))
                skips.append(width)
        self.middle = level(width, width, True)
        self.middle2 = self._residual(width) if config.resample == "residual" else None
        for i, out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(level(width + skips.pop(), out, i >= config.attention_from))
                width = out
            if i > 0:
                self.up.append(self._resample(width, 2.0))
        self.head = nn.Sequential(
            nn.GroupNorm(16, width), nn.SiLU(), zeroed(nn.Conv2d(width, depth * (1 + learns_variance), 3, padding=1))
        )  # zero-initialised: the untrained network predicts 0

    def _residual(self, width: int, resample: float = 1.0) -> _ResidualBlock:
        return _ResidualBlock(width, width, 4 * self.width, self.config.dropout, resample)

    def _resample(self, width: int, factor: float) -> nn.Module:
        if self.config.resample == "residual":
            return self._residual(width, factor)
        return nn.Conv2d(width, width, 3, stride=2 if factor < 1 else 1, padding=1)

    def forward(self, x: Tensor, log_snr: Tensor, condition: Condition | None = None) -> Tensor:
        embedding = self.embed(noise_embedding(log_snr, self.width))
        if self.condition is not None and condition is not None:
            embedding = embedding + self.condition(condition.vector)
        x = self.stem(F.pixel_unshuffle(x, self.config.patch_size))  # [B, C p^2, H / p, W / p]
        skips = [x]
        for layer in self.down:
            x = self._through(layer, x, embedding, condition)
            skips.append(x)
        x = self.middle(x, embedding, condition)
        if self.middle2 is not None:
            x = self.middle2(x, embedding)
        for layer in self.up:
            if isinstance(layer, _Level):
                x = torch.cat([x, skips.pop()], dim=1)
            elif isinstance(layer, nn.Conv2d):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self._through(layer, x, embedding, condition)
        return F.pixel_shuffle(self.head(x), self.config.patch_size).float()

    @staticmethod
    def _through(layer: nn.Module, x: Tensor, embedding: Tensor, condition: Condition | None) -> Tensor:
        out: Tensor
        if isinstance(layer, _Level):
            out = layer(x, embedding, condition)
        else:
            out = layer(x, embedding) if isinstance(layer, _ResidualBlock) else layer(x)
        return out
