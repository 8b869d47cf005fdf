"""guided-sample: pictures of a prompt; noise-curve: how well its guide sees."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipkit import DEFAULT_MODEL
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.inputs import print_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from clipkit.data.shards import Sample, Shards
    from clipkit.guidance.pipeline import Pipeline, Start

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
@click.option("--objective", type=click.Choice(["softmax", "dot"]), help="Of the noise-aware CLIP.  [default: softmax]")
@click.option(
    "--shift",
    type=click.Choice(["score", "mean"]),
    help="What the guide's gradient shifts: the score, or each step's mean.  [default: score]",
)
@click.option("--interval", type=(float, float), help="Log-SNR range in which the noise-aware CLIP guides.")
@click.option("--init", type=click.Path(path_type=Path), help="Begin with this picture; see --strength and --mask.")
@click.option("--strength", type=float, help="Noise on --init: a share of the schedule's time.  [default: 0.6]")
@click.option(
    "--mask", type=click.Path(path_type=Path), help="Draw where this picture is white, keep --init elsewhere."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Keep the coarse shape of this picture.")
@click.option("--image-prompt", type=click.Path(path_type=Path), help="Be like this picture, as the CLIP sees it.")
@click.option("--negative", multiple=True, help="What the pictures should not show; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out", default="grid.png", show_default=True, help="One sheet (.png, .jpg, .webp), or DIR/ for single pictures."
)
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
    objective: Literal["softmax", "dot"] | None,
    shift: Literal["score", "mean"] | None,
    interval: tuple[float, float] | None,
    init: Path | None,
    strength: float | None,
    mask: Path | None,
    reference: Path | None,
    image_prompt: Path | None,
    negative: tuple[str, ...],
    seed: int,
    out: str,
    gif: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw pictures of a prompt.

    A denoiser is steered by a noise-aware CLIP, or draws by itself if it was told what it drew.
    Writes one sheet, or single pictures, whose metadata holds all that is needed to draw them again, and prints each
    picture's CLIP score. The same seed gives the same bytes on a CPU, and the same first picture whatever --n is.
    Several prompts are wanted together; "a rocket:0.5" weighs half.

    \b
    Examples:
      clipkit guided-sample "a rocket" --gif rocket.gif
      clipkit guided-sample "a rocket" --n 64 --out drawn/
      clipkit guided-sample "a rocket" --model runs/drawings --init sketch.png --strength 0.7
      clipkit guided-sample "a cat" "something red:0.5" --negative "a dog"
    """
    from clipkit.guidance.image_grid import check_places, is_folder, save_gif, save_grid, save_pictures
    from clipkit.guidance.pipeline import GuidanceConfig, Pipeline

    wanted = _weighted(prompts, negative)
    check_places(out, gif, n)
    if mask is not None and init is None:
        raise UsageError("--mask selects the part of --init to redraw; give --init too")
    if strength is not None and init is None:
        raise UsageError("--strength is the share of noise added to --init; give --init too")
    pipeline = Pipeline.open(model, device)
    files = {"init": init, "mask": mask, "reference": reference, "image_prompt": image_prompt}
    seen, about = _pictures({name: path for name, path in files.items() if path is not None}, pipeline.image_size)
    _warn(pipeline, [*wanted, *negative], scale)
    drawn = pipeline.draw(
        wanted,
        n=n,
        steps=steps,
        scale=scale,
        sampler=sampler,
        negative=negative,
        seed=seed,
        spacing=spacing or "",
        start=_start(seen, strength),
        reference=seen.get("reference"),
        guidance=GuidanceConfig(cfg_scale, objective, shift, interval, seen.get("image_prompt")),
    )
    about = drawn.about | about
    if is_folder(out):
        each = [about | {"index": i, "clip_score": score} for i, score in enumerate(drawn.scores)]
        save_pictures(drawn.images, each, Path(out))
    else:
        save_grid(drawn.images, about, Path(out))
    if gif is not None:
        save_gif(drawn.trajectory, gif)
    if as_json:
        print_json({**about, "out": out, "clip_scores": drawn.scores})
    else:
        _say(about, prompts, out)
        if gif is not None:
            click.echo(f"{gif}: the denoising as an animation")
        click.echo("CLIP scores: " + " ".join(f"{s:.3f}" for s in drawn.scores))


def _pictures(files: dict[str, Path], size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Files as the denoiser sees them; and what is kept of each beside a drawing: its name and sha256."""
    from clipkit.data.images import decode
    from clipkit.guidance.pipeline import picture

    seen, about = {}, {}
    for name, path in files.items():
        try:
            data = path.read_bytes()  # once: it may be a pipe
            seen[name] = picture(decode(data), size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        about[name] = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}
    return seen, about


def _start(seen: dict[str, Tensor], strength: float | None) -> Start | None:
    """The picture to begin with, and where it is redrawn."""
    from clipkit.guidance.config import DEFAULT_STRENGTH, Start

    if "init" not in seen:
        return None
    mask = _white(seen["mask"]) if "mask" in seen else None
    return Start(seen["init"], DEFAULT_STRENGTH if strength is None else strength, mask)


def _warn(pipeline: Pipeline, texts: list[str], scale: float | None) -> None:
    """Name what the model does not know of these texts, and what it does not read, before it draws."""
    from clipkit.commands.pictures import say_unknown

    say_unknown(pipeline.unknown_words(texts))
    for text, last in pipeline.cut_after(texts, scale).items():
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        click.echo(f"clipkit: {shown!r} is longer than what the model reads; it is cut after {last!r}", err=True)


def _say(about: dict[str, Any], prompts: tuple[str, ...], out: str) -> None:
    """What was drawn."""
    wanted = ", ".join(map(repr, prompts))
    scales = f"noise-aware scale {about['scale']:g}"
    if "cfg_scale" in about:
        scales = f"classifier-free scale {about['cfg_scale']:g}, {scales}"
    click.echo(f"{out}: {about['n']} x {wanted}, {scales}, seed {about['seed']}")


def _weighted(prompts: tuple[str, ...], negative: tuple[str, ...]) -> dict[str, float]:
    """Prompts with their weights. Raises UsageError for one that is given twice, and for what lacks its quotes."""
    found: dict[str, float] = {}
    bare = []
    for prompt in prompts:
        text, weight = _weight(prompt)
        if text.replace(".", "").isdigit():
            raise UsageError(f"the prompt {text!r} is a number; what it belongs to may lack its option")
        if text in found:
            raise UsageError(f"the prompt {text!r} is given twice; give it once, with a weight")
        found[text] = 1.0 if weight is None else weight
        bare += [text] if weight is None and len(text.split()) == 1 else []
    if len(bare) > 1 and len(bare) == len(prompts):
        several = " ".join(f"{word}:1" for word in bare)
        raise UsageError(
            f'{len(bare)} prompts of a word each; quote one of several words, "{" ".join(bare)}", or write several '
            f"with their weights, {several}"
        )
    for text in negative:
        if _weight(text)[1] is not None:
            raise UsageError(f"--negative {text!r} has a weight; negative prompts have none")
    for text in (*found, *negative):
        if text.lower() in ("a", "an", "the"):
            raise UsageError(f'"{text}" alone says nothing; put quotes around a prompt of several words')
    return found


def _weight(prompt: str) -> tuple[str, float | None]:
    """ "a cat:0.5" -> the text and its weight.

    After a digit only a number with a point or a minus is one: "route 66:0.5", but not "a clock at 10:30", "16:9".
    """
    text, colon, number = prompt.rpartition(":")
    whole = " ".join(prompt.split())
    if not colon or (text[-1:].isdigit() and "." not in number and not number.lstrip().startswith("-")):
        return whole, None
    try:
        return " ".join(text.split()), float(number)
    except ValueError:
        return whole, None


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
      clipkit noise-curve --model runs/drawings --shards packs/drawings-heldout --out curves.png
    """
    import torch

    from clipkit.commands.pictures import save_figure
    from clipkit.data.images import preprocessing
    from clipkit.data.shards import Shards
    from clipkit.guidance.components import load_guide_and_clip
    from clipkit.guidance.metrics import noise_curve as curves
    from clipkit.log import progress
    from clipkit.zeroshot.heads import class_head, embed_texts
    from clipkit.zeroshot.similarity import check_figure

    if out is not None:
        check_figure(out)
    (guide, clip), pack = load_guide_and_clip(model, device), Shards(shards)
    where = clip.model.log_logit_scale.device
    if len(guide.model.clip.config.conventions.image_mean) != 3:
        raise UsageError(f"the noise-aware CLIP of {model} sees latents, which the clean one does not; compare others")
    samples, pictures, skipped = _evenly(pack, n)
    texts = list(dict.fromkeys(sample.captions[0] for sample in samples))  # equal captions are one target
    labels = [sample.label if pack.classes else texts.index(sample.captions[0]) for sample in samples]
    if (targets := len(pack.classes or texts)) < 2:
        raise UsageError(f"{shards} has one class or caption, which is always right; give a pack with several")
    wanted, found = torch.tensor(labels, device=where), {}
    for name, towers, tokenizer, encode in (
        ("noise-aware", guide.model.clip, guide.tokenizer, curves.noise_aware(guide.model)),
        ("clean", clip.model, clip.tokenizer, curves.clean(clip.model)),
    ):
        if pack.classes:
            head = class_head(towers, tokenizer, pack.classes, pack.templates)
        else:
            head = embed_texts(towers, tokenizer, texts)
        seen = preprocessing(towers.config)
        x0 = torch.stack([seen(picture) for picture in pictures]).to(where).float() / 127.5 - 1
        levels = progress(curves.LEVELS, len(curves.LEVELS), name)
        found[name] = [curves.accuracy_at(encode, head, x0, wanted, level) for level in levels]
    if out is not None:
        save_figure(curves.figure(curves.LEVELS, found, 1 / targets), out)
    names = ["clean" if math.isinf(level) else f"{level:g}" for level in curves.LEVELS]
    if as_json:
        about = {"n": len(samples), "targets": targets, "skipped": skipped, "log_snr": names}
        print_json({**about, **found})
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
    click.echo(f"top-1 of {len(samples)} pictures among {targets}; skipped: {reasons}")
    click.echo("log SNR  " + "  ".join(f"{name:>11}" for name in found))
    for row, name in enumerate(names):
        click.echo(f"{name:>7}  " + "  ".join(f"{values[row]:11.1%}" for values in found.values()))


def _evenly(pack: Shards, n: int) -> tuple[list[Sample], list[Image], dict[str, int]]:
    """At most `n` samples of a pack, evenly spread, with their pictures; and how many were skipped, by reason.

    Raises DataError when none is left.
    """
    import numpy as np

    from clipkit.data.images import decode

    samples, pictures, skipped = [], [], Counter[str]()
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
