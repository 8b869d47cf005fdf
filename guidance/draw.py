"""From a prompt to pictures: a denoiser steered by a noise-aware CLIP, scored by a clean one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from clipkit import distributed
from clipkit._version import __version__
from clipkit.config import from_dict
from clipkit.errors import UsageError, did_you_mean
from clipkit.guidance import samplers
from clipkit.guidance.denoiser import Denoise, Denoiser, DiffusionConfig, NetworkConfig, clipped
from clipkit.guidance.dit import DiTConfig
from clipkit.guidance.guiders import inpaint, like, score_shift
from clipkit.guidance.noisy_clip import NoisyCLIP
from clipkit.guidance.schedule import Spacing, add_noise, karras, log_snr, spaced
from clipkit.guidance.unet import UNetConfig
from clipkit.images import preprocess, to_image
from clipkit.model import CLIP, CLIPConfig
from clipkit.pretrained import Pretrained, find, load, load_weights
from clipkit.records import progress
from clipkit.tokenizer import Tokenizer

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
    """Pictures of one prompt: `images` [N, 3, S, S] in [-1, 1], each step's x0, CLIP scores, and how they were made."""

    images: Tensor
    trajectory: list[Tensor]
    scores: list[float]
    about: dict[str, Any]


class Studio:
    """A denoiser, a noise-aware CLIP and a clean CLIP that belong together."""

    def __init__(
        self, denoiser: Denoiser, guide: NoisyCLIP, tokenizer: Tokenizer, bank: list[str], clip: Pretrained
    ) -> None:
        self.denoiser, self.guide, self.tokenizer, self.bank, self.clip = denoiser, guide, tokenizer, bank, clip

    @classmethod
    def open(cls, path: str | Path, device: str = "auto") -> Studio:
        """Load the runs `clip`, `denoiser` and `noisy_clip` in the folder `path`. Raises CheckpointError."""
        where = distributed.choose_device(device)
        found = find(path, "denoiser")
        recipe = found.state["recipe"]
        unet, dit = recipe.get("unet"), recipe.get("dit")
        network: NetworkConfig = from_dict(UNetConfig, unet) if unet else from_dict(DiTConfig, dit)
        denoiser = Denoiser(network, from_dict(DiffusionConfig, recipe["diffusion"]))
        load_weights(denoiser, found)
        guide, tokenizer, bank = load_noisy_clip(path)
        for model in (denoiser, guide):
            model.to(where).eval().requires_grad_(False)
        return cls(denoiser, guide, tokenizer, bank, load(path, device))

    def draw(
        self,
        prompt: str,
        n: int = 16,
        steps: int = 25,
        scale: float | None = None,
        sampler: str = "dpmpp-2m",
        negative: Sequence[str] = (),
        seed: int = 0,
        spacing: str = "",
        start: Start | None = None,
        reference: Tensor | None = None,
    ) -> Drawn:
        """Draw `n` pictures of `prompt` in `steps` steps.

        The guide maximises log p(prompt | x_t) among the caption bank, and log p(none of `negative` | x_t), each times
        `scale`. `reference` [1, 3, S, S] in [-1, 1] gives the coarse shape. `spacing` of the steps is by default
        "karras", "linspace" for ddim and ddpm. Raises UsageError for an empty prompt, n or steps below 1, more steps
        than the schedule has levels, or an unknown sampler or spacing.
        """
        if not prompt.strip() or not all(text.strip() for text in negative):
            raise UsageError("the prompt is empty; say what to draw")
        if n < 1 or steps < 1:
            raise UsageError(f"n is {n} and steps is {steps}; both must be at least 1")
        if sampler not in SAMPLERS:
            raise UsageError(f"unknown sampler {sampler!r}; {did_you_mean(sampler, SAMPLERS)}")
        spacing = spacing or ("linspace" if sampler in ("ddim", "ddpm") else "karras")
        scale = DEFAULT_SCALE if scale is None else scale
        denoise = self.guided(prompt, negative, scale)
        if reference is not None:
            denoise = like(reference, factor=_coarse(self.denoiser.image_size), until=0.0)(denoise)
        denoise = clipped(denoise)
        if start is not None and start.mask is not None:
            denoise = inpaint(start.image, start.mask)(denoise)
        images, trajectory = self._sample(denoise, n, self._lambdas(steps, spacing), sampler, seed, start)
        about = {"prompt": prompt, "negative": list(negative), "scale": scale, "seed": seed, "n": n, "steps": steps}
        about |= {"sampler": sampler, "spacing": spacing, "clipkit": __version__}
        return Drawn(images, trajectory, self.score(images, prompt), about)

    @torch.no_grad()
    def guided(self, prompt: str, negative: Sequence[str], scale: float) -> Denoise:
        """The denoiser under guidance towards `prompt` and away from each of `negative`."""
        wanted = self._embed([prompt])
        others = self._embed([*alternatives(prompt, self.bank), *negative])
        denoise: Denoise = score_shift(self.guide.log_prob(wanted, others), scale)(self.denoiser)
        if negative:
            welcome, unwanted = torch.cat([wanted, others[: -len(negative)]]), self._embed(list(negative))
            denoise = score_shift(self.guide.log_prob(welcome, unwanted), scale)(denoise)
        return denoise

    def _embed(self, texts: list[str]) -> Tensor:
        return self.guide.encode_text(self.tokenizer(texts))

    def _lambdas(self, steps: int, spacing: str) -> Tensor:
        low, high = self.denoiser.range()
        if spacing == "karras":
            return karras(low, high, steps)
        if spacing not in SPACINGS:
            raise UsageError(f"unknown spacing {spacing!r}; {did_you_mean(spacing, SPACINGS)}")
        return spaced(log_snr(self.denoiser.diffusion.schedule).clamp(low, high), steps, cast(Spacing, spacing))

    @torch.no_grad()
    def _sample(
        self, denoise: Denoise, n: int, lambdas: Tensor, sampler: str, seed: int, start: Start | None
    ) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        size = self.denoiser.image_size
        device = next(self.denoiser.parameters()).device
        x = torch.randn(n, 3, size, size, generator=generator).to(device)
        if start is not None and start.strength < 1:
            lambdas = lambdas[min(len(lambdas) - 1, round((1 - start.strength) * len(lambdas))) :]
            x = add_noise(start.image.to(device).expand_as(x), x, lambdas[:1].to(x))
        trajectory: list[Tensor] = []
        bar = iter(progress(range(len(lambdas)), len(lambdas), "drawing"))

        def watch(x0: Tensor) -> None:
            trajectory.append(x0.cpu())
            next(bar, None)

        images = SAMPLERS[sampler](denoise, x, lambdas, generator, watch).cpu()
        next(bar, None)
        return images, trajectory

    @torch.no_grad()
    def score(self, images: Tensor, prompt: str) -> list[float]:
        """Cosine similarity of each picture to the prompt under the clean CLIP."""
        model: CLIP = self.clip.model
        device = model.log_logit_scale.device
        pixels = torch.stack([self.clip.preprocess(to_image(image)) for image in images]).to(device)
        text = model.encode_text(self.clip.tokenizer(prompt))
        return [round(s, 4) for s in (model.encode_image(pixels) @ text.T)[:, 0].tolist()]


def _coarse(size: int) -> int:
    """Pixels that a reference is averaged over: an eighth of the side, or the largest power of two that divides it."""
    factor = max(1, size // 8)
    while size % factor:
        factor -= 1
    return factor


def picture(image: Image.Image, size: int) -> Tensor:
    """An image as the denoiser sees one: its middle, [1, 3, size, size] in [-1, 1]."""
    return preprocess(image, size)[None].float() / 127.5 - 1


def load_noisy_clip(path: str | Path) -> tuple[NoisyCLIP, Tokenizer, list[str]]:
    """Averaged weights of a noisy_clip run, its tokenizer and its caption bank, on the CPU. Raises CheckpointError."""
    found = find(path, "noisy_clip")
    config = from_dict(CLIPConfig, json.loads(found.text("clip.json")))
    tokenizer = Tokenizer.from_json(found.text("tokenizer.json"), config.context_length)
    clip = CLIP(config, tokenizer.vocab_size, tokenizer.end_id)
    model = NoisyCLIP(clip, int(found.state["recipe"]["model"]["width"]))
    load_weights(model, found)
    return model, tokenizer, [str(c) for c in json.loads(found.text("bank.json"))]


def alternatives(prompt: str, captions: Sequence[str]) -> list[str]:
    """The captions that do not contain every word of the prompt.

    "a red rocket" is no alternative to "a rocket" but a case of it, and must not be pushed away from.
    """
    words = set(prompt.lower().split())
    return [c for c in captions if not words <= set(c.lower().rstrip(".").split())]


def grid(images: Tensor, columns: int | None = None, scale: int = 4) -> Image.Image:
    """[N, 3, S, S] in [-1, 1] -> one picture, rows of `columns` (default: nearly square), each pixel `scale` wide."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    size = images.shape[-1] * scale
    gap = 2
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), (255, 255, 255))
    for i, image in enumerate(images):
        tile = to_image(image).resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + (i % columns) * (size + gap), gap + (i // columns) * (size + gap)))
    return sheet


def save_grid(drawn: Drawn, path: Path) -> None:
    """Write the pictures as a PNG grid whose text chunks say how they were made. Raises UsageError if that fails."""
    info = PngInfo()
    for key, value in drawn.about.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    _save(grid(drawn.images), path, format="PNG", pnginfo=info)


def save_gif(drawn: Drawn, path: Path) -> None:
    """Write the steps from noise to pictures as an animation that rests on the last."""
    frames = [grid(x0) for x0 in drawn.trajectory]
    durations = [80] * (len(frames) - 1) + [1500]
    _save(frames[0], path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
