"""Metrics of pictures in folders, tars and packs: distances between collections, or between pairs of equal names."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from clipkit.data.images import decode, to_pixels
from clipkit.data.sources import pictures
from clipkit.errors import DataError, SampleError, UsageError
from clipkit.guidance.metrics import distributions, pairwise
from clipkit.guidance.metrics.extractors import Extractor, Skipped, extract
from clipkit.log import say


def compare_collections(
    extractor: Extractor, reference: str, samples: str, train: str | None = None, prompt: str | None = None
) -> dict[str, float]:
    """Distances between the features of two collections: FID (Frechet distance), KID, precision, recall, CMMD, IS.

    `train` is the collection whose distance to `reference` is the floor; without it, one half of `reference` to the
    other. With `prompt`, the CLIP score of the samples. Raises DataError for a collection without readable pictures.
    """
    sources = [source for source in (reference, samples, train) if source is not None]
    sides = [extract(extractor, pictures(source), source=source) for source in sources]
    known = sides[0].features
    drawn = sides[1].features
    unreadable = sum(n for side in sides for n in side.skipped.values())
    found: dict[str, float] = {"reference": len(known), "samples": len(drawn), "unreadable": unreadable}
    found |= distributions.compare(known, drawn, sides[2].features if train is not None else None)
    if min(len(known), len(drawn)) <= known.shape[1] or found["frechet_bias"] > 0.1 * found["frechet"]:
        say(
            f"clipkit: {len(known)} and {len(drawn)} pictures are few for {known.shape[1]} dimensions: alike ones "
            f"would show a Frechet distance of about {found['frechet_bias']:.3g}; give more, or look at KID"
        )
    if extractor.logits is not None:
        score, deviation = distributions.inception_score(extractor.logits(drawn), splits=min(10, len(drawn)))
        found |= {"inception_score": score, "inception_score_std": deviation}
    if extractor.text is not None:
        found["cmmd"] = distributions.cmmd(known, drawn)
        if prompt is not None:
            found["clip_score"] = distributions.clip_score(drawn, extractor.text(prompt).expand_as(drawn))
    return found


def compare_pairs(extractor: Extractor, reference: str, samples: str) -> dict[str, float]:
    """Means over pairs of pictures with the same name: PSNR, SSIM, and with layers LPIPS, perceptual, style distance.

    Names without a partner, equal pairs and unreadable pictures are counted. Raises UsageError without a common name
    and for a pair of two sizes, DataError if no pair can be read.
    """
    known = _by_name(reference)
    drawn = _by_name(samples)
    common = [name for name in known if name in drawn]
    alone = [_without_partner(reference, known, drawn), _without_partner(samples, drawn, known)]
    if not common:
        raise UsageError(f"no picture of {samples} has the name of one of {reference}")
    rows = []
    skipped = Skipped(f"{reference} and {samples}")
    for name in common:
        try:
            rows.append(_pair(extractor, name, known[name], drawn[name]))
        except SampleError as error:
            skipped.add(name, error)
    if not rows:
        raise DataError(f"none of the {len(common)} pairs can be read: {skipped}")
    skipped.say(len(common))
    columns = {key: torch.cat([row[key] for row in rows]).double() for key in rows[0]}
    decibels, identical = pairwise.mean_psnr(columns.pop("psnr"))
    found: dict[str, float] = {"pairs": len(rows), "identical": identical, "unreadable": skipped.reasons.total()}
    found |= {"only_in_reference": alone[0], "only_in_samples": alone[1], "psnr": decibels}
    return {**found, **{key: float(column.mean()) for key, column in columns.items()}}


def _pair(extractor: Extractor, name: str, reference: bytes, sample: bytes) -> dict[str, Tensor]:
    """Metrics of one pair, [1] each. Raises SampleError for a picture that cannot be read."""
    images = [decode(data) for data in (reference, sample)]
    one, other = images
    if one.size != other.size:
        raise UsageError(f"{name} is {one.width} x {one.height} and {other.width} x {other.height}; make them equal")
    x, y = (to_pixels(image)[None].float() for image in images)
    row = {"psnr": pairwise.psnr(x, y, 255), "ssim": pairwise.ssim(x, y, 255)}
    if extractor.layers is not None:
        a, b = (extractor.layers(extractor.preprocess(image)[None]) for image in images)
        row |= {"lpips_unlearned": pairwise.lpips(a, b), "perceptual": pairwise.perceptual_distance(a, b)}
        row["style"] = pairwise.style_distance(a, b)
    return row


def _by_name(source: str) -> dict[str, bytes]:
    """The pictures of a collection. Raises DataError if there are none, or two of one name."""
    found: dict[str, bytes] = {}
    for name, data in pictures(source):
        if name in found:
            raise DataError(f"{source} has two pictures named {name}; pairs need one of each name")
        found[name] = data
    if not found:
        raise DataError(f"nothing to measure in {source}: it has no pictures")
    return found


def _without_partner(source: str, names: Collection[str], others: Collection[str]) -> int:
    """The number of names that the other side lacks, which is said in one line."""
    alone = [name for name in names if name not in others]
    if alone:
        shown = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        say(f"clipkit: {len(alone)} of {len(names)} pictures are only in {source}: {shown}")
    return len(alone)
