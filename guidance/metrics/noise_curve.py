"""How much a noise-aware CLIP sees at each noise level, beside the clean one on the same noised pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.data.images import to_unit
from clipkit.errors import UsageError
from clipkit.guidance.networks.noisy_clip import NoisyCLIP, noised

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (*map(float, range(-8, 9)), math.inf)
"""Lambdas (log SNR), from nearly all noise to none."""

Encode = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, 3, S, S], lambda [B]) -> unit vectors [B, D]."""


def noise_aware(model: NoisyCLIP) -> Encode:
    """The tower as it is told of the noise."""
    return lambda x, lam: model.encode_image(x, lam)[0]


def clean(model: NoisyCLIP | torch.nn.Module) -> Encode:
    """A CLIP that is shown the same pictures and told nothing."""
    tower = model.clip.image if isinstance(model, NoisyCLIP) else model.image
    return lambda x, lam: F.normalize(tower(to_unit(x)).float(), dim=-1)  # type: ignore[operator]


@torch.no_grad()
def accuracy_at(encode: Encode, targets: Tensor, x0: Tensor, wanted: Tensor, level: float) -> float:
    """Share of images, noised to lambda = `level`, whose nearest target [K, D] is the wanted one.

    x0: images [N, 3, S, S] in [-1, 1], or latents; wanted: int64 [N]. The noise is the same in every call.
    """
    noise = torch.Generator().manual_seed(0)
    right = 0
    for part, truth in zip(torch.split(x0, 256), torch.split(wanted, 256), strict=True):
        eps = torch.randn(part.shape, generator=noise).to(part.device)
        lam = torch.full((len(part),), level, device=part.device)
        x, lam = noised(part, lam, eps, lam.isinf())
        right += int(((encode(x, lam) @ targets.T).argmax(dim=1) == truth).sum())
    return right / len(x0)


def figure(levels: Sequence[float], curves: Mapping[str, Sequence[float]], chance: float) -> Figure:
    """Accuracy over lambda, a line for each model; no noise stands at the right end."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError('figures are drawn with matplotlib: pip install "clipkit[plot]"') from None
    sheet = Figure(figsize=(6, 3.6), layout="constrained")
    axes = sheet.subplots()
    finite = [level for level in levels if math.isfinite(level)]
    places = [level if math.isfinite(level) else finite[-1] + 2 for level in levels]
    for name, values in curves.items():
        axes.plot(places, [100 * value for value in values], marker="o", markersize=3, label=name)
    axes.axhline(100 * chance, color="grey", linewidth=0.8, linestyle=":", label="chance")
    axes.set_xticks([*finite[::4], places[-1]], [*(f"{level:g}" for level in finite[::4]), "clean"])
    axes.set(xlabel="log SNR", ylabel="top-1, %", ylim=(0, None))
    axes.legend(frameon=False)
    return sheet
