"""Metrics of pictures: between collections, between pairs, and of a guide over noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipkit._lazy import lazy

if TYPE_CHECKING:
    from clipkit.guidance.metrics.distributions import (
        Moments,
        clip_score,
        cmmd,
        compare,
        frechet_bias,
        frechet_distance,
        inception_score,
        kernel_distance,
        precision_recall,
    )

__all__ = [
    "Moments",
    "clip_score",
    "cmmd",
    "compare",
    "frechet_bias",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
_HOMES = {"clipkit.guidance.metrics.distributions": __all__}
__getattr__, __dir__ = lazy(__name__, _HOMES)
