"""guided-sample: text-guided sampling, img2img, inpainting; noise-curve: accuracy of a CLIP at each noise level."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import LazyChoice, RegistryCommand
from clipkit.errors import DataError, UsageError
from clipkit.guidance.choices import Objective, Shift
from clipkit.inputs import print_json
from clipkit.registry import GUIDERS, SAMPLERS, SPACINGS

if TYPE_CHECKING:
    from torch import Tensor

    from clipkit.guidance.config import DrawRequest
    from clipkit.guidance.pipeline import Drawn, Pipeline


@click.command("guided-sample", cls=RegistryCommand, registries=(SAMPLERS, SPACINGS, GUIDERS))
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A denoiser's run, or a folder with it and its networks."
)
@click.option("--n", type=click.IntRange(min=1), default=16, show_default=True, help="Number of pictures.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Sampler steps.")
@click.option(
    "--scale",
    type=float,
    help="Classifier guidance by the noise-aware CLIP; 0 is unguided.  [default: 10; 0 for conditional denoisers]",
)
@click.option("--cfg-scale", type=float, help="Classifier-free guidance, for conditional denoisers.  [default: 2]")
@click.option(
    "--sampler", type=LazyChoice(SAMPLERS.keys), default="dpmpp-2m", show_default=True, help="Sampler; see below."
)
@click.option(
    "--spacing",
    type=LazyChoice(SPACINGS.keys),
    help="Spacing of the steps on the noise schedule; see below.  [default: the one that the sampler declares]",
)
@click.option(
    "--guider",
    "guiders",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A further guider, see below; may be repeated, the innermost first. With one, --scale is 0 and --cfg-scale 1 "
    "unless given.",
)
@click.option(
    "--objective",
    type=click.Choice(get_args(Objective)),
    help="Objective of the noise-aware CLIP: log p of the prompt among other captions, or cosine similarity.  "
    "[default: softmax]",
)
@click.option(
    "--shift",
    type=click.Choice(get_args(Shift)),
    help="Target of its gradient: the score, or the mean of each step (ADM, GLIDE).  [default: score]",
)
@click.option("--interval", type=(float, float), help="Log SNR from, to: the noise-aware CLIP guides only there.")
@click.option(
    "--init", type=click.Path(path_type=Path), help="Img2img: start from this picture; see --strength and --mask."
)
@click.option("--strength", type=float, help="Noise on --init: a share of the schedule's time.  [default: 0.6]")
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    help="Inpainting: draw where it is white, keep --init elsewhere.",
)
@click.option("--reference", type=click.Path(path_type=Path), help="ILVR: keep the coarse shape of this picture.")
@click.option(
    "--image-prompt", type=click.Path(path_type=Path), help="Maximise the CLIP similarity to this picture, too."
)
@click.option("--negative", multiple=True, help="Negative prompt: what to avoid; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--out", default="grid.png", show_default=True, help="One grid (.png, .jpg, .webp), or DIR/ for single pictures."
)
@click.option("--gif", type=click.Path(path_type=Path), help="Also write the denoising as an animation.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def guided_sample(
    prompts: tuple[str, ...],
    model: str,
    init: Path | None,
    strength: float | None,
    mask: Path | None,
    reference: Path | None,
    image_prompt: Path | None,
    negative: tuple[str, ...],
    out: str,
    gif: Path | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw pictures of a prompt (text-to-image).

    A denoiser samples under classifier-free guidance, or under the gradient of a noise-aware CLIP (classifier
    guidance), or both. Writes one grid or single pictures with their full settings as metadata, and prints each
    picture's CLIP score. The same seed gives the same bytes on a CPU, and the same first picture whatever --n is.
    Several prompts are composed; "a rocket:0.5" has half the weight.

    \b
    Examples:
      clipkit guided-sample "a rocket" --gif rocket.gif
      clipkit guided-sample "a rocket" --n 64 --out drawn/
      clipkit guided-sample "a rocket" --sampler ddim --guider cfg++:scale=0.6
      clipkit guided-sample "a rocket" --model runs/drawings --init sketch.png --strength 0.7
      clipkit guided-sample "a cat" "something red:0.5" --negative "a dog"
    """
    from clipkit.guidance.image_grid import check_places
    from clipkit.guidance.pipeline import Pipeline

    weighted = _weighted(prompts, negative)
    check_places(out, gif, options["n"])
    if mask is not None and init is None:
        raise UsageError("--mask selects the part of --init to redraw; give --init too")
    if strength is not None and init is None:
        raise UsageError("--strength is the share of noise added to --init; give --init too")
    pipeline = Pipeline.open(model, device)
    files = {"init": init, "mask": mask, "reference": reference, "image_prompt": image_prompt}
    seen, sources = _pictures({name: path for name, path in files.items() if path is not None}, pipeline.image_size)
    request = _request(weighted, negative, seen, strength, **options)
    _warn(pipeline, request)
    drawn = pipeline.draw(request)
    about = drawn.about | sources
    _write(drawn, about, out, gif)
    _report(drawn, about, prompts, out, gif, as_json)


def _pictures(files: dict[str, Path], size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Files as tensors for the pipeline, and the name and sha256 of each for the metadata."""
    from clipkit.data.images import decode
    from clipkit.guidance.pipeline import picture

    seen = {}
    about = {}
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


def _request(
    prompts: dict[str, float],
    negative: tuple[str, ...],
    seen: dict[str, Tensor],
    strength: float | None,
    **options: Any,
) -> DrawRequest:
    """The options as a request."""
    from clipkit.guidance.config import DEFAULT_STRENGTH, DrawRequest, GuidanceConfig, Start

    start = None
    if "init" in seen:
        mask = _white(seen["mask"]) if "mask" in seen else None
        start = Start(seen["init"], DEFAULT_STRENGTH if strength is None else strength, mask)
    settings = {name: options.pop(name) for name in ("cfg_scale", "objective", "shift", "interval")}
    guidance = GuidanceConfig(**settings, picture=seen.get("image_prompt"))
    options["spacing"] = options["spacing"] or ""
    return DrawRequest(prompts, negative, guidance=guidance, start=start, reference=seen.get("reference"), **options)


def _warn(pipeline: Pipeline, request: DrawRequest) -> None:
    """Name out-of-vocabulary words, and prompts beyond the text encoder's context, before drawing."""
    from clipkit.commands.pictures import say_unknown

    texts = [*request.prompts, *request.negative]
    say_unknown(pipeline.unknown_words(texts))
    for text, last in pipeline.cut_after(texts, request.completed(pipeline.is_conditional).scale).items():
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        click.echo(f"clipkit: {shown!r} is longer than what the model reads; it is cut after {last!r}", err=True)


def _write(drawn: Drawn, about: dict[str, Any], out: str, gif: Path | None) -> None:
    """The pictures, as a grid or one by one, and the animation."""
    from clipkit.guidance.image_grid import is_folder, save_gif, save_grid, save_pictures

    if is_folder(out):
        each = [about | {"index": i, "clip_score": score} for i, score in enumerate(drawn.scores)]
        save_pictures(drawn.images, each, Path(out))
    else:
        save_grid(drawn.images, about, Path(out))
    if gif is not None:
        save_gif(drawn.trajectory, gif)


def _report(
    drawn: Drawn, about: dict[str, Any], prompts: tuple[str, ...], out: str, gif: Path | None, as_json: bool
) -> None:
    """One JSON object, or lines: prompts, scales, CLIP scores."""
    if as_json:
        print_json({**about, "out": out, "clip_scores": drawn.scores})
        return
    scales = f"noise-aware scale {about['scale']:g}"
    if "cfg_scale" in about:
        scales = f"classifier-free scale {about['cfg_scale']:g}, {scales}"
    guiders = "".join(f", {guider}" for guider in about.get("guiders", ()))
    click.echo(f"{out}: {about['n']} x {', '.join(map(repr, prompts))}, {scales}{guiders}, seed {about['seed']}")
    if gif is not None:
        click.echo(f"{gif}: the denoising as an animation")
    click.echo("CLIP scores: " + " ".join(f"{s:.3f}" for s in drawn.scores))


def _weighted(prompts: tuple[str, ...], negative: tuple[str, ...]) -> dict[str, float]:
    """Prompts with their weights. Raises UsageError for a repeated prompt, and for prompts that seem to lack quotes."""
    found: dict[str, float] = {}
    bare = []
    for prompt in prompts:
        text, weight = _weight(prompt)
        if text.replace(".", "").isdigit():
            raise UsageError(f"the prompt {text!r} is a number; it may lack the option that it belongs to")
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
@click.option("--shards", required=True, help="A pack: its classes are the targets, or its captions if it has none.")
@click.option("--n", type=click.IntRange(min=2), default=1000, show_default=True, help="Pictures, evenly spread.")
@click.option("--out", type=click.Path(path_type=Path), help="Also plot the curve into this file (PNG, SVG, PDF).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def noise_curve(model: str, shards: str, n: int, out: Path | None, device: str, as_json: bool) -> None:
    """Measure a CLIP's accuracy at each noise level.

    Top-1 of the noise-aware CLIP, and of the clean CLIP on the same noised pictures.

    \b
    Example:
      clipkit noise-curve --model runs/drawings --shards packs/drawings-heldout --out curves.png
    """
    from clipkit.commands.pictures import save_figure
    from clipkit.data.shards import Shards
    from clipkit.guidance.components import load_guide_and_clip
    from clipkit.guidance.metrics import noise_curve as curves
    from clipkit.zeroshot.similarity import check_figure

    if out is not None:
        check_figure(out)
    guide, clip = load_guide_and_clip(model, device)
    curve = curves.measure(guide, clip, Shards(shards), n)
    if out is not None:
        save_figure(curves.figure(curves.LEVELS, curve.top1, 1 / curve.targets), out)
    if as_json:
        about = {"n": curve.n, "targets": curve.targets, "skipped": curve.skipped, "log_snr": curves.LEVEL_NAMES}
        print_json({**about, **curve.top1})
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in curve.skipped.items()) or "none"
    click.echo(f"top-1 of {curve.n} pictures among {curve.targets}; skipped: {reasons}")
    click.echo("log SNR  " + "  ".join(f"{name:>11}" for name in curve.top1))
    for row, name in enumerate(curves.LEVEL_NAMES):
        click.echo(f"{name:>7}  " + "  ".join(f"{values[row]:11.1%}" for values in curve.top1.values()))
