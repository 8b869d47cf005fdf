"""guided-sample: pictures of a prompt; noise-curve: how well its guide sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from clipkit import DEFAULT_MODEL
from clipkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from clipkit.guidance.draw import Drawn, Start

_SAMPLERS = ["dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "heun", "unipc", "ddim", "ddpm"]
_SPACINGS = ["karras", "linspace", "leading", "trailing"]


@click.command("guided-sample")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A denoiser's run, or a folder of the runs it draws with."
)
@click.option("--n", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Sampler steps.")
@click.option("--scale", type=float, help="Of the noise-aware CLIP; 0 is unguided.  [default: 10; 0 with descriptions]")
@click.option("--cfg-scale", type=float, help="Classifier-free, for denoisers trained with descriptions.  [default: 2]")
@click.option("--sampler", type=click.Choice(_SAMPLERS), default="dpmpp-2m", show_default=True)
@click.option("--spacing", type=click.Choice(_SPACINGS), help="Of the steps.  [default: karras; ddim, ddpm: linspace]")
@click.option("--objective", type=click.Choice(["softmax", "dot"]), default="softmax", show_default=True)
@click.option("--shift", type=click.Choice(["score", "mean"]), default="score", show_default=True)
@click.option("--interval", type=(float, float), help="Log SNR from which to which the noise-aware CLIP guides.")
@click.option("--init", type=click.Path(path_type=Path), help="Begin with this picture; see --strength and --mask.")
@click.option("--strength", type=float, default=0.6, show_default=True, help="How much of --init is drawn anew.")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Draw where this picture is white, keep --init elsewhere."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Keep the coarse shape of this picture.")
@click.option("--image-prompt", type=click.Path(path_type=Path), help="Be like this picture, as the CLIP sees it.")
@click.option("--negative", multiple=True, help="What the pictures should not show; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("grid.png"), show_default=True)
@click.option("--gif", type=click.Path(path_type=Path), help="Also write the denoising as an animation.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def guided_sample(
    prompts: tuple[str, ...],
    model: str,
    n: int,
    steps: int,
    scale: float | None,
    cfg_scale: float | None,
    sampler: str,
    spacing: str | None,
    objective: Literal["softmax", "dot"],
    shift: Literal["score", "mean"],
    interval: tuple[float, float] | None,
    init: Path | None,
    strength: float,
    mask: Path | None,
    reference: Path | None,
    image_prompt: Path | None,
    negative: tuple[str, ...],
    seed: int,
    out: Path,
    gif: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw pictures of a prompt.

    A denoiser is steered by a noise-aware CLIP, or draws by itself if it was told what it drew.
    Writes a PNG grid whose metadata holds prompt, seed, scale and version, and prints each picture's CLIP score. The
    same seed gives the same bytes on a CPU. Several prompts are wanted together; "a rocket:0.5" weighs half.

    \b
    Examples:
      clipkit guided-sample "a rocket" --gif rocket.gif
      clipkit guided-sample "a rocket" --model runs/drawings --init sketch.png --strength 0.7
      clipkit guided-sample "a cat" "something red:0.5" --negative "a dog"
    """
    from clipkit.guidance.draw import Steering, Studio
    from clipkit.guidance.sheet import save_gif, save_grid

    studio = Studio.open(model, device)
    shape, look = (_picture(path, studio.image_size) for path in (reference, image_prompt))
    drawn = studio.draw(
        _weighted(prompts),
        n=n,
        steps=steps,
        scale=scale,
        sampler=sampler,
        negative=negative,
        seed=seed,
        spacing=spacing or "",
        start=_start(init, strength, mask, studio.image_size),
        reference=shape,
        steering=Steering(cfg_scale, objective, shift, interval or (-math.inf, math.inf), look),
    )
    save_grid(drawn.images, drawn.about, out)
    if gif is not None:
        save_gif(drawn.trajectory, gif)
    _say(drawn, prompts, out, as_json)


def _picture(path: Path | None, size: int) -> Tensor | None:
    """A file as the denoiser sees it, if there is one."""
    from clipkit.guidance.draw import picture
    from clipkit.zeroshot.similarity import read_images

    return None if path is None else picture(read_images([path])[0], size)


def _start(init: Path | None, strength: float, mask: Path | None, size: int) -> Start | None:
    """The picture to begin with, and where it is drawn anew."""
    from clipkit.guidance.draw import Start

    if mask is not None and init is None:
        raise UsageError("--mask says what of --init is drawn anew; give --init too")
    begin, where = _picture(init, size), _picture(mask, size)
    return None if begin is None else Start(begin, strength, None if where is None else _white(where))


def _say(drawn: Drawn, prompts: tuple[str, ...], out: Path, as_json: bool) -> None:
    """What was drawn, and each picture's CLIP score."""
    about = drawn.about
    if as_json:
        click.echo(json.dumps({**about, "out": str(out), "clip_scores": drawn.scores}))
        return
    wanted = ", ".join(map(repr, prompts))
    click.echo(f"{out}: {about['n']} x {wanted}, guidance scale {about['scale']:g}, seed {about['seed']}")
    click.echo("CLIP scores: " + " ".join(f"{s:.3f}" for s in drawn.scores))
    if unknown := about["unknown_words"]:
        words = ", ".join(map(repr, unknown))
        click.echo(f"clipkit: no caption that this model learned from had {words}; it guessed", err=True)


def _weighted(prompts: tuple[str, ...]) -> str | dict[str, float]:
    """One prompt as it is; several, or one with a weight, by their weights."""
    found = {}
    for prompt in prompts:
        text, colon, number = prompt.rpartition(":")
        try:
            found[text if colon else prompt] = float(number) if colon else 1.0
        except ValueError:  # a colon of the prompt's own
            found[prompt] = 1.0
    return prompts[0] if found == {prompts[0]: 1.0} else found


def _white(mask: Tensor) -> Tensor:
    """[1, 3, S, S] in [-1, 1] -> 1 where it is rather white, [1, 1, S, S]."""
    return (mask.mean(dim=1, keepdim=True) > 0).float()


@click.command("noise-curve")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="A noisy_clip run, or a folder of one.")
@click.option("--shards", required=True, help="A pack: its classes are told apart, or its captions if it has none.")
@click.option("--n", type=click.IntRange(min=2), default=1000, show_default=True, help="Pictures, evenly spread.")
@click.option("--out", type=click.Path(path_type=Path), help="Also draw the curve into this file (PNG, SVG, PDF).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def noise_curve(model: str, shards: str, n: int, out: Path | None, device: str, as_json: bool) -> None:
    """Say how much a CLIP sees at each noise level.

    How often the noise-aware CLIP is right, and the clean CLIP on the same noised pictures.

    \b
    Example:
      clipkit noise-curve --model runs/drawings --shards packs/drawings-heldout --out curve.png
    """
    import numpy as np
    import torch

    from clipkit.commands.pictures import save_figure
    from clipkit.guidance import curve
    from clipkit.guidance.parts import load_guide_and_clip
    from clipkit.images import decode, preprocessing
    from clipkit.records import progress
    from clipkit.shards import Shards
    from clipkit.zeroshot.heads import class_head, embed_texts

    (guide, clip), pack = load_guide_and_clip(model, device), Shards(shards)
    where = clip.model.log_logit_scale.device
    if len(guide.model.clip.config.conventions.image_mean) != 3:
        raise UsageError(f"the noise-aware CLIP of {model} sees latents, which the clean one does not; compare others")
    samples = [pack.read(int(i)) for i in np.linspace(0, len(pack) - 1, min(n, len(pack))).astype(int)]
    pictures = [decode(sample.image) for sample in samples]
    labels = [sample.label for sample in samples] if pack.classes else list(range(len(samples)))
    wanted, found, targets = torch.tensor(labels, device=where), {}, 0
    for name, towers, tokenizer, encode in (
        ("noise-aware", guide.model.clip, guide.tokenizer, curve.noise_aware(guide.model)),
        ("clean", clip.model, clip.tokenizer, curve.clean(clip.model)),
    ):
        if pack.classes:
            head = class_head(towers, tokenizer, pack.classes, pack.templates)
        else:
            head = embed_texts(towers, tokenizer, [sample.captions[0] for sample in samples])
        seen = preprocessing(towers.config)
        x0 = torch.stack([seen(picture) for picture in pictures]).to(where).float() / 127.5 - 1
        levels = progress(curve.LEVELS, len(curve.LEVELS), name)
        found[name] = [curve.accuracy_at(encode, head, x0, wanted, level) for level in levels]
        targets = len(head)
    if out is not None:
        save_figure(curve.figure(curve.LEVELS, found, 1 / targets), out)
    names = ["clean" if math.isinf(level) else f"{level:g}" for level in curve.LEVELS]
    if as_json:
        click.echo(json.dumps({"n": len(samples), "targets": targets, "log_snr": names, **found}))
        return
    click.echo(f"top-1 of {len(samples)} pictures among {targets}")
    click.echo("log SNR  " + "  ".join(f"{name:>11}" for name in found))
    for row, name in enumerate(names):
        click.echo(f"{name:>7}  " + "  ".join(f"{values[row]:11.1%}" for values in found.values()))
