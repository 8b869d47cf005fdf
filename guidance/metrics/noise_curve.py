"""The noise curve: zero-shot accuracy over the noise level, of a noise-aware CLIP and of the clean one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from clipkit.data.images import decode, preprocessing, to_signed, to_unit
from clipkit.data.shards import Sample, Shards
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.guidance.loading import Guide
from clipkit.guidance.networks.noisy_clip import NoisyCLIP, noised
from clipkit.log import progress
from clipkit.models.pretrained import Pretrained
from clipkit.zeroshot.heads import class_head, embed_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (*map(float, range(-8, 9)), math.inf)
"""Lambdas (log SNR), from nearly all noise to none."""
LEVEL_NAMES = tuple("clean" if math.isinf(level) else f"{level:g}" for level in LEVELS)

Encode = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, 3, S, S], lambda [B]) -> unit vectors [B, D]."""


def noise_aware(model: NoisyCLIP) -> Encode:
    """The noise-aware image encoder, conditioned on lambda."""
    return lambda x, lam: model.encode_image(x, lam)[0]


def clean(model: NoisyCLIP | torch.nn.Module) -> Encode:
    """A clean image encoder on the same noised pictures."""
    tower = model.clip.image if isinstance(model, NoisyCLIP) else model.image
    return lambda x, lam: F.normalize(tower(to_unit(x)).float(), dim=-1)  # type: ignore[operator]


@torch.no_grad()
def accuracy_at(encode: Encode, targets: Tensor, x0: Tensor, wanted: Tensor, level: float) -> float:
    """Top-1 of images noised to lambda = `level`: the share whose nearest target [K, D] is the right one.

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


@dataclass(frozen=True)
class NoiseCurve:
    """Accuracies of `n` pictures among `targets` classes or captions."""

    n: int
    targets: int
    skipped: dict[str, int]
    """Reason -> pictures that were not used."""
    top1: dict[str, list[float]]
    """"noise-aware" and "clean" -> top-1 at each of LEVELS."""


def measure(guide: Guide, clip: Pretrained, pack: Shards, n: int) -> NoiseCurve:
    """The noise curve of at most `n` pictures of a pack, evenly spread: their classes, or else their captions.

    Raises UsageError for a noise-aware CLIP of latents and for a pack with a single target, DataError when no picture
    can be used.
    """
    where = clip.model.log_logit_scale.device
    if len(guide.model.clip.config.conventions.image_mean) != 3:
        raise UsageError("this noise-aware CLIP sees latents, which the clean one does not; compare one of pixels")
    samples, pictures, skipped = _evenly(pack, n)
    texts = list(dict.fromkeys(sample.captions[0] for sample in samples))  # equal captions are one target
    labels = [sample.label if pack.classes else texts.index(sample.captions[0]) for sample in samples]
    if (targets := len(pack.classes or texts)) < 2:
        raise UsageError(f"{pack.source} has one class or caption, which is always right; give a pack with several")
    wanted = torch.tensor(labels, device=where)
    top1 = {}
    for name, towers, tokenizer, encode in (
        ("noise-aware", guide.model.clip, guide.tokenizer, noise_aware(guide.model)),
        ("clean", clip.model, clip.tokenizer, clean(clip.model)),
    ):
        if pack.classes:
            head = class_head(towers, tokenizer, pack.classes, pack.templates)
        else:
            head = embed_texts(towers, tokenizer, texts)
        seen = preprocessing(towers.config)
        x0 = to_signed(torch.stack([seen(picture) for picture in pictures]).to(where))
        levels = progress(LEVELS, len(LEVELS), name)
        top1[name] = [accuracy_at(encode, head, x0, wanted, level) for level in levels]
    return NoiseCurve(len(samples), targets, skipped, top1)


def _evenly(pack: Shards, n: int) -> tuple[list[Sample], list[Image], dict[str, int]]:
    """At most `n` samples of a pack, evenly spread, with their pictures, and the number skipped for each reason.

    Raises DataError when none is left.
    """
    samples = []
    pictures = []
    skipped = Counter[str]()
    for i in np.linspace(0, len(pack) - 1, min(n, len(pack))).astype(int):
        try:
            sample = pack.read(int(i))
            if pack.classes and not (isinstance(sample.label, int) and 0 <= sample.label < len(pack.classes)):
                raise SampleError("no label of its classes")
            pictures.append(decode(sample.image))
            samples.append(sample)
        except SampleError as error:
            skipped[error.reason] += 1
    if not samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
        raise DataError(f"no picture of {pack.source} can be used; skipped: {reasons}")
    return samples, pictures, dict(skipped)


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
