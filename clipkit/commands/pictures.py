"""similarity, classify, index, embed, search: what a model says of one's own pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.given import MODEL_HELP, read_lines, read_templates
from clipkit.errors import UsageError


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, required=True, help="A description; may be repeated.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--out", type=click.Path(path_type=Path), help="Also draw the matrix into this file (PNG, SVG, PDF).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def similarity(
    images: tuple[str, ...], texts: tuple[str, ...], model: str, out: Path | None, device: str, as_json: bool
) -> None:
    """Compare pictures with descriptions, by cosines.

    \b
    Example:
      clipkit similarity cat.jpg car.jpg --text "a cat" --text "a red car" --model runs/clip --out matrix.png
    """
    from clipkit.pretrained import load
    from clipkit.zeroshot import similarity as room

    pictures = room.read_images(images)
    cosines = room.similarities(load(model, device), pictures, texts)
    if out is not None:
        save_figure(room.similarity_figure(pictures, texts, cosines), out)
    if as_json:
        click.echo(json.dumps({"images": images, "texts": texts, "cosines": cosines.tolist()}))
        return
    width = max(map(len, texts))
    click.echo(" " * width + "".join(f"  {Path(i).stem[:10]:>10}" for i in images))
    for text, row in zip(texts, cosines.tolist(), strict=True):
        click.echo(f"{text:{width}}" + "".join(f"  {value:10.3f}" for value in row))


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", required=True, help="Names with commas between them, or a text file, one a line.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--templates", default="one", show_default=True, help='"one", "7", "80", or a text file.')
@click.option("--out", type=click.Path(path_type=Path), help="Also draw pictures and bars into this file.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def classify(
    images: tuple[str, ...], labels: str, model: str, templates: str, out: Path | None, device: str, as_json: bool
) -> None:
    """Say which label fits each picture, with probabilities.

    \b
    Example:
      clipkit classify photo.jpg --labels "cat,dog,rocket" --model ViT-B-32/openai --out photo-labels.png
    """
    from clipkit.pretrained import load
    from clipkit.zeroshot import similarity as room
    from clipkit.zeroshot.heads import ensembles

    names = read_lines(Path(labels)) if Path(labels).is_file() else [name.strip() for name in labels.split(",")]
    lines, pictures = read_templates(templates, ensembles()), room.read_images(images)
    guesses = room.classify(load(model, device), pictures, names, lines)
    if out is not None:
        save_figure(room.classify_figure(pictures, guesses), out)
    if as_json:
        found = {i: {g.label: g.probability for g in guess} for i, guess in zip(images, guesses, strict=True)}
        click.echo(json.dumps(found))
        return
    for image, guess in zip(images, guesses, strict=True):
        click.echo(f"{image}: " + ", ".join(f"{g.label} {g.probability:.1%}" for g in guess))


def save_figure(figure: Any, out: Path) -> None:
    """Write a figure. Raises UsageError when that fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {out}: {error}") from None
    click.echo(f"{out}", err=True)


@click.command()
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def index(images: str, out: Path, model: str, batch_size: int, workers: int, device: str) -> None:
    """Embed a folder of pictures or a pack, for search.

    Interrupted, the same command goes on; under torchrun the ranks share the work.

    \b
    Example:
      clipkit index photos/ indexes/photos --model ViT-B-32/laion2b_s34b_b79k
    """
    _embed(images, out, model, False, batch_size, workers, device)


@click.command()
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def embed(shards: str, out: Path, model: str, batch_size: int, workers: int, device: str) -> None:
    """Write embeddings of a pack's images and captions.

    Of each image's captions the first counts.

    OUT gets part-00000.npy (images) and part-00000.texts.npy (captions), float16 unit vectors, and part-00000.json with
    their keys, and so on. It is an index as well. Interrupted, the same command goes on; under torchrun the ranks share
    the work.

    \b
    Example:
      clipkit embed packs/photos embeddings/photos --model runs/clip
    """
    _embed(shards, out, model, True, batch_size, workers, device)


def _embed(source: str, out: Path, model: str, texts: bool, batch_size: int, workers: int, device: str) -> None:
    from clipkit import distributed
    from clipkit.pretrained import load
    from clipkit.zeroshot import index as room

    gallery = room.open_gallery(source)
    with distributed.process_group(distributed.choose_device(device)):
        skipped = room.build(load(model, device), model, gallery, out, texts, batch_size, workers)
        if distributed.rank():
            return
    reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none"
    click.echo(f"{out}: {len(gallery) - sum(skipped.values())} pictures; skipped: {reasons}")


@click.command()
@click.argument("folder", metavar="INDEX")
@click.argument("query")
@click.option("--model", help="Instead of the model that the index was made with: the same, at another place.")
@click.option("-k", type=click.IntRange(min=1), default=12, show_default=True, help="How many are found.")
@click.option("--out", type=click.Path(path_type=Path), help="Also show what was found as a contact sheet (PNG).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def search(folder: str, query: str, model: str | None, k: int, out: Path | None, device: str, as_json: bool) -> None:
    """Find pictures that fit a description or a picture.

    Those of INDEX; QUERY is a description, or the file of a picture.

    \b
    Examples:
      clipkit search indexes/photos "a red bicycle" --out found.png
      clipkit search indexes/photos holiday/cat.jpg
    """
    import dataclasses

    from clipkit.inspection import contact_sheet
    from clipkit.zeroshot import index as room

    found = room.Index(folder)
    hits = found.search(room.embed_query(found, query, model, device), k)[0]
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(room.show(found, hits)).save(out, "PNG")
        except OSError as error:
            raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
    if as_json:
        click.echo(json.dumps({"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]}))
        return
    for hit in hits:
        click.echo(f"{hit.score:.4f}  {hit.key}")
