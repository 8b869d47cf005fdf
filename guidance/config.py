"""A drawing's request: prompts, guidance, sampler, img2img and inpainting; refused where an option has no effect."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipkit.errors import UsageError, shown
from clipkit.guidance.choices import Objective, Shift
from clipkit.guidance.guiders import Guider, guidance_interval
from clipkit.guidance.samplers import Sampler
from clipkit.guidance.schedule import Spacing
from clipkit.registry import GUIDERS, SAMPLERS, SPACINGS, Registry

DEFAULT_SCALE = 10.0
"""Of the noise-aware CLIP, for unconditional denoisers."""
DEFAULT_CFG_SCALE = 2.0
DEFAULT_STRENGTH = 0.6
SEEDS = 2**32
"""Number of different seeds: torch's generator uses 32 bits."""


@dataclass(frozen=True)
class Start:
    """Img2img and inpainting: an initial picture [1 or N, 3, S, S] in [-1, 1].

    Sampling starts from the picture noised to the level at `strength` in (0, 1] of the training schedule's time; 1 is
    pure noise. With `mask` [1, 1, S, S] the picture is kept where the mask is 0 (inpainting).

    Raises UsageError for another strength, and for a start of which nothing or everything is kept.
    """

    image: Tensor
    strength: float = DEFAULT_STRENGTH
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.mask is None and self.strength == 1:
            raise UsageError("at strength 1 nothing is left of the initial picture; lower it, or give a mask")
        if self.mask is not None and self._drawn.all():
            raise UsageError("the mask is white all over, so that nothing is kept; omit it, or darken a part")
        if self.mask is not None and not self._drawn.any():
            raise UsageError("the mask is black all over, so that nothing is drawn; whiten what is to be drawn")

    @property
    def _drawn(self) -> Tensor:
        assert self.mask is not None
        return self.mask > 0.5

    def kept(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, S, S] with the kept part of the initial picture pasted in, bit for bit."""
        if self.mask is None:
            return pictures
        return torch.where(self._drawn.to(pictures.device), pictures, self.image.to(pictures))


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance, and classifier guidance by the noise-aware CLIP beyond its scale.

    All fields but the first belong to the noise-aware CLIP, and are refused where its scale is 0. Raises UsageError for
    a classifier-free scale below 0 or not finite.
    """

    cfg_scale: float | None = None
    """Scale of classifier-free guidance, for conditional denoisers. Default: 2; 1 beside other guiders."""
    objective: Objective | None = None
    """Objective of the noise-aware CLIP: log p of the prompt among negative captions (default), or 100 times the cosine
    similarity (GLIDE)."""
    shift: Shift | None = None
    """Target of its gradient: the score (default), or each step's mean, as in ADM and GLIDE."""
    interval: tuple[float, float] | None = None
    """Interval of lambda (log SNR) in which it guides (Kynkaanniemi et al. 2024)."""
    picture: Tensor | None = None
    """An image prompt [1, 3, S, S] in [-1, 1], whose similarity is maximised too."""

    def __post_init__(self) -> None:
        if self.cfg_scale is not None and not 0 <= self.cfg_scale < math.inf:
            raise UsageError(f"the classifier-free scale is {self.cfg_scale}; it must be a finite number, 0 or more")

    @property
    def about(self) -> dict[str, Any]:
        """The noise-aware CLIP's settings for a picture's metadata, JSON values."""
        interval = self.interval and [end if math.isfinite(end) else None for end in self.interval]
        return {"objective": self.objective or "softmax", "shift": self.shift or "score", "interval": interval}

    def check(self, scale: float, levels: Sequence[float]) -> None:
        """Raises UsageError for a noise-aware scale that is not finite, and for settings without effect at it."""
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


@dataclass(frozen=True)
class DrawRequest:
    """A drawing, for `Pipeline.draw`, the command line and the app.

    Raises UsageError for an empty prompt, weights without effect or not finite, n or steps below 1, a seed out of
    range, an unknown sampler or spacing, and a value of another type in their place, in `negative` or in `guiders`.
    """

    prompts: Mapping[str, float]
    """Prompts with their weights."""
    negative: Sequence[str] = ()
    """Negative prompts."""
    n: int = 16
    """Number of pictures."""
    steps: int = 25
    """Sampler steps; with `start`, its strength's share of them is taken, rounded up."""
    sampler: str | Sampler = "dpmpp-2m"
    """A name of clipkit.registry.SAMPLERS, or a sampler."""
    spacing: str | Spacing = ""
    """A name of clipkit.registry.SPACINGS, or a spacing. Default: the sampler's (its attribute `spacing`)."""
    seed: int = 0
    """Picture i is a function of (seed, i), whatever n is."""
    scale: float | None = None
    """Scale of the noise-aware CLIP. Default: 10 for unconditional denoisers; 0 for conditional ones, and beside other
    guiders."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance, and settings of the noise-aware CLIP."""
    guiders: Sequence[str | Guider] = ()
    """Further guiders, the innermost first: "NAME:key=value,..." of clipkit.registry.GUIDERS, or objects."""
    start: Start | None = None
    """Img2img and inpainting."""
    reference: Tensor | None = None
    """A picture [1, 3, S, S] in [-1, 1] whose coarse shape is kept (ILVR)."""

    def __post_init__(self) -> None:
        for name in ("negative", "guiders"):
            check_list(name, getattr(self, name))
        check_prompts(self.prompts, self.negative)
        if self.n < 1 or self.steps < 1:
            raise UsageError(f"n is {self.n} and steps is {self.steps}; both must be at least 1")
        if not 0 <= self.seed < SEEDS:
            raise UsageError(f"seed is {self.seed}; it must be from 0 to {SEEDS - 1}")
        check_named(SAMPLERS, self.sampler)
        if self.spacing != "":
            check_named(SPACINGS, self.spacing)
        for guider in self.guiders:
            check_named(GUIDERS, guider.partition(":")[0] if isinstance(guider, str) else guider)

    @classmethod
    def of(cls, prompt: str | Mapping[str, float] | DrawRequest, **fields: Any) -> DrawRequest:
        """A request from a prompt, weighted prompts or another request, and the other fields."""
        if "steering" in fields:
            warnings.warn("draw(steering=...) is now draw(guidance=...)", DeprecationWarning, stacklevel=3)
            fields["guidance"] = fields.pop("steering")
        fields = {name: value for name, value in fields.items() if value is not None}
        if isinstance(prompt, DrawRequest):
            return replace(prompt, **fields)
        return cls({prompt: 1.0} if isinstance(prompt, str) else dict(prompt), **fields)

    @property
    def sampler_name(self) -> str:
        """The sampler's name, or that of the function, also inside a functools.partial."""
        return _name(self.sampler)

    @property
    def spacing_name(self) -> str:
        """The spacing's name, or that of the function; "" is the default."""
        return _name(self.spacing)

    @property
    def default_spacing(self) -> str:
        """The spacing that the sampler declares, "karras" if none."""
        return str(self._declared("spacing", "karras"))

    @property
    def renoises(self) -> bool:
        """Whether the sampler declares that it adds the noise `Prediction.renoise`."""
        return bool(self._declared("renoises", False))

    def _declared(self, name: str, default: Any) -> Any:
        """The sampler's attribute, also inside a functools.partial."""
        sampler = SAMPLERS[self.sampler] if isinstance(self.sampler, str) else self.sampler
        return getattr(getattr(sampler, "func", sampler), name, default)

    @property
    def strength(self) -> float:
        """The share of the schedule's time at which sampling starts."""
        return 1.0 if self.start is None else self.start.strength

    @property
    def guider_names(self) -> list[str]:
        """The guiders as they were given, or the names of the objects."""
        return [g if isinstance(g, str) else str(getattr(g, "__qualname__", type(g).__name__)) for g in self.guiders]

    def completed(self, is_conditional: bool) -> DrawRequest:
        """With the defaults that depend on the denoiser: scales and spacing.

        With `guiders`, nothing else guides unless its scale is given: classifier-free scale 1, noise-aware scale 0.
        """
        scale, cfg_scale = default_scales(is_conditional)
        if self.guiders:
            scale, cfg_scale = 0.0, 1.0
        guidance = self.guidance
        if is_conditional and guidance.cfg_scale is None:
            guidance = replace(guidance, cfg_scale=cfg_scale)
        return replace(
            self,
            scale=scale if self.scale is None else self.scale,
            spacing=self.spacing or self.default_spacing,
            guidance=guidance,
        )


def default_scales(is_conditional: bool) -> tuple[float, float]:
    """Default scales of the noise-aware CLIP and of classifier-free guidance."""
    return (0.0, DEFAULT_CFG_SCALE) if is_conditional else (DEFAULT_SCALE, 1.0)


def _name(given: Any) -> str:
    """A name as it is, or that of a function, also inside a functools.partial, or of an object's class."""
    if isinstance(given, str):
        return given
    return str(getattr(getattr(given, "func", given), "__name__", type(given).__name__))


def check_list(name: str, given: Any) -> None:
    """Raises UsageError unless `given` is a list or another sequence, and no text."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UsageError(f"{name} is {shown(repr(given))}; it must be a list, such as [{shown(repr(given))}]")


def check_named(registry: Registry[Any], given: Any) -> None:
    """Raises UsageError unless `given` is a name in the registry or a function."""
    if isinstance(given, str):
        registry.entry(given)
    elif not callable(given):
        raise UsageError(f"{registry.noun} is {shown(repr(given))}; it must be a name or a function")


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


def check_effect(request: DrawRequest, is_conditional: bool, reads: Collection[str]) -> None:
    """Raises UsageError where several prompts or negative prompts have no effect, or negative prompts would be drawn.

    `reads` are the fields of the request that its guiders declare. Several prompts are accepted with any guider; a
    single prompt may be without effect: unguided pictures are scored with it.
    """
    scale = request.scale or 0.0
    cfg_scale = request.guidance.cfg_scale if is_conditional else None
    count = len(request.prompts)
    if count > 1 and scale == 0 and not cfg_scale and not request.guiders:
        where = "the noise-aware scale 0" if cfg_scale is None else "the classifier-free and the noise-aware scale 0"
        raise UsageError(f"{count} prompts have no effect at {where}; give a scale above 0, or one prompt")
    if not request.negative:
        return
    if scale < 0:
        raise UsageError(f"a negative prompt would be drawn at the noise-aware scale {scale:g}; give one above 0")
    if scale > 0 or "negative" in reads:
        return
    if cfg_scale is None:
        raise UsageError("a negative prompt has no effect at the noise-aware scale 0; give a scale above 0")
    if cfg_scale <= 1:
        raise UsageError(
            f"a negative prompt has no effect at the classifier-free scale {cfg_scale:g} and the noise-aware scale 0; "
            "give a classifier-free scale above 1 or a noise-aware scale above 0"
        )
