"""zeroshot, retrieval, probe: how good a model is on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP, read_class_list, read_class_names, read_templates, refuse_options
from clipkit.errors import UsageError
from clipkit.inputs import print_json

if TYPE_CHECKING:
    from clipkit.zeroshot.evaluation import Result


@click.command()
@click.option("--model", "models", default=[DEFAULT_MODEL], show_default=True, multiple=True, help=MODEL_HELP)
@click.option(
    "--dataset", "datasets", required=True, multiple=True, help="A name, or folder:, tar:, csv:, shards:, wds:."
)
@click.option(
    "--classnames", type=click.Path(path_type=Path), help="JSON (folder -> names, or a list), or a text file."
)
@click.option("--templates", help='"one", "7", "80" (those for ImageNet), or a text file, one template with {} a line.')
@click.option("--descriptions", type=click.Path(path_type=Path), help="JSON: class -> sentences, as further prompts.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--download", is_flag=True, help="Fetch a named data set into --data-dir if it is not there.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
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
    """Classify data sets without training on them.

    \b
    A data set is one of these names, or
      folder:DIR, tar:FILE   <class>/<image>
      csv:FILE               columns image,label; labels joined by | make it multi-label
      shards:DIR             a pack with classes
      wds:DIR                a webdataset as CLIP_benchmark publishes them
    Names: cifar10 cifar100 fashion-mnist mnist svhn stl10 oxford-pets flowers102 food101 dtd eurosat gtsrb caltech101
    fgvc-aircraft stanford-cars sun397 imagenet imagenet-v2 imagenet-r imagenet-a imagenet-sketch

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
    from clipkit.zeroshot import evaluation, heads
    from clipkit.zeroshot.datasets import known, open_set
    from clipkit.zeroshot.report import write_report

    if not any(name in known() for name in datasets):
        refuse_options(["data_dir", "download"], "on data sets that are given by their place")
    if report is not None:
        check_writable(report)
    names = read_class_list(classnames) if classnames else None
    prompts = evaluation.Prompts(
        templates=read_templates(templates, heads.ensembles()) if templates else None,
        descriptions=read_class_names(descriptions) if descriptions else None,
    )
    sets = [open_set(name, data_dir, download, folders=names if isinstance(names, dict) else ()) for name in datasets]
    if names is not None:
        sets = [images.renamed(names, str(classnames)) for images in sets]
    results: list[evaluation.Result] = []
    with distributed.process_group(distributed.choose_device(device)):
        how = {"batch_size": batch_size, "workers": workers, "cache": heads.CACHE / "heads"}
        try:
            for result in evaluation.evaluate_each(models, sets, prompts, device, **how):
                results.append(result)
        finally:  # what ends one data set must not cost the scores of those before it
            if results and not distributed.rank():
                _show(results, len(models) * len(sets), as_json)
    if report is not None and not distributed.rank():
        click.echo(f"{write_report(results, report)}", err=True)


def _show(results: Sequence[Result], due: int, as_json: bool) -> None:
    """Print results: a table, or one JSON object, a list where several are due."""
    from clipkit.zeroshot.evaluation import table

    found = [result.as_dict() for result in results]
    if as_json:
        print_json(found[0] if due == 1 else found)
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
    """Score image-text retrieval on a pack.

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


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--train", required=True, help="As zeroshot takes it: folder:DIR ...; of a NAME, its training part.")
@click.option("--test", required=True, help="The same, to count on.")
@click.option("--shots", type=click.IntRange(min=0), default=0, show_default=True, help="Images a class; 0 is all.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Draws the shots.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def probe(model: str, train: str, test: str, shots: int, seed: int, workers: int, device: str, as_json: bool) -> None:
    """Fit a linear classifier on frozen image features.

    A linear probe, or with --shots a few-shot one.

    \b
    Example:
      clipkit probe --model runs/clip --train folder:photos/train --test folder:photos/test --shots 16
    """
    import dataclasses
    from itertools import zip_longest

    from clipkit.data.files import counted
    from clipkit.models.pretrained import load
    from clipkit.zeroshot import probe as room
    from clipkit.zeroshot.datasets import open_set
    from clipkit.zeroshot.heads import CACHE

    sets = [open_set(train, Path("data"), training=True), open_set(test, Path("data"))]
    # The further names of a class are for prompts, and may differ.
    known, unknown = ([names[0] for names in images.classes] for images in sets)
    if known != unknown:
        differ = next(f"{a!r} and {b!r}" for a, b in zip_longest(known, unknown) if a != b)
        raise UsageError(
            f"{train} and {test} must have the same classes in the same order; they have {len(known)} and "
            f"{len(unknown)}, and differ first in {differ}"
        )
    clip = load(model, device)
    cache = CACHE / "features"
    (x, y, unfit), (u, v, untested) = (
        room.features(clip.model, images, workers=workers, cache=cache) for images in sets
    )
    found = room.probe((x, y), (u, v), len(known), shots, seed)
    if as_json:
        skipped = {"skipped_train": unfit, "skipped_test": untested}
        print_json({"model": model, **dataclasses.asdict(found), **skipped})
        return
    click.echo(f"{found.train} training images, {found.test} test images, {found.classes} classes, C = {found.C:g}")
    for name, counts in ((train, unfit), (test, untested)):
        if counts:
            click.echo(f"skipped of {name}: {counted(counts)}")
    click.echo(f"accuracy {found.accuracy:.2%}   on the validation part {found.validation_accuracy:.2%}")
