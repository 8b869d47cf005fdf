"""metrics: FID, KID and other distances between collections of pictures, or PSNR, SSIM, LPIPS of pairs."""

from __future__ import annotations

import math
from pathlib import Path

import click
from click.core import ParameterSource

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP
from clipkit.errors import UsageError
from clipkit.inputs import print_json


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
    """Measure distances of collections (FID, KID, ...).

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
