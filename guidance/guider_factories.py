"""Guiders by name: autoguidance, CFG++ and universal guidance, as factories for `--guider NAME:key=value,...`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.data.images import to_unit
from clipkit.errors import UsageError, did_you_mean, shown
from clipkit.guidance.guiders import Guider, GuiderFactory, classifier_free, conditioned, through_x0
from clipkit.guidance.loading import load_denoiser
from clipkit.guidance.targets import text_targets
from clipkit.models.pretrained import fingerprint
from clipkit.registry import GUIDERS, declares

if TYPE_CHECKING:
    from clipkit.guidance.config import DrawRequest
    from clipkit.guidance.pipeline import Pipeline


@dataclass(frozen=True)
class GuiderContext:
    """The drawing for which a factory makes a guider."""

    pipeline: Pipeline
    request: DrawRequest
    """With the default scales filled in."""
    lambdas: Tensor
    """Of the steps, noisiest first, float64 [steps]."""
    weights: dict[str, str] = field(default_factory=dict)
    """A factory adds the fingerprints of the networks that it loads; the pictures' metadata keep them."""


def make_guider(text: str, context: GuiderContext) -> Guider:
    """The guider of "NAME" or "NAME:key=value,...".

    Raises UsageError for an unknown name or key, a value of another type, a missing one, and a factory that returns no
    guider.
    """
    name, _, values = text.partition(":")
    factory = GUIDERS[name]
    guider = factory(context, **_parameters(name, factory, values))
    if not callable(guider):
        raise UsageError(f"the factory of guider {name!r} returned {shown(repr(guider))}; it must return a guider")
    return guider


def reads(guiders: Sequence[str | Guider]) -> frozenset[str]:
    """Fields of the request that guiders declare by their attribute `reads`, on the factory of a named one.

    Raises UsageError for an unknown name.
    """
    declaring = [GUIDERS[g.partition(":")[0]] if isinstance(g, str) else g for g in guiders]
    return frozenset(field for g in declaring for field in getattr(g, "reads", ()))


def _parameters(name: str, factory: GuiderFactory, text: str) -> dict[str, Any]:
    """ "key=value,..." -> keyword arguments, with the types of the factory's signature.

    The parameters that a keyword can give, after the context, are the keys.
    """
    after_context = list(inspect.signature(factory).parameters.items())[1:]
    known = {key: p for key, p in after_context if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not equals:
            raise UsageError(f"guider {name!r}: {shown(pair)!r} is not key=value")
        if key not in known:
            hint = did_you_mean(key, known) if known else "it has none"
            raise UsageError(f"guider {name!r} has no parameter {shown(key)!r}; {hint}")
        if key in found:
            raise UsageError(f"guider {name!r}: {key} is given twice; give it once")
        found[key] = _value(f"guider {name!r}: {key}", known[key].annotation, value)
    missing = [key for key, p in known.items() if p.default is p.empty and key not in found]
    if missing:
        raise UsageError(f"guider {name!r} needs {missing[0]}; write {name}:{missing[0]}=...")
    return found


def _value(what: str, kind: Any, text: str) -> Any:
    """The text as a str, int, float or bool. `kind` is the type or its name (PEP 563)."""
    kind = getattr(kind, "__name__", kind)
    if kind not in _READERS:
        raise UsageError(f"{what} cannot be given as a text; use the guider from Python")
    try:
        return _READERS[kind](text)
    except ValueError:
        raise UsageError(f"{what} is {shown(text)!r}; it must be {_NAMES[kind]}") from None


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


_READERS: Mapping[Any, Callable[[str], Any]] = {"str": str, "int": int, "float": _number, "bool": _flag}
_NAMES = {"int": "a whole number", "float": "a finite number", "bool": "true or false"}


def autoguidance(context: GuiderContext, *, guide: str, scale: float = 2.0) -> Guider:
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507, equation 3): extrapolate from a weaker denoiser.

    `guide` is the weaker denoiser's run: a smaller network, or one trained for fewer steps, on the same data. If it is
    conditional, it gets the same prompts. Raises CheckpointError for a run that cannot be read, and UsageError for one
    of another shape, for the denoiser itself, and for a scale that is not above 1.
    """
    pipeline = context.pipeline
    if not guide:
        raise UsageError("autoguidance: guide is empty; give the run of a weaker denoiser")
    if not 1 < scale < math.inf:
        raise UsageError(f"the scale of autoguidance is {scale:g}; it must be above 1 and finite")
    weak, strong = load_denoiser(guide).to(pipeline.device), pipeline.denoiser
    shapes = [(d.channels, d.image_size, d.latent_channels > 0) for d in (weak, strong)]
    if shapes[0] != shapes[1]:
        kinds = [f"{'latents' if latent else 'pixels'} {c} x {size} x {size}" for c, size, latent in shapes]
        raise UsageError(
            f"the weaker denoiser {guide} draws {kinds[0]}, this one {kinds[1]}; train it on the same data"
        )
    weights = fingerprint(weak)
    if weights == pipeline.fingerprints["denoiser"]:
        raise UsageError(f"autoguidance has no effect: {guide} is the denoiser itself; give a weaker one")
    context.weights[f"autoguidance:guide={guide}"] = weights
    return classifier_free(conditioned(weak, context.request.prompts), scale)


@declares(reads={"negative"})
def cfg_plus_plus(context: GuiderContext, *, scale: float = 0.6) -> Guider:
    """CFG++ (Chung et al. 2024, arXiv 2406.08070, algorithm 2): interpolate x0, renoise with the unconditional noise.

    A negative prompt takes the place of the empty one. Raises UsageError for an unconditional denoiser, a sampler that
    does not declare `renoises`, another scale than in (0, 1], and a classifier-free scale beside it.
    """
    pipeline, request = context.pipeline, context.request
    if pipeline.denoiser.conditioner is None:
        raise UsageError("cfg++ needs a conditional denoiser, and this one was trained without descriptions")
    if not request.renoises:
        raise UsageError(f"cfg++ needs a sampler that renoises, and {request.sampler_name} does not; use ddim")
    if not 0 < scale <= 1:
        raise UsageError(f"the scale of cfg++ is {scale:g}; it must be above 0 and at most 1")
    if request.guidance.cfg_scale != 1:
        raise UsageError("cfg++ takes the place of classifier-free guidance; omit the classifier-free scale")
    return classifier_free(pipeline.unconditional(request.negative), scale, renoise=True)


@declares(reads={"negative"})
def universal(context: GuiderContext, *, scale: float = 10.0, cutouts: int = 0) -> Guider:
    """Universal guidance (Bansal et al. 2023, arXiv 2302.07121, equation 6): the clean CLIP's gradient through x0.

    `cutouts` is the number of random crops that it is averaged over (Crowson 2021); 0 is the whole picture. Raises
    UsageError for scale 0 and for cutouts below 0.
    """
    if scale == 0:
        raise UsageError("universal guidance has no effect at scale 0; give another scale")
    if cutouts < 0:
        raise UsageError(f"universal guidance: cutouts is {cutouts}; it must be at least 0")
    request = context.request
    log_prob = clean_log_prob(context.pipeline, request.prompts, request.negative)
    return through_x0(log_prob, scale, cutouts, request.seed)


def clean_log_prob(
    pipeline: Pipeline, prompts: Mapping[str, float], negative: Sequence[str] = ()
) -> Callable[[Tensor], Tensor]:
    """log p(prompts | x0) under the clean CLIP, among the negative captions of the noise-aware one: x0 [B, ...] -> [B].

    Without a noise-aware CLIP, 100 times the cosine similarity. Latents are decoded.
    """
    model, tokenizer, autoencoder = pipeline.clip.model, pipeline.clip.tokenizer, pipeline.autoencoder
    captions = pipeline.guide.negative_captions if pipeline.guide is not None else ()
    with torch.no_grad():
        targets = text_targets(
            lambda texts: model.encode_text(tokenizer(list(texts))), captions, prompts, negative, dot=not captions
        )
    size = model.config.image_size

    def log_p(x0: Tensor) -> Tensor:
        images = x0 if autoencoder is None else autoencoder.decode(x0)
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear")
        features = F.normalize(model.image(to_unit(images)).float(), dim=-1)
        tau = model.logit_scale.expand(len(images))
        return torch.stack([target.weight * target.log_prob(features, tau) for target in targets]).sum(dim=0)

    return log_p
