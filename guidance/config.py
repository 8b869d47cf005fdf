"""What can be asked of a drawing beside its prompts, and what is refused: without effect, or against its sense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clipkit.errors import UsageError
from clipkit.guidance.guiders import guidance_interval

DEFAULT_STRENGTH = 0.6
SEEDS = 2**32
"""Seeds that draw different pictures: torch's generator takes 32 bits, and nothing of what is beyond them."""


@dataclass(frozen=True)
class Start:
    """A picture to begin with, [1 or N, 3, S, S] in [-1, 1].

    `strength` in (0, 1] is the share of the training schedule's time at which it begins, noised to that level, as users
    of img2img know it: 1 is pure noise. With `mask` [1, 1, S, S] the picture stays as it is where the mask is 0.
    """

    image: Tensor
    strength: float = DEFAULT_STRENGTH
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.mask is None and self.strength == 1:
            raise UsageError("at strength 1 nothing is left of the picture to begin with; lower it, or give a mask")
        if self.mask is not None and self._drawn.all():
            raise UsageError("the mask is white all over, so that nothing is kept; omit it, or darken a part")
        if self.mask is not None and not self._drawn.any():
            raise UsageError("the mask is black all over, so that nothing is drawn; whiten what is to be drawn")

    @property
    def _drawn(self) -> Tensor:
        assert self.mask is not None
        return self.mask > 0.5

    def kept(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, S, S] with what the mask keeps laid over them, bit for bit."""
        if self.mask is None:
            return pictures
        return torch.where(self._drawn.to(pictures.device), pictures, self.image.to(pictures))


@dataclass(frozen=True)
class GuidanceConfig:
    """How pictures are led to their prompts, beyond the scale of the noise-aware CLIP.

    All but the first are about that CLIP, and refused where its scale is 0.
    """

    cfg_scale: float | None = None
    """Classifier-free guidance, for denoisers that were trained with descriptions; 2 for those, if not given."""
    objective: Literal["softmax", "dot"] | None = None
    """What the noise-aware CLIP maximises: log p of the prompt among captions (if not given), or 100 times the cosine
    (GLIDE)."""
    shift: Literal["score", "mean"] | None = None
    """Where its gradient goes: into the score (if not given), or into each step's mean, as ADM and GLIDE have it, for
    comparison."""
    interval: tuple[float, float] | None = None
    """Lambdas (log SNR) at which it guides; beyond them it costs nothing."""
    picture: Tensor | None = None
    """A picture [1, 3, S, S] in [-1, 1] whose likeness is also wanted."""

    def __post_init__(self) -> None:
        if self.cfg_scale is not None and not 0 <= self.cfg_scale < math.inf:
            raise UsageError(f"the classifier-free scale is {self.cfg_scale}; it must be a finite number, 0 or more")

    @property
    def about(self) -> dict[str, Any]:
        """What of it says how pictures were made, as JSON has it."""
        interval = self.interval and [end if math.isfinite(end) else None for end in self.interval]
        return {"objective": self.objective or "softmax", "shift": self.shift or "score", "interval": interval}

    def check(self, scale: float, levels: Sequence[float]) -> None:
        """Raises UsageError for a scale that is not finite, and for what has no effect at it, or at these lambdas."""
        if not math.isfinite(scale):
            raise UsageError(f"the noise-aware scale is {scale}; it must be a finite number")
        if scale == 0:
            given: dict[str, Any] = {"objective": self.objective, "shift": self.shift, "interval": self.interval}
            given |= {"image prompt": self.picture}
            if unused := [f"the {name}" for name, value in given.items() if value is not None]:
                have = "has" if len(unused) == 1 else "have"
                raise UsageError(
                    f"{' and '.join(unused)} {have} no effect at the noise-aware scale 0; give another scale"
                )
        if self.interval is not None and not any(map(guidance_interval(*self.interval, 1.0), levels)):
            low, high = self.interval
            raise UsageError(
                f"no step lies in the interval {low:g} to {high:g}; they go from {levels[0]:.3g} to {levels[-1]:.3g}"
            )


def check_counts(n: int, steps: int, seed: int) -> None:
    """Raises UsageError for numbers that are out of their range."""
    if n < 1 or steps < 1:
        raise UsageError(f"n is {n} and steps is {steps}; both must be at least 1")
    if not 0 <= seed < SEEDS:
        raise UsageError(f"seed is {seed}; it must be from 0 to {SEEDS - 1}")


def check_prompts(prompts: Mapping[str, float], negative: Sequence[str]) -> None:
    """Raises UsageError for empty prompts, and for weights that have no effect or are not finite."""
    if not prompts or not all(text.strip() for text in [*prompts, *negative]):
        raise UsageError("the prompt is empty; say what to draw")
    for text, weight in prompts.items():
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(f"the weight of {text!r} is {weight:g}; it must be finite and not 0")
    if len(prompts) == 1 and weight != 1:
        raise UsageError(
            f"{text!r} has the weight {weight:g}, but weights are relative among several prompts; the guidance scales "
            "are the strength of one, and negative prompts are what to avoid"
        )


def check_effect(prompts: Mapping[str, float], negative: Sequence[str], scale: float, cfg_scale: float | None) -> None:
    """Raises UsageError where several prompts or negative ones would have no effect, or negative ones be drawn.

    No `cfg_scale`: there is none. A single prompt may have none, as what pictures without guidance are scored by.
    """
    if len(prompts) > 1 and scale == 0 and not cfg_scale:
        where = "the noise-aware scale 0" if cfg_scale is None else "the classifier-free and the noise-aware scale 0"
        raise UsageError(f"{len(prompts)} prompts have no effect at {where}; give a scale above 0, or one prompt")
    if not negative:
        return
    if scale < 0:
        raise UsageError(f"a negative prompt would be drawn at the noise-aware scale {scale:g}; give one above 0")
    if scale == 0 and cfg_scale is None:
        raise UsageError("a negative prompt has no effect at the noise-aware scale 0; give a scale above 0")
    if scale == 0 and cfg_scale is not None and cfg_scale <= 1:
        raise UsageError(
            f"a negative prompt has no effect at the classifier-free scale {cfg_scale:g} and the noise-aware scale 0; "
            "give a classifier-free scale above 1 or a noise-aware scale above 0"
        )
