"""The optimizer (AdamW or Muon), the learning-rate schedule, and the exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipkit._renamed import former_name
from clipkit.config import OptimConfig
from clipkit.errors import UsageError
from clipkit.train.parallel import local


def __getattr__(name: str) -> Any:  # PEP 562: names of version 0.1
    return former_name(__name__, name)


def make_optimizer(model: nn.Module, config: OptimConfig, scales: Mapping[str, float] | None = None) -> AdamWMuon:
    """AdamW, fused where the device allows it, with weight decay on matrices and convolutions only; or Muon for those.

    `scales`: parameter name -> multiple of the learning rate, which becomes its group's `lr_scale`.
    Raises UsageError for Muon on matrices that FSDP shards.
    """
    no_decay_modules = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    exempt = {id(p) for m in model.modules() if isinstance(m, no_decay_modules) for p in m.parameters(recurse=False)}
    groups: dict[tuple[bool, bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = id(parameter) not in exempt and parameter.ndim >= 2 and "pos" not in name.rsplit(".", 1)[-1]
            muon = decays and config.method == "muon" and _hidden_matrix(name, parameter)
            key = (muon, not decays, isinstance(parameter, DTensor), (scales or {}).get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    if config.method == "muon" and any(sharded for _, _, sharded, _ in groups):
        raise UsageError("optim.method=muon needs whole matrices, which run.parallel=fsdp shards; use one of them")
    return AdamWMuon(
        [
            {"params": found, "weight_decay": 0.0 if spared else config.weight_decay, "muon": muon, "lr_scale": scale}
            for (muon, spared, _, scale), found in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether both sides are hidden features: not pixels, not depthwise filters, not the shared embedding."""
    return parameter.ndim >= 2 and parameter.shape[1] > 3 and "projection" not in name


class AdamWMuon(torch.optim.AdamW):
    """AdamW, with Muon for the groups marked `muon`: their momentum is orthogonalised before it is applied.

    Jordan et al. 2024 (Muon: an optimizer for hidden layers), scaled to AdamW's typical update as in Liu et al. 2025
    (arXiv 2502.16982, eq. 4), so that one learning rate and one weight decay serve both. A convolution
    [out, in, k, k] is the matrix [out, in * k * k].
    """

    MOMENTUM = 0.95
    found_inf: Tensor | None = None
    """Scalar: a step changes nothing where it is 1. AdamW's fused kernels read it under this name."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients; the gradients of `muon` groups are deleted."""
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._orthogonal_step(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW skips parameters without one
        super().step()

    def _orthogonal_step(self, parameter: Tensor, lr: float, decay: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(parameter.grad, 1 - self.MOMENTUM)
        nesterov = parameter.grad.lerp_(momentum, self.MOMENTUM).flatten(1)  # [out, in * k * k]
        update = orthogonalise(nesterov).view_as(parameter).mul_(-0.2 * lr * max(nesterov.shape) ** 0.5)
        update.add_(parameter, alpha=-lr * decay)
        if self.found_inf is not None:
            update = torch.where(self.found_inf > 0, 0.0, update)
        parameter.add_(update)


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """[m, n] -> roughly the nearest (semi-)orthogonal matrix: singular values come near 1, singular vectors stay.

    The quintic Newton-Schulz iteration with Jordan's coefficients, which trade exactness for speed. An iteration
    multiplies x by a polynomial of x x^T: the iterations are done on that smaller matrix, and x is multiplied once.
    Under autocast the two products with x have its precision; the iterations, which would amplify its rounding, do not.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram = (x @ x.T).to(matrix.dtype)
    product = None
    with torch.autocast(x.device.type, enabled=False):
        for left in reversed(range(steps)):
            factor = 2.0315 * gram @ gram - 4.7750 * gram
            factor.diagonal().add_(3.4445)
            product = factor if product is None else factor @ product
            if left:
                gram = factor @ gram @ factor
    orthogonal: Tensor = (product @ x).to(matrix.dtype)
    return orthogonal.T if matrix.shape[0] > matrix.shape[1] else orthogonal


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of `step` (from 0): linear warmup to lr, then a schedule that ends at final_lr_fraction * lr.

    "cosine": cosine decay. "wsd" (warmup, stable, decay; Hu et al. 2024, arXiv 2404.06395): lr until the last
    `decay_fraction` of the steps, then linear decay. "constant": lr.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        left = min(1.0, (steps - step) / max(1.0, config.decay_fraction * steps))
        return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)
    return config.lr * (
        config.final_lr_fraction + (1 - config.final_lr_fraction) * (1 + math.cos(math.pi * progress)) / 2
    )


class EMA:
    """Exponential moving average of the weights and floating-point buffers; other buffers are copied.

    The decay is warmed up as min(decay, (1 + t) / (10 + t)), so that the initial weights are forgotten early.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {n: t.detach().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged = []
        current = []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averaged.append(self.shadow[name])
                current.append(tensor)
            else:
                self.shadow[name].copy_(tensor)
        torch._foreach_lerp_([local(t) for t in averaged], [local(t) for t in current], 1 - decay)
