"""From a prompt to pictures: a denoiser steered by a noise-aware CLIP, scored by a clean one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipkit._version import __version__
from clipkit.data.images import preprocess, to_image, to_signed
from clipkit.errors import UsageError, did_you_mean
from clipkit.guidance import samplers
from clipkit.guidance.components import load_parts
from clipkit.guidance.config import GuidanceConfig as GuidanceConfig
from clipkit.guidance.config import Start as Start
from clipkit.guidance.config import check_counts, check_effect, check_prompts
from clipkit.guidance.denoiser import Denoise, Denoiser, clipped
from clipkit.guidance.guiders import classifier_free, compose, guidance_interval, ilvr, inpaint, mean_shift, score_shift
from clipkit.guidance.loading import Guide
from clipkit.guidance.networks.autoencoder import Autoencoder
from clipkit.guidance.networks.condition import TextCondition
from clipkit.guidance.networks.noisy_clip import GuidanceTarget
from clipkit.guidance.samplers import first_noise, generators
from clipkit.guidance.schedule import Spacing, add_noise, karras, log_snr, spaced, until
from clipkit.log import progress
from clipkit.models.clip import CLIP
from clipkit.models.pretrained import Pretrained, fingerprint
from clipkit.models.words import EMPTY, split, unknown

SAMPLERS: dict[str, samplers.Sampler] = {
    "dpmpp-2m": samplers.dpmpp_2m,
    "dpmpp-2m-sde": samplers.dpmpp_2m_sde,
    "dpmpp-2s": samplers.dpmpp_2s,
    "heun": samplers.heun,
    "unipc": samplers.unipc,
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
}
SPACINGS = ("karras", "linspace", "leading", "trailing")
DEFAULT_SCALE = 10.0
DEFAULT_CFG_SCALE = 2.0
_REFERENCE_UNTIL = 0.0
"""The lambda at which a reference has had its say."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of one prompt: `images` [N, 3, S, S] in [-1, 1], CLIP scores, and how they were made."""

    images: Tensor
    scores: list[float]
    about: dict[str, Any]
    x0: list[Tensor]
    """What the denoiser took for the image at each step, pixels or latents."""
    show: Callable[[Tensor], Tensor]
    """Such an x0 -> pictures."""

    @property
    def trajectory(self) -> list[Tensor]:
        """Each step's x0 as pictures [N, 3, S, S] in [-1, 1]."""
        return [self.show(x0) for x0 in self.x0]


class Pipeline:
    """A denoiser, a noise-aware CLIP (or none, if the denoiser takes descriptions) and a clean CLIP.

    With an autoencoder the first two see latents; pictures come in and go out as pixels all the same.
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
        """Load a denoiser with what belongs to it, as `load_parts` finds them. Raises CheckpointError."""
        parts = load_parts(path, device)
        return cls(parts.denoiser, parts.guide, parts.clip, parts.autoencoder, str(path))

    @property
    def scales(self) -> tuple[float, float]:
        """What is taken where nothing is said: the noise-aware CLIP's scale, and the classifier-free one."""
        return (DEFAULT_SCALE, 1.0) if self.denoiser.conditioner is None else (0.0, DEFAULT_CFG_SCALE)

    def draw(
        self,
        prompt: str | Mapping[str, float],
        n: int = 16,
        steps: int = 25,
        scale: float | None = None,
        sampler: str = "dpmpp-2m",
        negative: Sequence[str] = (),
        seed: int = 0,
        spacing: str = "",
        start: Start | None = None,
        reference: Tensor | None = None,
        guidance: GuidanceConfig | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Drawn:
        """Draw `n` pictures of `prompt`, a text or several with their weights, in `steps` steps.

        The guide maximises log p(prompt | x_t) among the caption bank, and log p(none of `negative` | x_t), each times
        `scale`: 10, or 0 if the denoiser takes descriptions. `reference` [1, 3, S, S] in [-1, 1] gives the coarse
        shape. `spacing` of the steps is by default "karras", "linspace" for ddim and ddpm. `watch` is called with what
        the pictures are taken for, [n, 3, S, S] in [-1, 1], at each step; what it raises ends the drawing. Picture i is
        a function of (seed, i), whatever n is. With `start`, its share of the steps is taken, rounded up.

        Raises UsageError for an empty prompt, n or steps below 1, more steps than the schedule has levels, an unknown
        sampler or spacing, guidance that this model does not have, numbers that are not finite, and whatever would have
        no effect, or draw what it should avoid.
        """
        prompts, guidance = {prompt: 1.0} if isinstance(prompt, str) else dict(prompt), guidance or GuidanceConfig()
        check_prompts(prompts, negative)
        check_counts(n, steps, seed)
        if sampler not in SAMPLERS:
            raise UsageError(f"unknown sampler {sampler!r}; {did_you_mean(sampler, SAMPLERS)}")
        spacing = spacing or ("linspace" if sampler in ("ddim", "ddpm") else "karras")
        usual, usual_cfg = self.scales
        scale = usual if scale is None else scale
        is_told = self.denoiser.conditioner is not None
        cfg_scale = usual_cfg if guidance.cfg_scale is None and is_told else guidance.cfg_scale
        lambdas = self._lambdas(steps, spacing, start.strength if start is not None else 1.0)
        guidance.check(scale, lambdas.tolist())
        denoise = self.conditional(prompts, negative, cfg_scale)
        check_effect(prompts, negative, scale, cfg_scale if is_told else None)
        denoise = self.guided(denoise, prompts, negative, scale, guidance, lambdas)
        if reference is not None:
            if lambdas[0] >= _REFERENCE_UNTIL:
                raise UsageError(
                    "a reference has no effect at this strength, which keeps the picture's own coarse shape"
                )
            coarse = _coarse(self.denoiser.image_size)
            denoise = ilvr(self._seen(reference), factor=coarse, until=_REFERENCE_UNTIL)(denoise)
        if self.autoencoder is None:
            denoise = clipped(denoise)
        x = first_noise((n, self.denoiser.channels, *[self.denoiser.image_size] * 2), seed).to(self._device)
        if start is not None:
            begun, drawn = self._seen(start.image), self._coarser(start.mask)
            if len(begun) not in (1, n):
                raise UsageError(f"{len(begun)} pictures to begin with, for {n} to draw; give one, or as many")
            x = add_noise(begun.expand_as(x), x, lambdas[:1].to(x)) if start.strength < 1 else x
            denoise = inpaint(begun, drawn)(denoise) if drawn is not None else denoise

        def show(x0: Tensor) -> Tensor:
            return self._shown(x0) if start is None else start.kept(self._shown(x0))

        images, trajectory = self._sample(denoise, x, lambdas, sampler, generators(n, seed), show, watch)
        about: dict[str, Any] = {"prompt": prompts if len(prompts) > 1 else next(iter(prompts))}
        about |= {"negative": list(negative), "seed": seed, "n": n, "steps": steps, "steps_taken": len(lambdas)}
        about |= {"sampler": sampler, "spacing": spacing, "scale": scale}
        about |= {"cfg_scale": cfg_scale} if is_told else {}
        about |= guidance.about if scale else {}
        about |= {"strength": start.strength} if start is not None else {}
        about |= {"model": self.name, "weights": self.fingerprints, "clipkit": __version__}
        texts = [*prompts, *negative]
        about |= {"unknown_words": self.unknown_words(texts), "cut_after": self.cut_after(texts, scale)}
        return Drawn(images, self.score(images, prompts), about, trajectory, show)

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
        """Words of prompts that no caption had from which the denoiser, or else its guide, learned what words mean.

        None for a denoiser of classes, which refuses what is not a class.
        """
        reader = self.denoiser.conditioner or self.guide
        return unknown(texts, reader.words) if isinstance(reader, TextCondition | Guide) else []

    def cut_after(self, texts: Sequence[str], scale: float | None = None) -> dict[str, str]:
        """Of each text that is longer than what is read of it at this noise-aware scale, the last word that is read."""
        guide = self.guide if (self.scales[0] if scale is None else scale) else None
        readers = [r for r in (self.denoiser.conditioner, guide) if isinstance(r, TextCondition | Guide)]
        found = {}
        for text in texts if readers else ():
            read = min((reader.tokenizer.fitting(text).split() for reader in readers), key=len)
            if read != text.split():
                found[text] = read[-1] if read else ""
        return found

    def conditional(
        self, prompts: Mapping[str, float], negative: Sequence[str], cfg_scale: float | None = None
    ) -> Denoise:
        """The denoiser by classifier-free guidance, above scale 1 away from `negative`, or from what it draws untold.

        At scale 0 it is the untold denoiser itself, and up to 1 a mixture of told and untold: there a negative prompt
        would be drawn rather than avoided. Raises UsageError for a scale where the denoiser takes no descriptions.
        """
        if self.denoiser.conditioner is None:
            if cfg_scale not in (None, 1):  # 1 is the denoiser itself
                raise UsageError("this denoiser was trained without descriptions; omit the classifier-free scale")
            return self.denoiser
        cfg_scale = self.scales[1] if cfg_scale is None else cfg_scale
        if cfg_scale == 0:
            return self.denoiser.conditioned_on("")
        wanted = compose({self.denoiser.conditioned_on(text): weight for text, weight in prompts.items()})
        avoided = negative if cfg_scale > 1 else ()
        away = compose({self.denoiser.conditioned_on(text): 1.0 for text in avoided or [""]})
        return classifier_free(away, cfg_scale)(wanted)

    @torch.no_grad()
    def guided(
        self,
        denoise: Denoise,
        prompts: Mapping[str, float],
        negative: Sequence[str],
        scale: float,
        guidance: GuidanceConfig,
        lambdas: Tensor,
    ) -> Denoise:
        """`denoise` under the noise-aware CLIP: towards `prompts` and a picture, away from each of `negative`."""
        if scale == 0:
            return denoise
        if self.guide is None:
            raise UsageError("there is no noisy_clip run beside this denoiser to guide it; omit the noise-aware scale")
        log_prob = self.guide.model.log_prob(self.targets(prompts, negative, guidance))
        strength = scale if guidance.interval is None else guidance_interval(*guidance.interval, scale)
        if guidance.shift == "mean":
            return mean_shift(log_prob, strength, lambdas)(denoise)
        return score_shift(log_prob, strength)(denoise)

    def targets(
        self, prompts: Mapping[str, float], negative: Sequence[str], guidance: GuidanceConfig
    ) -> list[GuidanceTarget]:
        """What the noise-aware CLIP is to look for."""
        assert self.guide is not None
        guide, found = self.guide, []
        for text, weight in prompts.items():
            wanted, others = guide.embed([text]), guide.embed([*alternatives(text, guide.negative_captions), *negative])
            found.append(GuidanceTarget(wanted, None if guidance.objective == "dot" else others, weight))
            if negative and guidance.objective != "dot":
                welcome = torch.cat([wanted, others[: -len(negative)]])
                found.append(GuidanceTarget(welcome, guide.embed(negative), weight))
        if negative and guidance.objective == "dot":
            found += [GuidanceTarget(guide.embed([text]), None, -1.0) for text in negative]
        if guidance.picture is not None:
            device = next(guide.model.parameters()).device
            clean = torch.full((1,), math.inf, device=device)
            likeness, _ = guide.model.encode_image(self._seen(guidance.picture), clean)
            found.append(GuidanceTarget(likeness))
        return found

    def _lambdas(self, steps: int, spacing: str, strength: float) -> Tensor:
        """The levels of the steps, noisiest first, each once: a schedule's that are clamped to a range may be equal."""
        low, high = self.denoiser.lambda_range()
        table = log_snr(self.denoiser.diffusion.schedule).clamp(low, high)
        if strength < 1:
            table, steps = until(table, strength), max(1, math.ceil(round(steps * strength, 6)))
        if spacing not in SPACINGS:
            raise UsageError(f"unknown spacing {spacing!r}; {did_you_mean(spacing, SPACINGS)}")
        if spacing == "karras":
            found = karras(float(table[-1]), high, steps)
        else:
            found = spaced(table, steps, cast(Spacing, spacing))
        return found[found.diff(prepend=found[:1] - 1) > 0]

    @torch.no_grad()
    def _sample(
        self,
        denoise: Denoise,
        x: Tensor,
        lambdas: Tensor,
        sampler: str,
        noise: Sequence[torch.Generator],
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

        images = show(SAMPLERS[sampler](denoise, x, lambdas, noise, note))
        next(bar, None)
        if not images.isfinite().all():
            raise UsageError("the pictures came out as NaN; lower the guidance scales")
        return images, trajectory

    @property
    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def _seen(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, S, S] in [-1, 1] -> what the denoiser sees of them."""
        if pictures.shape[1:] != (3, self.image_size, self.image_size):
            raise UsageError(f"a picture is {list(pictures.shape)}; it must be [N, 3, S, S] with S = {self.image_size}")
        pictures = pictures.to(self._device)
        return pictures if self.autoencoder is None else self.autoencoder.encode(pictures)

    @torch.no_grad()
    def _shown(self, x0: Tensor) -> Tensor:
        """What the denoiser makes -> pictures [N, 3, S, S] in [-1, 1], on the CPU."""
        if self.autoencoder is None:
            return x0.cpu()
        pictures = self.autoencoder.decode(x0.to(next(self.autoencoder.parameters()).device))
        return pictures.clamp(-1, 1).float().cpu()

    def _coarser(self, mask: Tensor | None) -> Tensor | None:
        """A mask [1, 1, S, S] at the size that the denoiser sees: drawn anew is every place that is so in part."""
        return mask if mask is None or self.autoencoder is None else F.max_pool2d(mask, self.autoencoder.config.factor)

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
    """Pixels that a reference is averaged over: an eighth of the side, or the largest power of two that divides it."""
    factor = max(1, size // 8)
    while size % factor:
        factor -= 1
    return factor


def picture(image: Image.Image, size: int) -> Tensor:
    """An image as the denoiser sees one: its middle, [1, 3, size, size] in [-1, 1]."""
    return to_signed(preprocess(image, size)[None])


def alternatives(prompt: str, captions: Sequence[str]) -> list[str]:
    """The captions that lack a word of the prompt, but for words that say nothing of what is in a picture.

    "a picture of a red rocket." is no alternative to "a rocket" but a case of it, and must not be pushed away from.
    """
    wanted = _words(prompt)
    return [c for c in captions if not wanted <= _words(c)]


def _words(text: str) -> set[str]:
    return set(split(text)) - EMPTY
