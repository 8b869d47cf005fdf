"""Diffusion transformers: DiT and U-ViT, with cross-attention to captions and adaLN or a token for the noise level.

DiT (Peebles & Xie 2022, arXiv 2212.09748): every block is shifted, scaled and gated by the noise. U-ViT (Bao et al.
2022, arXiv 2209.12152): the noise is one more token, and long skips tie early blocks to late ones. The default
has both, modulation and long skips. Nearly all of its cost is matrix products, which suits CPUs.
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

_FREQUENCIES = 256


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer.

    DiT-S, B, L and XL have width 384, 768, 1024, 1152, depth 12, 12, 24, 28, heads 6, 12, 16, 16 and no long skips;
    U-ViT-S and M width 512, 768, depth 13, 17, heads 8, 12, and the noise as a token.
    """

    image_size: int = 32
    """Side of the square images, in pixels (of latents, in positions)."""
    patch_size: int = 4
    """Side of the patch that becomes one token."""
    width: int = 192
    """Width of the tokens."""
    depth: int = 6
    """Blocks."""
    heads: int = 6
    """Attention heads of each block."""
    noise: Literal["modulation", "token"] = "modulation"
    """Conditioning on noise level and class: "modulation" (DiT's adaLN-zero), or "token" (U-ViT)."""
    long_skips: bool = True
    """Skip connections from the first half of the blocks to the last half (U-ViT); DiT has none."""
    grad_checkpointing: bool = False
    """Activation checkpointing: recompute blocks in the backward pass."""

    def __post_init__(self) -> None:
        require("at least 1", "dit", self, "image_size", "patch_size", "width", "depth", "heads")
        if self.image_size % self.patch_size:
            raise RecipeError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        if self.width % self.heads or self.width % 2:
            raise RecipeError(f"width {self.width} must be even and divide by heads {self.heads}")


class _Block(nn.Module):
    """Pre-norm attention and MLP; with modulation shifted, scaled and gated (adaLN-zero: starts as the identity)."""

    def __init__(self, config: DiTConfig, cross_attention_dim: int) -> None:
        super().__init__()
        width, self.heads, modulated = config.width, config.heads, config.noise == "modulation"
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=not modulated) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width)) if modulated else None
        self.context = nn.Linear(cross_attention_dim, 2 * width) if cross_attention_dim and modulated else None

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition | None, mask: Tensor | None) -> Tensor:
        if self.modulation is None:
            x = x + self.attend(self.norm1(x), None, mask)
            plain: Tensor = x + self.mlp(self.norm2(x))
            return plain
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=2)  # [B, 1, W]
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, condition, mask)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out

    def attend(self, x: Tensor, condition: Condition | None, mask: Tensor | None) -> Tensor:
        """Self-attention and cross-attention to the condition's tokens; bool `mask` [B, N] is False for padding."""
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # [B, H, N, W/H]
        out: Tensor = self.out(attention(q, k, v, self.context, condition, mask).transpose(1, 2).reshape(b, n, width))
        return out


class DiT(nn.Module):
    """x [B, C, H, W], lambda [B] and optionally a condition -> [B, C, H, W], float32.

    The meaning of the output (eps, x0, v) is the denoiser's choice.
    """

    def __init__(
        self,
        config: DiTConfig,
        channels: int = 3,
        condition_width: int = 0,
        cross_attention_dim: int = 0,
        learns_variance: bool = False,
    ) -> None:
        super().__init__()
        self.config, width = config, config.width
        modulated = config.noise == "modulation"
        side, depth = config.image_size // config.patch_size, channels * config.patch_size**2
        # The noise token is the plain embedding (U-ViT); for modulation an MLP follows (DiT).
        self.embed = (
            nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)) if modulated else None
        )
        self.condition = zeroed(nn.Linear(condition_width, width)) if condition_width else None
        self.words = nn.Linear(cross_attention_dim, width) if cross_attention_dim and not modulated else None
        self.stem = nn.Linear(depth, width)
        self.positions = nn.Parameter(torch.randn(1, side * side, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(config, cross_attention_dim) for _ in range(config.depth))
        pairs = config.depth // 2 if config.long_skips else 0
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(pairs))
        self.norm = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.modulation = zeroed(nn.Linear(width, 2 * width)) if modulated else None
        self.head = zeroed(
            nn.Linear(width, depth * (1 + learns_variance))
        )  # the untrained network predicts 0 everywhere

    def forward(self, x: Tensor, log_snr: Tensor, condition: Condition | None = None) -> Tensor:
        embedding = self._embedding(log_snr, condition)
        patches = F.pixel_unshuffle(x, self.config.patch_size)  # [B, C p^2, H / p, W / p]
        side, half = patches.shape[-1], len(self.skips)
        tokens = self.stem(patches.flatten(2).transpose(1, 2)) + self.positions  # [B, N, W]
        tokens, mask = self._with_condition(tokens, embedding, condition)
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < half:
                kept.append(tokens)
            elif i >= len(self.blocks) - half:
                skip = self.skips[i - (len(self.blocks) - half)]
                tokens = skip(torch.cat([tokens, kept.pop()], dim=2))
            if self.config.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, embedding, condition, mask, use_reentrant=False)
            else:
                tokens = block(tokens, embedding, condition, mask)
        tokens = self.norm(tokens[:, -side * side :])
        if self.modulation is not None:
            shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
            tokens = tokens * (1 + scale) + shift
        out = self.head(tokens).transpose(1, 2).unflatten(2, (side, side))  # [B, C p^2, H / p, W / p]
        return F.pixel_shuffle(out, self.config.patch_size).float()

    def _embedding(self, log_snr: Tensor, condition: Condition | None) -> Tensor:
        """Of the noise level and the condition's vector: [B, W]."""
        width = _FREQUENCIES if self.embed is not None else self.config.width
        embedding = noise_embedding(log_snr, width)
        if self.embed is None:
            return embedding
        embedding = self.embed(embedding)
        if self.condition is not None and condition is not None:
            embedding = embedding + self.condition(condition.vector)
        return F.silu(embedding)

    def _with_condition(
        self, tokens: Tensor, embedding: Tensor, condition: Condition | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens with those of the noise level, the condition's vector and its text before them.

        And their mask, bool [B, N], if the text is padded.
        """
        if self.embed is not None:
            return tokens, None
        mask = None
        joined = [embedding[:, None].to(tokens), tokens]
        if self.condition is not None and condition is not None:
            joined.insert(1, self.condition(condition.vector)[:, None])
            if self.words is not None and condition.tokens is not None:
                joined.insert(0, self.words(condition.tokens))
                if condition.mask is not None:
                    mask = F.pad(condition.mask, (0, 2 + tokens.shape[1]), value=True)
        return torch.cat(joined, dim=1), mask
