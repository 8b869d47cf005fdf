"""AdamW's parameter groups, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from clipkit.config import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices and convolutions only, fused where the device allows it."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    no_decay_modules = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    exempt = {id(p) for m in model.modules() if isinstance(m, no_decay_modules) for p in m.parameters(recurse=False)}
    exempt |= {id(p) for n, p in named if p.ndim < 2 or "pos" in n.rsplit(".", 1)[-1]}
    groups = [
        {"params": [p for _, p in named if id(p) not in exempt], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if id(p) in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate for `step` (from 0): linear warm-up, then half a cosine down to final_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * share)) / 2)


class EMA:
    """Exponential moving average of parameters; buffers are copied.

    The decay is warmed up as min(decay, (1 + t) / (10 + t)), so that the initial weights are forgotten early.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {n: t.detach().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averaged.append(self.shadow[name])
                current.append(tensor)
            else:
                self.shadow[name].copy_(tensor)
        torch._foreach_lerp_(averaged, current, 1 - decay)
