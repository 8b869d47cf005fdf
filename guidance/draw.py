"""From a prompt to pictures: a denoiser steered by a noise-aware CLIP, scored by a clean one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipkit._version import __version__
from clipkit.errors import UsageError, did_you_mean
from clipkit.guidance import samplers
from clipkit.guidance.autoencoder import Autoencoder
from clipkit.guidance.condition import TextCondition, split
from clipkit.guidance.denoiser import Denoise, Denoiser, clipped
from clipkit.guidance.guiders import between, contrast, inpaint, like, mean_shift, mixed, score_shift
from clipkit.guidance.loading import Guide
from clipkit.guidance.noisy_clip import Wish
from clipkit.guidance.parts import load_parts
from clipkit.guidance.schedule import Spacing, add_noise, karras, log_snr, spaced
from clipkit.images import preprocess, to_image
from clipkit.model import CLIP
from clipkit.pretrained import Pretrained
from clipkit.records import progress

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


@dataclass(frozen=True)
class Start:
    """A picture to begin with, [1 or N, 3, S, S] in [-1, 1].

    With `mask` [1, 1, S, S] it stays where the mask is 0. `strength` in (0, 1] is the share of the steps that is taken:
    1 forgets the picture but for the mask.
    """

    image: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength is {self.strength}; it must be above 0 and at most 1")


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


@dataclass(frozen=True)
class Steering:
    """How pictures are led to their prompts, beyond the scale of the noise-aware CLIP."""

    cfg_scale: float | None = None
    """Classifier-free guidance, for denoisers that were trained with descriptions; 2 for those, if not given."""
    objective: Literal["softmax", "dot"] = "softmax"
    """What the noise-aware CLIP maximises: log p of the prompt among captions, or 100 times the cosine (GLIDE)."""
    shift: Literal["score", "mean"] = "score"
    """Where its gradient goes: into the score, or into each step's mean, as ADM and GLIDE have it, for comparison."""
    interval: tuple[float, float] = (-math.inf, math.inf)
    """Lambdas (log SNR) at which it guides; beyond them it costs nothing."""
    picture: Tensor | None = None
    """A picture [1, 3, S, S] in [-1, 1] whose likeness is also wanted."""


class Studio:
    """A denoiser, a noise-aware CLIP (or none, if the denoiser takes descriptions) and a clean CLIP.

    With an autoencoder the first two see latents; pictures come in and go out as pixels all the same.
    """

    def __init__(
        self, denoiser: Denoiser, guide: Guide | None, clip: Pretrained, autoencoder: Autoencoder | None = None
    ) -> None:
        self.denoiser, self.guide, self.clip, self.autoencoder = denoiser, guide, clip, autoencoder
        self.image_size = denoiser.image_size if autoencoder is None else autoencoder.config.image_size

    @classmethod
    def open(cls, path: str | Path, device: str = "auto") -> Studio:
        """Load a denoiser with what belongs to it, as `load_parts` finds them. Raises CheckpointError."""
        parts = load_parts(path, device)
        return cls(parts.denoiser, parts.guide, parts.clip, parts.autoencoder)

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
        steering: Steering | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Drawn:
        """Draw `n` pictures of `prompt`, a text or several with their weights, in `steps` steps.

        The guide maximises log p(prompt | x_t) among the caption bank, and log p(none of `negative` | x_t), each times
        `scale`: 10, or 0 if the denoiser takes descriptions. `reference` [1, 3, S, S] in [-1, 1] gives the coarse
        shape. `spacing` of the steps is by default "karras", "linspace" for ddim and ddpm. `watch` is called with what
        the pictures are taken for, [n, 3, S, S] in [-1, 1], at each step; what it raises ends the drawing.

        Raises UsageError for an empty prompt, n or steps below 1, more steps than the schedule has levels, an unknown
        sampler or spacing, or guidance that this model does not have.
        """
        prompts, steering = {prompt: 1.0} if isinstance(prompt, str) else dict(prompt), steering or Steering()
        if not prompts or not all(text.strip() for text in [*prompts, *negative]):
            raise UsageError("the prompt is empty; say what to draw")
        if n < 1 or steps < 1:
            raise UsageError(f"n is {n} and steps is {steps}; both must be at least 1")
        if sampler not in SAMPLERS:
            raise UsageError(f"unknown sampler {sampler!r}; {did_you_mean(sampler, SAMPLERS)}")
        spacing = spacing or ("linspace" if sampler in ("ddim", "ddpm") else "karras")
        usual, usual_cfg = self.scales
        scale = usual if scale is None else scale
        cfg_scale = usual_cfg if steering.cfg_scale is None else steering.cfg_scale
        lambdas = self._lambdas(steps, spacing)
        if start is not None:
            start = Start(self._seen(start.image), start.strength, self._coarser(start.mask))
        denoise = self.told(prompts, negative, cfg_scale)
        denoise = self.guided(denoise, prompts, negative, scale, steering, lambdas)
        if reference is not None:
            denoise = like(self._seen(reference), factor=_coarse(self.denoiser.image_size), until=0.0)(denoise)
        if self.autoencoder is None:
            denoise = clipped(denoise)
        if start is not None and start.mask is not None:
            denoise = inpaint(start.image, start.mask)(denoise)
        images, trajectory = self._sample(denoise, n, lambdas, sampler, seed, start, watch)
        about: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else prompts, "negative": list(negative)}
        about |= {"scale": scale, "seed": seed, "n": n, "steps": steps, "sampler": sampler, "spacing": spacing}
        about |= {"objective": steering.objective, "shift": steering.shift, "clipkit": __version__}
        about |= {"cfg_scale": cfg_scale} if self.denoiser.conditioner is not None else {}
        about |= {"unknown_words": self.unknown_words([*prompts, *negative])}
        return Drawn(images, self.score(images, prompts), about, trajectory, self._shown)

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """Words of prompts that no caption had from which the denoiser, or else its guide, learned what words mean."""
        reader = self.denoiser.conditioner if isinstance(self.denoiser.conditioner, TextCondition) else self.guide
        if reader is None or not reader.words:
            return []
        known = _EMPTY_WORDS.union(reader.words)
        return [word for word in dict.fromkeys(split(" ".join(texts))) if word not in known]

    def told(self, prompts: Mapping[str, float], negative: Sequence[str], cfg_scale: float) -> Denoise:
        """The denoiser under classifier-free guidance, away from `negative`, or from what it draws untold."""
        if self.denoiser.conditioner is None:
            if cfg_scale != 1:
                raise UsageError("this denoiser was trained without descriptions; leave --cfg-scale away")
            return self.denoiser
        wanted = mixed({self.denoiser.given(text): weight for text, weight in prompts.items()})
        away = mixed({self.denoiser.given(text): 1.0 for text in negative or [""]})
        return contrast(away, cfg_scale)(wanted)

    @torch.no_grad()
    def guided(
        self,
        denoise: Denoise,
        prompts: Mapping[str, float],
        negative: Sequence[str],
        scale: float,
        steering: Steering,
        lambdas: Tensor,
    ) -> Denoise:
        """`denoise` under the noise-aware CLIP: towards `prompts` and a picture, away from each of `negative`."""
        if scale == 0:
            return denoise
        if self.guide is None:
            raise UsageError("there is no noisy_clip run beside this denoiser to guide it; leave --scale away")
        log_prob = self.guide.model.log_prob(self.wishes(prompts, negative, steering))
        strength = between(*steering.interval, scale)
        if steering.shift == "mean":
            return mean_shift(log_prob, strength, lambdas)(denoise)
        return score_shift(log_prob, strength)(denoise)

    def wishes(self, prompts: Mapping[str, float], negative: Sequence[str], steering: Steering) -> list[Wish]:
        """What the noise-aware CLIP is to look for."""
        assert self.guide is not None
        guide, found = self.guide, []
        for text, weight in prompts.items():
            wanted, others = guide.embed([text]), guide.embed([*alternatives(text, guide.bank), *negative])
            found.append(Wish(wanted, others if steering.objective == "softmax" else None, weight))
            if negative and steering.objective == "softmax":
                welcome = torch.cat([wanted, others[: -len(negative)]])
                found.append(Wish(welcome, guide.embed(negative), weight))
        if negative and steering.objective == "dot":
            found += [Wish(guide.embed([text]), None, -1.0) for text in negative]
        if steering.picture is not None:
            device = next(guide.model.parameters()).device
            clean = torch.full((1,), math.inf, device=device)
            likeness, _ = guide.model.encode_image(self._seen(steering.picture), clean)
            found.append(Wish(likeness))
        return found

    def _lambdas(self, steps: int, spacing: str) -> Tensor:
        low, high = self.denoiser.range()
        if spacing == "karras":
            return karras(low, high, steps)
        if spacing not in SPACINGS:
            raise UsageError(f"unknown spacing {spacing!r}; {did_you_mean(spacing, SPACINGS)}")
        return spaced(log_snr(self.denoiser.diffusion.schedule).clamp(low, high), steps, cast(Spacing, spacing))

    @torch.no_grad()
    def _sample(
        self,
        denoise: Denoise,
        n: int,
        lambdas: Tensor,
        sampler: str,
        seed: int,
        start: Start | None,
        watch: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        size = self.denoiser.image_size
        device = next(self.denoiser.parameters()).device
        x = torch.randn(n, self.denoiser.channels, size, size, generator=generator).to(device)
        if start is not None and start.strength < 1:
            lambdas = lambdas[min(len(lambdas) - 1, round((1 - start.strength) * len(lambdas))) :]
            x = add_noise(start.image.to(device).expand_as(x), x, lambdas[:1].to(x))
        trajectory: list[Tensor] = []
        bar = iter(progress(range(len(lambdas)), len(lambdas), "drawing"))

        def note(x0: Tensor) -> None:
            trajectory.append(x0.cpu())
            next(bar, None)
            if watch is not None:
                watch(self._shown(x0))

        images = self._shown(SAMPLERS[sampler](denoise, x, lambdas, generator, note))
        next(bar, None)
        return images, trajectory

    def _seen(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, S, S] in [-1, 1] -> what the denoiser sees of them."""
        pictures = pictures.to(next(self.denoiser.parameters()).device)
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
    return preprocess(image, size)[None].float() / 127.5 - 1


def alternatives(prompt: str, captions: Sequence[str]) -> list[str]:
    """The captions that lack a word of the prompt, but for words that say nothing of what is in a picture.

    "a picture of a red rocket." is no alternative to "a rocket" but a case of it, and must not be pushed away from.
    """
    wanted = _words(prompt)
    return [c for c in captions if not wanted <= _words(c)]


_EMPTY_WORDS = frozenset(["a", "an", "the", "one", "of", "in", "on", "with", "photo", "picture", "image", "drawing"])


def _words(text: str) -> set[str]:
    return set(split(text)) - _EMPTY_WORDS
