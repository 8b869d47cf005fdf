"""metrics: distances between collections of pictures, or between pairs of them."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.inputs import print_json

if TYPE_CHECKING:
    from clipkit.guidance.metrics.extractors import Extractor


@click.command()
@click.argument("reference")
@click.argument("samples")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=f"CLIP whose features count. {MODEL_HELP}")
@click.option("--inception", type=click.Path(path_type=Path), help="The FID's Inception-V3 weights, instead of a CLIP.")
@click.option("--train", help="Pictures that the samples' model was trained on: their distance is the floor.")
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
    """Say how far pictures are from others: FID and its kin.

    SAMPLES and REFERENCE are folders, tars or packs.

    Frechet distance (the FID, if --inception), KID, precision and recall; CMMD with a CLIP, the Inception score with
    Inception. With --pairs: PSNR, SSIM, and with a CLIP LPIPS (unlearned), perceptual and style distance. Beside each
    distance stands its floor: that of one half of REFERENCE to the other, or of --train to REFERENCE. Pictures that
    cannot be read are skipped and counted (unreadable), with --pairs also names without a partner and equal pairs.

    \b
    Examples:
      clipkit metrics photos/test drawn --train photos/train
      clipkit metrics originals decoded --pairs
    """
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
    numbers = (
        _pairs(extractor, reference, samples) if pairs else _collections(extractor, reference, samples, train, prompt)
    )
    if as_json:
        if absent := ", ".join(f"{k} is {v}" for k, v in numbers.items() if not math.isfinite(v)):
            click.echo(f"clipkit: {absent}, which JSON cannot say: null stands for it", err=True)
        print_json({"extractor": extractor.name, "weights": extractor.weights, **numbers})
        return
    click.echo(f"features of {extractor.name}, weights {extractor.weights}")
    for name, value in numbers.items():
        click.echo(f"{name:22}{value:.5g}")


def _collections(
    extractor: Extractor, reference: str, samples: str, train: str | None, prompt: str | None
) -> dict[str, float]:
    from clipkit.data.sources import pictures
    from clipkit.guidance.metrics import distributions as room
    from clipkit.guidance.metrics.extractors import extract

    sources = [source for source in (reference, samples, train) if source is not None]
    sides = [extract(extractor, pictures(source), source=source) for source in sources]
    (known, drawn), learnt = (side.features for side in sides[:2]), sides[2].features if train is not None else None
    unreadable = sum(n for side in sides for n in side.skipped.values())
    found: dict[str, float] = {"reference": len(known), "samples": len(drawn), "unreadable": unreadable}
    found |= room.compare(known, drawn, learnt)
    if min(len(known), len(drawn)) <= known.shape[1] or found["frechet_bias"] > 0.1 * found["frechet"]:
        click.echo(
            f"clipkit: {len(known)} and {len(drawn)} pictures are few for {known.shape[1]} dimensions: alike ones "
            f"would show a Frechet distance of about {found['frechet_bias']:.3g}; give more, or look at KID",
            err=True,
        )
    if extractor.logits is not None:
        score, deviation = room.inception_score(extractor.logits(drawn), splits=min(10, len(drawn)))
        found |= {"inception_score": score, "inception_score_std": deviation}
    if extractor.text is not None:
        found["cmmd"] = room.cmmd(known, drawn)
        if prompt is not None:
            found["clip_score"] = room.clip_score(drawn, extractor.text(prompt).expand_as(drawn))
    return found


def _pairs(extractor: Extractor, reference: str, samples: str) -> dict[str, float]:
    import torch

    from clipkit.data.images import decode, to_pixels
    from clipkit.guidance.metrics import pairwise
    from clipkit.guidance.metrics.extractors import Skipped

    known, drawn = _by_name(reference), _by_name(samples)
    common = [name for name in known if name in drawn]
    alone = [_without_partner(reference, known, drawn), _without_partner(samples, drawn, known)]
    if not common:
        raise UsageError(f"no picture of {samples} has the name of one of {reference}")
    rows, skipped = [], Skipped(f"{reference} and {samples}")
    for name in common:
        try:
            one, other = decode(known[name]), decode(drawn[name])
        except SampleError as error:
            skipped.add(name, error)
            continue
        if one.size != other.size:
            raise UsageError(
                f"{name} is {one.width} x {one.height} and {other.width} x {other.height}; make them equal"
            )
        x, y = (to_pixels(image)[None].float() for image in (one, other))
        row = {"psnr": pairwise.psnr(x, y, 255), "ssim": pairwise.ssim(x, y, 255)}
        if extractor.layers is not None:
            a, b = (extractor.layers(extractor.preprocess(image)[None]) for image in (one, other))
            row |= {"lpips_unlearned": pairwise.lpips(a, b), "perceptual": pairwise.perceptual_distance(a, b)}
            row["style"] = pairwise.style_distance(a, b)
        rows.append(row)
    if not rows:
        raise DataError(f"none of the {len(common)} pairs can be read: {skipped}")
    skipped.say(len(common))
    columns = {key: torch.cat([row[key] for row in rows]).double() for key in rows[0]}
    decibels, identical = pairwise.mean_psnr(columns.pop("psnr"))
    found: dict[str, float] = {"pairs": len(rows), "identical": identical, "unreadable": skipped.reasons.total()}
    found |= {"only_in_reference": alone[0], "only_in_samples": alone[1], "psnr": decibels}
    return {**found, **{key: float(column.mean()) for key, column in columns.items()}}


def _by_name(source: str) -> dict[str, bytes]:
    """The pictures of a collection. Raises DataError if there are none, or two of one name."""
    from clipkit.data.sources import pictures

    found: dict[str, bytes] = {}
    for name, data in pictures(source):
        if name in found:
            raise DataError(f"{source} has two pictures named {name}; pairs need one of each name")
        found[name] = data
    if not found:
        raise DataError(f"nothing to measure in {source}: it has no pictures")
    return found


def _without_partner(source: str, names: Collection[str], others: Collection[str]) -> int:
    """How many of the names the other side lacks; said in one line."""
    alone = [name for name in names if name not in others]
    if alone:
        shown = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        click.echo(f"clipkit: {len(alone)} of {len(names)} pictures are only in {source}: {shown}", err=True)
    return len(alone)
