"""The drawing pipeline: prompts to pictures by a denoiser, guiders and a sampler, scored by a clean CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipkit._version import __version__
from clipkit.data.images import preprocess, to_image, to_signed
from clipkit.errors import UsageError
from clipkit.guidance.components import load_parts
from clipkit.guidance.config import DrawRequest as DrawRequest
from clipkit.guidance.config import GuidanceConfig as GuidanceConfig
from clipkit.guidance.config import Start as Start
from clipkit.guidance.config import check_effect, default_scales
from clipkit.guidance.denoiser import Denoise, Denoiser, clipped
from clipkit.guidance.guider_factories import GuiderContext, make_guider, reads
from clipkit.guidance.guiders import (
    Guider,
    classifier_free,
    conditioned,
    guidance_interval,
    ilvr,
    inpaint,
    mean_shift,
    score_shift,
)
from clipkit.guidance.loading import Guide
from clipkit.guidance.networks.autoencoder import Autoencoder
from clipkit.guidance.networks.condition import TextCondition
from clipkit.guidance.networks.noisy_clip import GuidanceTarget
from clipkit.guidance.samplers import first_noise, generators
from clipkit.guidance.schedule import Spacing, add_noise, log_snr, spaced, until
from clipkit.guidance.targets import text_targets
from clipkit.log import progress
from clipkit.models.clip import CLIP
from clipkit.models.pretrained import Pretrained, fingerprint
from clipkit.models.words import unknown
from clipkit.registry import SAMPLERS

_REFERENCE_UNTIL = 0.0
"""The lambda from which ILVR no longer acts."""


@dataclass(frozen=True)
class Drawn:
    """Pictures: `images` [N, 3, S, S] in [-1, 1] on the CPU, their CLIP scores, and metadata to draw them again."""

    images: Tensor
    scores: list[float]
    about: dict[str, Any]
    x0: list[Tensor]
    """The predicted x0 of each step, pixels or latents."""
    show: Callable[[Tensor], Tensor]
    """x0, pixels or latents -> pictures."""

    @property
    def trajectory(self) -> list[Tensor]:
        """Each step's x0 as pictures [N, 3, S, S] in [-1, 1]."""
        return [self.show(x0) for x0 in self.x0]


class Pipeline:
    """A denoiser, a noise-aware CLIP (optional for conditional denoisers), a clean CLIP and an autoencoder (VAE).

    With an autoencoder the denoiser and the noise-aware CLIP see latents; pictures are pixels in all arguments and
    results.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guide: Guide | None,
        clip: Pretrained,
        autoencoder: Autoencoder | None = None,
        name: str = "",
    ) -> None:
        self.denoiser, self.guide, self.clip, self.autoencoder, self.name = denoiser, guide, clip, autoencoder, name
        self.image_size = denoiser.image_size if autoencoder is None else autoencoder.config.image_size

    @classmethod
    def open(cls, path: str | Path, device: str = "auto") -> Pipeline:
        """Load a denoiser and the networks that it draws with, as `load_parts` finds them. Raises CheckpointError."""
        parts = load_parts(path, device)
        return cls(parts.denoiser, parts.guide, parts.clip, parts.autoencoder, str(path))

    @property
    def scales(self) -> tuple[float, float]:
        """Default scales of the noise-aware CLIP and of classifier-free guidance."""
        return default_scales(self.is_conditional)

    @property
    def is_conditional(self) -> bool:
        """Whether the denoiser was trained with captions or classes."""
        return self.denoiser.conditioner is not None

    def draw(
        self,
        prompt: str | Mapping[str, float] | DrawRequest,
        watch: Callable[[Tensor], None] | None = None,
        **fields: Any,
    ) -> Drawn:
        """Draw pictures of a prompt, of weighted prompts, or of a request; `fields` are the other ones of DrawRequest.

        `watch` is called at each step with the predicted pictures [n, 3, S, S] in [-1, 1]; an exception that it raises
        ends the drawing. Picture i is a function of (seed, i), whatever n is.

        Raises UsageError as DrawRequest does, for more steps than the schedule has levels, for guidance that this model
        does not have, for what would have no effect, and for negative prompts that would be drawn.
        """
        request = DrawRequest.of(prompt, **fields).completed(self.is_conditional)
        lambdas = self._lambdas(request.steps, request.spacing, request.strength)
        weights: dict[str, str] = {}
        denoise = self.guided(request, lambdas, weights)
        x = first_noise((request.n, self.denoiser.channels, *[self.denoiser.image_size] * 2), request.seed)
        x = self._started(x.to(self.device), request, lambdas)

        def show(x0: Tensor) -> Tensor:
            return self._shown(x0) if request.start is None else request.start.kept(self._shown(x0))

        images, trajectory = self._sample(denoise, x, lambdas, request, show, watch)
        about = self._about(request, len(lambdas), weights)
        return Drawn(images, self.score(images, request.prompts), about, trajectory, show)

    def guided(self, request: DrawRequest, lambdas: Tensor, weights: dict[str, str] | None = None) -> Denoise:
        """The denoiser under all guiders of a completed request, for the steps `lambdas`.

        The order, from the network outwards; each guider acts on the x0 that those before it leave:

        1. the prompts, composed, with classifier-free guidance away from the negative prompts (`guidance.cfg_scale`);
        2. classifier guidance by the noise-aware CLIP (`scale`);
        3. `guiders`, in the order in which they are given;
        4. ILVR, towards the coarse shape of `reference`;
        5. clipping of x0 to [-1, 1], for pixels;
        6. inpainting, which keeps a part of `start`.

        `weights` receives the fingerprints of networks that guiders load.
        """
        scale, cfg_scale = request.scale or 0.0, request.guidance.cfg_scale
        request.guidance.check(scale, lambdas.tolist())
        denoise = self.conditional(request.prompts, request.negative, cfg_scale)
        check_effect(request, self.is_conditional, reads(request.guiders))
        if scale:
            denoise = self.noise_aware(request, lambdas)(denoise)
        context = GuiderContext(self, request, lambdas, {} if weights is None else weights)
        for guider in request.guiders:
            denoise = (make_guider(guider, context) if isinstance(guider, str) else guider)(denoise)
        if request.reference is not None:
            denoise = self._ilvr(request.reference, lambdas)(denoise)
        if self.autoencoder is None:
            denoise = clipped(denoise)
        if request.start is not None and request.start.mask is not None:
            kept = self._encoded(request.start.image)
            denoise = inpaint(kept, self._latent_mask(request.start.mask))(denoise)
        return denoise

    def conditional(
        self, prompts: Mapping[str, float], negative: Sequence[str], cfg_scale: float | None = None
    ) -> Denoise:
        """The denoiser under classifier-free guidance; an unconditional denoiser as it is.

        Scale 0 is the unconditional denoiser, 1 the conditional one. Above 1 guidance extrapolates away from the
        negative prompts, or from the unconditional denoiser. Up to 1 it interpolates: there a negative prompt would be
        drawn, and is not used. Raises UsageError for a scale where the denoiser is unconditional.
        """
        if not self.is_conditional:
            if cfg_scale not in (None, 1):  # 1 is the denoiser itself
                raise UsageError("this denoiser was trained without descriptions; omit the classifier-free scale")
            return self.denoiser
        cfg_scale = self.scales[1] if cfg_scale is None else cfg_scale
        if cfg_scale == 0:
            return self.unconditional()
        away = self.unconditional(negative if cfg_scale > 1 else ())
        return classifier_free(away, cfg_scale)(conditioned(self.denoiser, prompts))

    def unconditional(self, negative: Sequence[str] = ()) -> Denoise:
        """The denoiser without its condition, or conditioned on negative prompts."""
        return conditioned(self.denoiser, dict.fromkeys(negative or ("",), 1.0))

    @torch.no_grad()
    def noise_aware(self, request: DrawRequest, lambdas: Tensor) -> Guider:
        """Classifier guidance by the noise-aware CLIP: towards prompts and image prompt, away from negative prompts.

        Raises UsageError without one.
        """
        if self.guide is None:
            raise UsageError("there is no noisy_clip run beside this denoiser to guide it; omit the noise-aware scale")
        guidance, scale = request.guidance, request.scale or 0.0
        log_prob = self.guide.model.log_prob(self._targets(self.guide, request))
        strength = scale if guidance.interval is None else guidance_interval(*guidance.interval, scale)
        if guidance.shift == "mean":
            return mean_shift(log_prob, strength, lambdas)
        return score_shift(log_prob, strength)

    def _targets(self, guide: Guide, request: DrawRequest) -> list[GuidanceTarget]:
        """Targets of the noise-aware CLIP."""
        is_dot = request.guidance.objective == "dot"
        targets = text_targets(guide.embed, guide.negative_captions, request.prompts, request.negative, is_dot)
        if request.guidance.picture is not None:
            clean = torch.full((1,), math.inf, device=self.device)
            features, _ = guide.model.encode_image(self._encoded(request.guidance.picture), clean)
            targets.append(GuidanceTarget(features))
        return targets

    def _ilvr(self, reference: Tensor, lambdas: Tensor) -> Guider:
        """Raises UsageError where no step is noisy enough for it."""
        if lambdas[0] >= _REFERENCE_UNTIL:
            raise UsageError("a reference has no effect at this strength, which keeps the picture's own coarse shape")
        return ilvr(self._encoded(reference), _coarse(self.denoiser.image_size), until=_REFERENCE_UNTIL)

    def _started(self, x: Tensor, request: DrawRequest, lambdas: Tensor) -> Tensor:
        """Noise x, or the initial picture with it (img2img)."""
        start = request.start
        if start is None:
            return x
        if len(start.image) not in (1, request.n):
            raise UsageError(f"{len(start.image)} initial pictures for {request.n} to draw; give one, or as many")
        return add_noise(self._encoded(start.image).expand_as(x), x, lambdas[:1].to(x)) if start.strength < 1 else x

    def _about(self, request: DrawRequest, steps_taken: int, weights: Mapping[str, str]) -> dict[str, Any]:
        """Metadata with which the pictures can be drawn again."""
        prompts, texts = request.prompts, [*request.prompts, *request.negative]
        about: dict[str, Any] = {"prompt": dict(prompts) if len(prompts) > 1 else next(iter(prompts))}
        about |= {"negative": list(request.negative), "seed": request.seed, "n": request.n, "steps": request.steps}
        about |= {"steps_taken": steps_taken, "sampler": request.sampler_name, "spacing": request.spacing_name}
        about |= {"scale": request.scale}
        about |= {"cfg_scale": request.guidance.cfg_scale} if self.is_conditional else {}
        about |= request.guidance.about if request.scale else {}
        about |= {"guiders": request.guider_names} if request.guiders else {}
        about |= {"strength": request.start.strength} if request.start is not None else {}
        about |= {"model": self.name, "weights": {**self.fingerprints, **weights}, "clipkit": __version__}
        return about | {"unknown_words": self.unknown_words(texts), "cut_after": self.cut_after(texts, request.scale)}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the weights of all parts."""
        guide = self.guide.model if self.guide is not None else None
        parts = {
            "denoiser": self.denoiser,
            "noisy_clip": guide,
            "clip": self.clip.model,
            "autoencoder": self.autoencoder,
        }
        return {name: fingerprint(part) for name, part in parts.items() if part is not None}

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """Out-of-vocabulary words: those in no caption that the denoiser, or else its noise-aware CLIP, was trained on.

        None for a denoiser of classes, which refuses an unknown class.
        """
        reader = self.denoiser.conditioner or self.guide
        return unknown(texts, reader.words) if isinstance(reader, TextCondition | Guide) else []

    def cut_after(self, texts: Sequence[str], scale: float | None = None) -> dict[str, str]:
        """Each text that is longer than the text encoders' context at this noise-aware scale -> the last word in it."""
        guide = self.guide if (self.scales[0] if scale is None else scale) else None
        readers = [r for r in (self.denoiser.conditioner, guide) if isinstance(r, TextCondition | Guide)]
        found = {}
        for text in texts if readers else ():
            read = min((reader.tokenizer.fitting(text).split() for reader in readers), key=len)
            if read != text.split():
                found[text] = read[-1] if read else ""
        return found

    def _lambdas(self, steps: int, spacing: str | Spacing, strength: float) -> Tensor:
        """Lambdas of the steps, noisiest first and without repeats, which clamping to the denoiser's range makes."""
        low, high = self.denoiser.lambda_range()
        table = log_snr(self.denoiser.diffusion.schedule).clamp(low, high)
        if strength < 1:
            table, steps = until(table, strength), max(1, math.ceil(round(steps * strength, 6)))
        found = spaced(table, steps, spacing)
        return found[found.diff(prepend=found[:1] - 1) > 0]

    @torch.no_grad()
    def _sample(
        self,
        denoise: Denoise,
        x: Tensor,
        lambdas: Tensor,
        request: DrawRequest,
        show: Callable[[Tensor], Tensor],
        watch: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The pictures, and each step's x0."""
        trajectory: list[Tensor] = []
        bar = iter(progress(range(len(lambdas)), len(lambdas), "drawing"))

        def note(x0: Tensor) -> None:
            trajectory.append(x0.cpu())
            next(bar, None)
            if watch is not None:
                watch(show(x0))

        sampler = SAMPLERS[request.sampler] if isinstance(request.sampler, str) else request.sampler
        images = show(sampler(denoise, x, lambdas, generators(request.n, request.seed), note))
        next(bar, None)
        if not images.isfinite().all():
            raise UsageError("the pictures came out as NaN; lower the guidance scales")
        return images, trajectory

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def _encoded(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, S, S] in [-1, 1] -> themselves, or their latents. Raises UsageError for another shape."""
        if pictures.shape[1:] != (3, self.image_size, self.image_size):
            raise UsageError(f"a picture is {list(pictures.shape)}; it must be [N, 3, S, S] with S = {self.image_size}")
        pictures = pictures.to(self.device)
        return pictures if self.autoencoder is None else self.autoencoder.encode(pictures)

    @torch.no_grad()
    def _shown(self, x0: Tensor) -> Tensor:
        """x0, pixels or latents -> pictures [N, 3, S, S] in [-1, 1], on the CPU."""
        if self.autoencoder is None:
            return x0.cpu()
        pictures = self.autoencoder.decode(x0.to(next(self.autoencoder.parameters()).device))
        return pictures.clamp(-1, 1).float().cpu()

    def _latent_mask(self, mask: Tensor) -> Tensor:
        """A mask [1, 1, S, S] in the denoiser's size: a latent is drawn if any of its pixels is."""
        return mask if self.autoencoder is None else F.max_pool2d(mask, self.autoencoder.config.factor)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Mapping[str, float]) -> list[float]:
        """Cosine similarity of each picture to the prompts under the clean CLIP, the mean by their weights."""
        model: CLIP = self.clip.model
        device = model.log_logit_scale.device
        pixels = torch.stack([self.clip.preprocess(to_image(image)) for image in images]).to(device)
        texts = model.encode_text(self.clip.tokenizer(list(prompts)))
        weights = torch.tensor(list(prompts.values()), device=device)
        scores = model.encode_image(pixels) @ texts.T @ (weights / weights.abs().sum())
        return [round(s, 4) for s in scores.tolist()]


def _coarse(size: int) -> int:
    """Side of the blocks that ILVR averages: an eighth of the picture's side, or the next smaller divisor of it."""
    factor = max(1, size // 8)
    while size % factor:
        factor -= 1
    return factor


def picture(image: Image.Image, size: int) -> Tensor:
    """The middle square of an image, resized: [1, 3, size, size] in [-1, 1]."""
    return to_signed(preprocess(image, size)[None])
