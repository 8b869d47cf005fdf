"""The transformer denoiser network: patches as tokens, every block modulated by the noise level, long skips.

Peebles & Xie 2022 (DiT, arXiv 2212.09748) with the long skip connections of Bao et al. 2022 (U-ViT, arXiv 2209.12152).
It is nearly all matrix products, which is what a CPU does best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import RecipeError
from clipkit.guidance.unet import noise_embedding


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer."""

    image_size: int = 32
    """Side of the square images, in pixels."""
    patch_size: int = 4
    """Side of the patch that becomes one token."""
    width: int = 192
    """Width of the tokens."""
    depth: int = 6
    """Blocks."""
    heads: int = 6
    """Attention heads of each block."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise RecipeError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        if self.width % self.heads or self.width % 2:
            raise RecipeError(f"width {self.width} must be even and divide by heads {self.heads}")


class _Block(nn.Module):
    """Pre-norm attention and MLP, shifted, scaled and gated by the noise embedding (adaLN-zero: starts as identity)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        b, n, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=2)  # [B, 1, W]
        qkv = self.qkv(self.norm(x) * (1 + scale1) + shift1).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, W / heads] each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + gate1 * self.out(attended)
        out: Tensor = x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return out


class DiT(nn.Module):
    """x [B, 3, H, W] and lambda [B] -> [B, 3, H, W], float32; what it predicts is the denoiser's business."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        side, depth = config.image_size // config.patch_size, 3 * config.patch_size**2
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = nn.Linear(depth, width)
        self.positions = nn.Parameter(torch.randn(1, side * side, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.depth))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(config.depth // 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, depth)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # starts at zero: the untrained network predicts 0 everywhere

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        embedding = self.embed(noise_embedding(log_snr, self.config.width))
        patches = F.pixel_unshuffle(x, self.config.patch_size)  # [B, 3 p^2, H / p, W / p]
        side, half = patches.shape[-1], len(self.skips)
        tokens = self.stem(patches.flatten(2).transpose(1, 2)) + self.positions  # [B, N, W]
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < half:
                kept.append(tokens)
            elif i >= len(self.blocks) - half:
                skip = self.skips[i - (len(self.blocks) - half)]
                tokens = skip(torch.cat([tokens, kept.pop()], dim=2))
            tokens = block(tokens, embedding)
        out = self.head(self.norm(tokens)).transpose(1, 2).unflatten(2, (side, side))  # [B, 3 p^2, H / p, W / p]
        return F.pixel_shuffle(out, self.config.patch_size).float()
