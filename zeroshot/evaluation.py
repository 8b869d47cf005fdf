"""Zero-shot evaluation of several models on several data sets, and the results as a table or as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.files import counted
from clipkit.errors import UsageError
from clipkit.models.pretrained import Pretrained, load
from clipkit.zeroshot import classify
from clipkit.zeroshot.classify import Predictions, Scores
from clipkit.zeroshot.datasets import ImageSet
from clipkit.zeroshot.heads import class_head


@dataclass(frozen=True)
class Result:
    """One model on one data set."""

    model: str
    images: ImageSet
    templates: int
    scores: Scores
    mean_average_precision: float | None
    """Of a multi-label set."""
    predictions: Predictions

    @property
    def skipped(self) -> dict[str, int]:
        """Counts of what is in no score, by reason: files that are not taken, and images that cannot be read."""
        return dict(Counter(self.images.skipped) + Counter(self.predictions.skipped))

    def as_dict(self) -> dict[str, Any]:
        """Names, counts, and the scores as fractions, for JSON."""
        found = {"dataset": self.images.name, "model": self.model, **dataclasses.asdict(self.scores)}
        found["skipped"] = self.skipped
        if self.mean_average_precision is not None:
            found["mean_average_precision"] = self.mean_average_precision
        return found


@dataclass(frozen=True)
class Prompts:
    """Class names, templates and descriptions that replace a data set's own."""

    classes: Sequence[Sequence[str]] | None = None
    templates: Sequence[str] | None = None
    descriptions: Mapping[str, Sequence[str]] | None = None


def evaluate(
    name: str,
    clip: Pretrained,
    images: ImageSet,
    prompts: Prompts | None = None,
    batch_size: int = 256,
    workers: int = 0,
    cache: Path | None = None,
) -> Result:
    """Build a class head for the data set and classify its images; the ranks share the work and get the same result.

    Images that cannot be read are skipped and counted. Raises UsageError for prompts that do not fit the data set,
    DataError when no image can be read.
    """
    prompts = prompts or Prompts()
    classes = prompts.classes or images.classes
    if len(classes) != len(images.classes):
        raise UsageError(f"there are names for {len(classes)} classes; {images.name} has {len(images.classes)}")
    images = dataclasses.replace(images, classes=classes)
    templates = prompts.templates or images.templates
    head = class_head(clip.model, clip.tokenizer, classes, templates, prompts.descriptions, cache)
    predictions = classify.predict(clip.model, head, images, batch_size, workers)
    if predictions.rows is not None:
        images = images.only(predictions.rows)
    precision = None
    if predictions.similarities is not None:
        precision = classify.mean_average_precision(predictions.similarities, predictions.targets)
    return Result(name, images, len(templates), classify.score(predictions), precision, predictions)


def evaluate_all(
    models: Sequence[str], sets: Sequence[ImageSet], prompts: Prompts, device: str = "auto", **how: Any
) -> list[Result]:
    """Each model, loaded once, on each data set; `how` are further arguments of `evaluate`."""
    return list(evaluate_each(models, sets, prompts, device, **how))


def evaluate_each(
    models: Sequence[str], sets: Sequence[ImageSet], prompts: Prompts, device: str = "auto", **how: Any
) -> Iterator[Result]:
    """The same, one result at a time."""
    for name in models:
        clip = load(name, device)
        yield from (evaluate(name, clip, images, prompts, **how) for images in sets)


def table(results: Sequence[Result]) -> str:
    """The results as lines of text, and the counts of skipped images."""
    rows = cells(results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    lines = ["  ".join(cells).rstrip() for cells in aligned]
    skipped = {r.images.name: f"skipped of {r.images.name}: {counted(r.skipped)}" for r in results if r.skipped}
    return "\n".join([*lines, *skipped.values()])


def cells(results: Sequence[Result]) -> list[list[str]]:
    """Rows of text, the titles first: model, data set, n, and the scores; columns without a score are omitted."""
    rows = [["model", "data set", "n", "top-1", "95 % interval", "top-5", "per class", "ECE", "mAP"]]
    rows += [[r.model, r.images.name, *_scores(r)] for r in results]
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in used] for row in rows]


def _scores(result: Result) -> list[str]:
    s = result.scores
    precision = result.mean_average_precision
    return [
        f"{s.n:,}",
        f"{s.top1:.2%}",
        f"{s.top1_low:.1%} to {s.top1_high:.1%}",
        f"{s.top5:.2%}" if len(result.images.classes) > 5 else "",
        f"{s.mean_per_class:.2%}",
        f"{s.ece:.3f}",
        "" if precision is None else f"{precision:.2%}",
    ]
