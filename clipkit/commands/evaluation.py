"""zeroshot, retrieval, probe: evaluate a CLIP on labelled or captioned images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import (
    MODEL_HELP,
    RegistryCommand,
    complete_dataset,
    read_class_list,
    read_class_names,
    read_templates,
    refuse_options,
)
from clipkit.inputs import print_json
from clipkit.registry import DATASETS

if TYPE_CHECKING:
    from clipkit.zeroshot.datasets import ImageSet
    from clipkit.zeroshot.evaluation import Result

_DOWNLOAD_MINUTES = 240
"""Time that the other ranks wait for rank 0 to download data sets."""

_PLACES = "NAME, or folder:, tar:, csv:, shards:, wds:PLACE"


@click.command(cls=RegistryCommand, registries=[DATASETS])
@click.option("--model", "models", default=[DEFAULT_MODEL], show_default=True, multiple=True, help=MODEL_HELP)
@click.option(
    "--dataset",
    "datasets",
    required=True,
    multiple=True,
    shell_complete=complete_dataset,
    help=f"{_PLACES}; may be repeated.",
)
@click.option(
    "--classnames", type=click.Path(path_type=Path), help="JSON (folder -> names, or a list), or a text file."
)
@click.option("--templates", help='"one", "7", "80" (those for ImageNet), or a text file, one template with {} a line.')
@click.option("--descriptions", type=click.Path(path_type=Path), help="JSON: class -> sentences, as further prompts.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Folder that holds data sets given by NAME.",
)
@click.option("--download", is_flag=True, help="Download data sets given by NAME into --data-dir if they are missing.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images encoded at once."
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write a page with confusions into this folder.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout (a list for several results).")
def zeroshot(
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    classnames: Path | None,
    templates: str | None,
    descriptions: Path | None,
    data_dir: Path,
    download: bool,
    batch_size: int,
    workers: int,
    report: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate zero-shot classification on labelled images.

    \b
    A data set is a NAME of the list below, or
      folder:DIR, tar:FILE   <class>/<image>
      csv:FILE               columns image,label; labels joined by | make it multi-label
      shards:DIR             a pack with classes
      wds:DIR                a webdataset as CLIP_benchmark publishes them

    --model and --dataset may be repeated. Scores are fractions. Images that cannot be read are skipped and counted.
    Under torchrun the ranks share the images.

    \b
    Examples:
      clipkit zeroshot --model runs/clip --dataset cifar100 --download
      clipkit zeroshot --model runs/clip --dataset folder:photos --report report
      clipkit zeroshot --model ViT-B-32/laion2b_s34b_b79k --dataset cifar10 --json
    """
    from clipkit import distributed
    from clipkit.inputs import check_writable
    from clipkit.zeroshot import heads
    from clipkit.zeroshot.evaluation import Prompts
    from clipkit.zeroshot.report import write_report

    if not any(name in DATASETS for name in datasets):
        refuse_options(["data_dir", "download"], "on data sets that are given by their place")
    if report is not None:
        check_writable(report)
    prompts = Prompts(
        templates=read_templates(templates, heads.ensembles()) if templates else None,
        descriptions=read_class_names(descriptions) if descriptions else None,
    )
    options = {"batch_size": batch_size, "workers": workers, "cache": heads.CACHE / "heads"}
    with distributed.process_group(distributed.choose_device(device), _DOWNLOAD_MINUTES if download else 10):
        sets = distributed.rank_zero_first(lambda: _opened(datasets, classnames, data_dir, download))
        results = _evaluate(models, sets, prompts, device, as_json, options)
        first = not distributed.rank()
    if report is not None and first:
        click.echo(f"{write_report(results, report)}", err=True)


def _opened(datasets: Sequence[str], classnames: Path | None, data_dir: Path, download: bool) -> list[ImageSet]:
    """Data sets, which rank 0 downloads, with other class names if a file of them is given."""
    from clipkit import distributed
    from clipkit.zeroshot.datasets import open_set

    names = read_class_list(classnames) if classnames else None
    folders = names if isinstance(names, dict) else ()
    fetch = download and not distributed.rank()
    sets = [open_set(name, data_dir, fetch, folders=folders) for name in datasets]
    return sets if names is None else [images.renamed(names, str(classnames)) for images in sets]


def _evaluate(
    models: Sequence[str],
    sets: Sequence[ImageSet],
    prompts: Any,
    device: str,
    as_json: bool,
    options: dict[str, Any],
) -> list[Result]:
    """Evaluate each model on each data set, and print the scores on rank 0."""
    from clipkit import distributed
    from clipkit.zeroshot.evaluation import evaluate_each

    results: list[Result] = []
    try:
        for result in evaluate_each(models, sets, prompts, device, **options):
            results.append(result)
    finally:  # an error on one data set must not lose the scores of those before it
        if results and not distributed.rank():
            _show(results, len(models) * len(sets), as_json)
    return results


def _show(results: Sequence[Result], expected: int, as_json: bool) -> None:
    """Print results: a table, or one JSON object, a list where several are expected."""
    from clipkit.zeroshot.evaluation import table

    found = [result.as_dict() for result in results]
    if as_json:
        print_json(found[0] if expected == 1 else found)
    else:
        click.echo(table(results))


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--shards", required=True, help="A pack with captions (clipkit pack).")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images encoded at once."
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def retrieval(model: str, shards: str, batch_size: int, workers: int, device: str, as_json: bool) -> None:
    """Evaluate image-text retrieval on a pack.

    Recall@1, 5 and 10, image to text and text to image. Samples that cannot be read are skipped and counted. Under
    torchrun the ranks share the images and captions.

    \b
    Example:
      clipkit retrieval --model runs/clip --shards packs/emoji-val
    """
    from clipkit import distributed
    from clipkit.data.files import counted
    from clipkit.data.shards import Shards
    from clipkit.models.pretrained import load
    from clipkit.zeroshot.retrieval import evaluate

    with distributed.process_group(distributed.choose_device(device)):
        clip = load(model, device)
        found = evaluate(clip.model, clip.tokenizer, Shards(shards), batch_size, workers)
        if distributed.rank():
            return
    if as_json:
        counts = {"n": found.n, "texts": found.texts, "skipped": found.skipped}
        print_json({"shards": shards, "model": model, **counts, **found.recalls})
        return
    skipped = f"; skipped: {counted(found.skipped)}" if found.skipped else ""
    click.echo(f"{shards}: {found.n} images, {found.texts} captions{skipped}")
    for way in ("image_to_text", "text_to_image"):
        scores = "   ".join(f"recall@{k} {found.recalls[f'{way}_recall@{k}']:.2%}" for k in (1, 5, 10))
        click.echo(f"{way.replace('_', ' ')}   {scores}")


@click.command(cls=RegistryCommand, registries=[DATASETS])
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option(
    "--train", required=True, shell_complete=complete_dataset, help=f"Training images: {_PLACES} as for zeroshot."
)
@click.option("--test", required=True, shell_complete=complete_dataset, help="Test images, given in the same way.")
@click.option(
    "--shots", type=click.IntRange(min=0), default=0, show_default=True, help="Training images a class; 0 is all."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Draws the shots.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images encoded at once."
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def probe(
    model: str,
    train: str,
    test: str,
    shots: int,
    seed: int,
    batch_size: int,
    workers: int,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate a linear probe on frozen image features.

    A linear classifier; with --shots a few-shot one. Under torchrun the ranks share the images.

    \b
    Example:
      clipkit probe --model runs/clip --train folder:photos/train --test folder:photos/test --shots 16
    """
    import dataclasses

    from clipkit import distributed
    from clipkit.data.files import counted
    from clipkit.models.pretrained import load
    from clipkit.zeroshot.datasets import open_set
    from clipkit.zeroshot.heads import CACHE
    from clipkit.zeroshot.probe import check_same_classes, features
    from clipkit.zeroshot.probe import probe as fit

    with distributed.process_group(distributed.choose_device(device)):
        sets = distributed.rank_zero_first(
            lambda: [open_set(train, Path("data"), training=True), open_set(test, Path("data"))]
        )
        check_same_classes(*sets)
        clip = load(model, device)
        (x, y, skipped_train), (u, v, skipped_test) = (
            features(clip.model, images, batch_size, workers, CACHE / "features") for images in sets
        )
        if distributed.rank():
            return
    found = fit((x, y), (u, v), len(sets[0].classes), shots, seed)
    if as_json:
        skipped = {"skipped_train": skipped_train, "skipped_test": skipped_test}
        print_json({"model": model, **dataclasses.asdict(found), **skipped})
        return
    click.echo(f"{found.train} training images, {found.test} test images, {found.classes} classes, C = {found.C:g}")
    for name, counts in ((train, skipped_train), (test, skipped_test)):
        if counts:
            click.echo(f"skipped of {name}: {counted(counts)}")
    click.echo(f"accuracy {found.accuracy:.2%}   on the validation part {found.validation_accuracy:.2%}")
