"""metrics: FID, KID and other distances of collections, PSNR, SSIM, LPIPS of pairs; atoms: facts of prompts checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP, LazyChoice
from clipkit.errors import UsageError
from clipkit.inputs import print_json
from clipkit.registry import SAMPLERS


@click.command()
@click.argument("reference")
@click.argument("samples")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=f"CLIP of the features. {MODEL_HELP}")
@click.option("--inception", type=click.Path(path_type=Path), help="The FID's Inception-V3 weights, instead of a CLIP.")
@click.option("--train", help="The training set of the samples' model: its distance to REFERENCE is the floor.")
@click.option("--pairs", is_flag=True, help="Compare pictures of the same name with each other instead.")
@click.option("--prompt", help="Also the CLIP score of the samples with this text.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def metrics(
    reference: str,
    samples: str,
    model: str,
    inception: Path | None,
    train: str | None,
    pairs: bool,
    prompt: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure distances of collections, such as FID and KID.

    SAMPLES and REFERENCE are folders, tars or packs.

    Frechet distance (the FID, with --inception), KID, precision and recall; CMMD with a CLIP, the Inception score with
    Inception. With --pairs: PSNR, SSIM, and with a CLIP LPIPS (unlearned), perceptual and style distance. Each distance
    is printed with its floor: that of one half of REFERENCE to the other, or of --train to REFERENCE. Unreadable
    pictures are skipped and counted; with --pairs also names without a partner, and equal pairs.

    \b
    Examples:
      clipkit metrics photos/test drawn --train photos/train
      clipkit metrics originals decoded --pairs
    """
    from clipkit.guidance.metrics.evaluation import compare_collections, compare_pairs
    from clipkit.guidance.metrics.extractors import clip_extractor, inception_extractor
    from clipkit.models.pretrained import load

    if prompt is not None and (inception is not None or pairs):
        raise UsageError("--prompt is for a CLIP's score of a collection; omit --inception and --pairs")
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty; say what the samples should show")
    if train is not None and pairs:
        raise UsageError("--train is the floor of collections; omit it with --pairs")
    if inception is not None and pairs:
        raise UsageError("--pairs looks into a CLIP's layers, which --inception replaces; omit one of them")
    if inception is not None and click.get_current_context().get_parameter_source("model") != ParameterSource.DEFAULT:
        raise UsageError("--inception takes the place of a CLIP; omit --model")
    extractor = inception_extractor(inception, device) if inception else clip_extractor(load(model, device), model)
    if pairs:
        numbers = compare_pairs(extractor, reference, samples)
    else:
        numbers = compare_collections(extractor, reference, samples, train, prompt)
    if as_json:
        if absent := ", ".join(f"{k} is {v}" for k, v in numbers.items() if not math.isfinite(v)):
            click.echo(f"clipkit: {absent}, which JSON cannot say: null stands for it", err=True)
        print_json({"extractor": extractor.name, "weights": extractor.weights, **numbers})
        return
    click.echo(f"features of {extractor.name}, weights {extractor.weights}")
    for name, value in numbers.items():
        click.echo(f"{name:22}{value:.5g}")


def _splits() -> tuple[str, ...]:
    from clipkit.world.scene import SPLITS

    return SPLITS


@click.command()
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A denoiser's run, or a folder with it and its networks."
)
@click.option("--n", type=click.IntRange(min=1), default=200, show_default=True, help="Number of prompts.")
@click.option(
    "--split",
    type=LazyChoice(_splits),
    default="heldout",
    show_default=True,
    help="heldout: objects in colours that scenes for training never have; relations: relations they never have.",
)
@click.option("--plain", is_flag=True, help='Only prompts such as "a red rocket": one object in its colour.')
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Sampler steps.")
@click.option("--scale", type=float, help="Classifier guidance by the noise-aware CLIP; as for guided-sample.")
@click.option("--cfg-scale", type=float, help="Classifier-free guidance, for conditional denoisers.  [default: 2]")
@click.option(
    "--sampler", type=LazyChoice(SAMPLERS.keys), default="dpmpp-2m", show_default=True, help="As for guided-sample."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of prompts and noise.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write a grid of the first pictures (PNG).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def atoms(
    model: str, n: int, split: str, plain: bool, seed: int, out: Path | None, device: str, as_json: bool, **options: Any
) -> None:
    """Score prompts fact by fact, without a network.

    Draws one picture for each of N prompts of the world's scenes ("a red rocket left of two blue stars") and checks
    every fact that the prompt states: object, colour, count, relation, background. The judge knows the renderer's
    shapes and colours; its accuracy on the renderer's pictures of the same prompts stands beside the model's score.

    \b
    Example:
      clipkit atoms --model runs/drawings --plain --n 64 --out atoms.png
    """
    from clipkit.data.images import to_image
    from clipkit.guidance.image_grid import check_places, grid
    from clipkit.guidance.metrics.atoms import draw, prompts, renders, score
    from clipkit.guidance.pipeline import Pipeline

    if out is not None:
        check_places(str(out), None, 2)
    asked = prompts(n, split, seed, plain)
    pipeline = Pipeline.open(model, device)
    images = draw(pipeline, asked, seed=seed, **options)
    found = score(asked, [to_image(image) for image in images])
    judge = score(asked, renders(asked, pipeline.image_size))
    if out is not None:
        grid(images[:64]).save(out)
    if as_json:
        rows = {kind: {**share.as_dict(), "judge": judge[kind].value} for kind, share in found.items()}
        print_json({"n": n, "split": split, "plain": plain, "seed": seed, "facts": rows})
        return
    click.echo(f"{'fact':12s}{'n':>6s}{'shown':>8s}   {'95 % interval':18s}{'judge on renders':>16s}")
    for kind, share in found.items():
        low, high = share.interval
        interval = f"{low:.1%} to {high:.1%}"
        click.echo(f"{kind:12s}{share.total:6d}{share.value:8.1%}   {interval:18s}{judge[kind].value:16.1%}")
