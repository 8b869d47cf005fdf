"""Layers of both denoiser networks: noise-level embedding, self- and cross-attention, zero initialisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.guidance.networks.condition import Condition


def noise_embedding(log_snr: Tensor, width: int) -> Tensor:
    """Sinusoidal features of lambda / 4: log_snr [B] -> [B, width] float32.

    lambda / 4 is EDM's c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1) up to sign and a factor 2; frequencies go
    from 1 to 64 in geometric steps, because lambda spans some 20 units, not 1000 timesteps.
    """
    frequencies = torch.exp(torch.linspace(0, math.log(64.0), width // 2, device=log_snr.device))
    angles = log_snr.float()[:, None] / 4 * frequencies  # [B, width / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: nn.Module | None = None,
    condition: Condition | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention of q [B, H, N, C] to k and v, joined with cross-attention to the condition's tokens.

    As in GLIDE (Nichol et al. 2021, arXiv 2112.10741, section 3.1), `context` projects the tokens to further keys and
    values: one softmax over pixels and text. Bool `mask` [B, N] is False where k and v are padding.
    """
    if context is not None and condition is not None and condition.tokens is not None:
        b, heads, _, c = q.shape
        words = context(condition.tokens).reshape(b, -1, 2, heads, c).permute(2, 0, 3, 1, 4)  # [2, B, H, L, C]
        if condition.mask is not None:
            here = torch.ones(b, k.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
            mask = torch.cat([here, condition.mask], dim=1)  # [B, N + L]
        k, v = torch.cat([k, words[0].to(k)], dim=2), torch.cat([v, words[1].to(v)], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])


def zeroed(module: nn.Module) -> nn.Module:
    """Zero-initialise all parameters of a module: its residual branch starts at 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
