"""Synchronised BatchNorm, over the samples of all ranks on any device; and passes that keep running statistics.

Ioffe & Szegedy 2015 (arXiv 1502.03167, algorithm 1). It does not reach over micro-batches: a layer's statistics
of the whole batch need the activations of every micro-batch at once, the memory that gradient accumulation saves;
recomputing them would cost one pass per layer. So each micro-batch is normalised by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from clipkit import distributed
from clipkit.config import RunConfig


def synchronise(model: nn.Module) -> None:
    """Let every BatchNorm in `model`, timm's kinds included, take its training statistics over all ranks.

    Ranks must call the same layers in the same order; how many samples each has does not matter.
    """
    for module in _batchnorms(model):
        if not isinstance(module, _Synchronised):
            kind = type(module)
            module.__class__ = type(kind.__name__, (_Synchronised, kind), {})  # as FSDP does it: weights stay in place


def over_ranks(model: nn.Module) -> bool:
    """Whether `model` has BatchNorms in training mode whose statistics are those of all ranks."""
    return any(module.training and isinstance(module, _Synchronised) for module in _batchnorms(model))


def limits(model: nn.Module, run: RunConfig) -> list[str]:
    """One line for each reason why training statistics of `model` are not those of the whole batch."""
    found: list[str] = []
    if not any(module.training for module in _batchnorms(model)):
        return found
    if run.micro_batches > 1:
        found.append(
            "BatchNorm normalises each micro-batch by itself; gradients are exact for statistics of each micro-batch, "
            "not of the whole batch"
        )
    if distributed.world_size() > 1 and not run.sync_batchnorm:
        found.append(
            "run.sync_batchnorm=false: BatchNorm normalises each rank's samples by themselves; gradients are exact for "
            "statistics of each rank, not of the batch of all ranks"
        )
    return found


def _batchnorms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def keep_running_stats(model: nn.Module) -> Iterator[None]:
    """Restore running statistics at the end: for further passes over samples that are counted already."""
    tracking = [module for module in model.modules() if module.training and hasattr(module, "running_var")]
    buffers = [buffer for module in tracking for buffer in module.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)


class _Synchronised(nn.Module):
    """Mixin of a BatchNorm class: its forward pass, activation included, with `batch_norm` in place of torch's."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Any:
        with _OverRanks():
            return super().forward(x)


class _OverRanks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch's `F.batch_norm` of x [b, C, ...], in training with mean and variance over the samples of all ranks."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    out: Tensor
    out, mean, var, count = _Normalise.apply(x, weight, bias, eps)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return out


class _Normalise(torch.autograd.Function):
    """x [b, C, ...] of each rank -> the same normalised, and mean [C], biased variance [C] and count of all ranks' x.

    torch's kernels read x: they compute each rank's moments, which are summed in float64, where E[x^2] - E[x]^2 does
    not cancel, and they normalise with the moments of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        gain = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight
        shift = torch.zeros_like(gain) if bias is None else bias
        if x.numel():
            _, mean, inverse = torch.native_batch_norm(x, gain, shift, None, None, True, 0.0, 0.0)
        else:  # all of this rank's samples were skipped; the kernels need one
            mean, inverse = torch.zeros_like(gain), torch.zeros_like(gain)
        mean, var = mean.double(), torch.where(inverse > 0, inverse.double().pow(-2), 0.0)  # 0 stands for 1 / 0
        count = mean.new_full((1,), x.numel() // len(mean))
        sums = distributed.sum_over_ranks(torch.cat([count, count * mean, count * (var + mean.square())]))
        count = sums[:1].clamp(min=1)
        mean, square = (sums[1:] / count).view(2, -1)
        var = (square - mean.square()).clamp(min=0)
        ctx.eps = eps
        ctx.save_for_backward(x, gain, mean.to(dtype), var.to(dtype), count)
        out = F.batch_norm(x, mean.to(dtype), var.to(dtype), gain, shift, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """dx = w / std (dy - mean(dy) - x' mean(dy x')), x' being x normalised and the means those of all ranks.

        torch's kernel takes those of this rank; the difference is linear in x'.
        """
        x, gain, mean, var, count = ctx.saved_tensors
        inverse, wanted = (var + ctx.eps).rsqrt(), ctx.needs_input_grad
        if not x.numel():
            nothing = torch.zeros_like(gain)
            if wanted[0]:  # the other ranks add up theirs
                distributed.sum_over_ranks(torch.stack([nothing, nothing]).double())
            return torch.zeros_like(x), nothing if wanted[1] else None, nothing if wanted[2] else None, None
        dx, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, gain, None, None, mean, inverse, True, ctx.eps, [wanted[0], True, True]
        )
        if wanted[0]:
            mine = torch.stack([of_weight, of_bias]).double()
            excess = mine / (x.numel() // len(mean)) - distributed.sum_over_ranks(mine) / count
            slope, offset = (excess * inverse * gain).to(mean.dtype)
            dx += F.batch_norm(x, mean, var, slope, offset, False, 0.0, ctx.eps)
        return dx, of_weight if wanted[1] else None, of_bias if wanted[2] else None, None
