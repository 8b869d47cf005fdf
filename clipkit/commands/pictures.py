"""similarity, classify, index, embed, search: zero-shot use of a CLIP on one's own pictures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP, read_templates
from clipkit.errors import ClipkitError, DataError, UsageError
from clipkit.inputs import check_file, check_writable, items_of, print_json

if TYPE_CHECKING:
    from clipkit.models.pretrained import Pretrained
    from clipkit.zeroshot.embedding import Embedded
    from clipkit.zeroshot.galleries import Gallery, Pictures
    from clipkit.zeroshot.index import Hit, Index

_NAMED = 5
"""Pictures that a message names; further ones are counted."""


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    help="A description, or a file of them, one a line; may be repeated.",
)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--out", type=click.Path(path_type=Path), help="Also draw the matrix into this file (PNG, SVG, PDF).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def similarity(
    images: tuple[str, ...], texts: tuple[str, ...], model: str, out: Path | None, device: str, as_json: bool
) -> None:
    """Cosine similarity of pictures and texts.

    IMAGES are files, folders of them, or packs.

    \b
    Example:
      clipkit similarity cat.jpg car.jpg --text "a cat" --text "a red car" --model runs/clip --out matrix.png
    """
    from clipkit.models.pretrained import load
    from clipkit.zeroshot.galleries import Pictures
    from clipkit.zeroshot.similarity import cosines, similarity_figure, unknown_words

    words = [item for text in texts for item in items_of(text, "--text")]
    pictures = Pictures(images)
    if out is not None:
        _check_figure(out, pictures, words)
    clip = load(model, device)
    found = _embedded(clip, pictures)
    names = [pictures.key(row) for row in found.rows]
    matrix = cosines(clip, found.features, words)
    say_unknown(unknown_words(clip, words))
    if as_json:
        print_json({"images": names, "texts": words, "cosines": matrix.tolist()})
    else:
        width = max(map(len, words))
        click.echo(" " * width + "".join(f"  {Path(name).stem[:10]:>10}" for name in names))
        for text, row in zip(words, matrix.tolist(), strict=True):
            click.echo(f"{text:{width}}" + "".join(f"  {value:10.3f}" for value in row))
    if out is not None:
        save_figure(similarity_figure(_thumbnails(pictures, found), words, matrix), out)


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", required=True, help="Names with commas between them, or a file: one a line, or a JSON list.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--templates", default="one", show_default=True, help='"one", "7", "80", or a text file.')
@click.option("--out", type=click.Path(path_type=Path), help="Also draw pictures and bars into this file.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def classify(
    images: tuple[str, ...], labels: str, model: str, templates: str, out: Path | None, device: str, as_json: bool
) -> None:
    """Classify pictures zero-shot, with probabilities.

    IMAGES are files, folders of them, or packs.

    \b
    Examples:
      clipkit classify photo.jpg --labels "cat,dog,rocket" --model ViT-B-32/openai --out photo-labels.png
      clipkit classify photos/ --labels labels.txt
    """
    from clipkit.models.pretrained import load
    from clipkit.zeroshot.galleries import Pictures
    from clipkit.zeroshot.heads import class_head, ensembles
    from clipkit.zeroshot.similarity import classify_figure, guesses, unknown_words

    names = items_of(labels, "--labels", separator=",")
    if len(names) < 2:
        raise UsageError(f"--labels has {names[0]!r} alone, whose probability is always 100 %; give two or more")
    lines, pictures = read_templates(templates, ensembles()), Pictures(images)
    if out is not None:
        _check_figure(out, pictures)
    clip = load(model, device)
    head = class_head(clip.model, clip.tokenizer, names, lines)
    found = _embedded(clip, pictures)
    best = dict(zip(map(pictures.key, found.rows), guesses(clip, found.features, names, head), strict=True))
    say_unknown(unknown_words(clip, names))
    if as_json:
        print_json({image: {g.label: g.probability for g in guess} for image, guess in best.items()})
    else:
        for image, guess in best.items():
            click.echo(f"{image}: " + ", ".join(f"{g.label} {g.probability:.1%}" for g in guess))
    if out is not None:
        save_figure(classify_figure(_thumbnails(pictures, found), list(best.values())), out)


def _embedded(clip: Pretrained, pictures: Pictures) -> Embedded:
    """Embed all pictures. Those of folders and packs that cannot be read are skipped and named on stderr.

    Raises DataError naming all files that were given and cannot be read, and when nothing is left.
    """
    from clipkit.data.files import counted
    from clipkit.zeroshot.galleries import embed_pictures

    found = embed_pictures(clip, pictures, range(len(pictures)))
    if bad := {pictures.key(row): why for row, why in found.skipped.items() if pictures.named(row)}:
        raise DataError(f"cannot read {_list([f'{name} ({why})' for name, why in bad.items()])}")
    if not found.rows:
        raise DataError(f"no picture can be read; skipped: {counted(found.reasons)}")
    if found.skipped:
        names = [f"{pictures.key(row)} ({why})" for row, why in found.skipped.items()]
        click.echo(f"clipkit: skipped {_list(names)}", err=True)
    return found


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def say_unknown(words: Sequence[str]) -> None:
    """Name on stderr the words that are in no caption of the training set, if there are any."""
    if words:
        shown = ", ".join(map(repr, words))
        click.echo(
            f"clipkit: no caption that this model learned from had {shown}; it guesses those words",
            err=True,
        )


def _check_figure(out: Path, pictures: Pictures, texts: Sequence[str] = ()) -> None:
    from clipkit.zeroshot.similarity import MOST_SHOWN, check_figure

    check_figure(out)
    for name in (pictures.key(row) for row in range(len(pictures)) if pictures.named(row)):
        if not os.path.isfile(name):
            raise UsageError(f"--out reads {name} twice, which is a pipe; save it to a file first")
    if (most := max(len(pictures), len(texts))) > MOST_SHOWN:
        raise UsageError(f"--out shows at most {MOST_SHOWN} pictures and texts; {most} are given")


def _thumbnails(pictures: Pictures, found: Embedded) -> list[Any]:
    """Small copies of the embedded pictures, for a figure."""
    from clipkit.data.images import decode

    images = []
    for row in found.rows:
        image = decode(pictures.image(row), reduce_to=512)
        image.thumbnail((512, 512))
        images.append(image)
    return images


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
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Pictures embedded at once."
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def index(images: str, out: Path, model: str, batch_size: int, workers: int, device: str) -> None:
    """Embed pictures for search by nearest neighbours.

    IMAGES is a folder of pictures or a pack.

    Run again, the same command updates the index: of a folder that has changed only new and changed pictures are
    embedded. Interrupted, it resumes; under torchrun the ranks share the work.

    \b
    Example:
      clipkit index photos/ indexes/photos --model ViT-B-32/laion2b_s34b_b79k
    """
    _embed(images, out, model, False, batch_size, workers, device)


@click.command()
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Pictures embedded at once."
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def embed(shards: str, out: Path, model: str, batch_size: int, workers: int, device: str) -> None:
    """Write embeddings of a pack's images and captions.

    Of several captions of an image only the first is embedded.

    OUT gets part-00000.npy (images) and part-00000.texts.npy (captions), float16 unit vectors, and part-00000.json with
    their keys, and so on. It is an index as well, and is updated like one: the parts' names then begin with the
    "series" in embeddings.json. Interrupted, the same command resumes; under torchrun the ranks share the work.

    \b
    Example:
      clipkit embed packs/photos embeddings/photos --model runs/clip
    """
    _embed(shards, out, model, True, batch_size, workers, device)


def _embed(source: str, out: Path, model: str, texts: bool, batch_size: int, workers: int, device: str) -> None:
    from clipkit import distributed
    from clipkit.data.files import counted
    from clipkit.models.pretrained import load
    from clipkit.zeroshot.galleries import open_gallery
    from clipkit.zeroshot.index import build

    gallery = open_gallery(source)
    check_writable(out)
    with distributed.process_group(distributed.choose_device(device)):
        built = build(load(model, device), model, gallery, out, texts, batch_size, workers)
        if distributed.rank():
            return
    update = f"added {built.added}, changed {built.changed}, dropped {built.dropped}, kept {built.kept}; "
    shown = update if built.changed or built.dropped or built.kept else ""
    click.echo(f"{out}: {built.pictures} pictures; {shown}skipped: {counted(built.skipped)}")


@click.command()
@click.argument("folder", metavar="INDEX")
@click.argument("query", nargs=-1, required=True, metavar="QUERY")
@click.option("--model", help="The index's model, where it has moved.")
@click.option("-k", type=click.IntRange(min=1), default=12, show_default=True, help="Number of nearest neighbours.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also write the pictures found as a contact sheet (PNG, JPEG, WebP)."
)
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def search(
    folder: str, query: tuple[str, ...], model: str | None, k: int, out: Path | None, device: str, as_json: bool
) -> None:
    """Find the nearest neighbours of a text or picture.

    INDEX is a folder made by clipkit index or embed; QUERY is a description in quotes, or the file of a picture.

    \b
    Examples:
      clipkit search indexes/photos "a red bicycle" --out found.png
      clipkit search indexes/photos holiday/cat.jpg
    """
    import dataclasses

    from clipkit.data.files import counted
    from clipkit.data.images import SUFFIXES
    from clipkit.zeroshot.index import Index, embed_asked, load_model, read_query, show
    from clipkit.zeroshot.similarity import unknown_words

    if len(query) > 1:
        raise UsageError(f"the query has {len(query)} parts; put it in quotes: {shlex.join([' '.join(query)])}")
    found = Index(folder)
    if not len(found):
        raise UsageError(f"{folder} holds no picture to find; skipped: {counted(found.skipped)}")
    if out is not None:
        check_file(out, SUFFIXES)
    asked = read_query(query[0])
    gallery = _gallery_of(found, needed=out is not None)
    clip = load_model(found, model, device)
    hits = found.search(embed_asked(clip, asked), k)[0]
    if isinstance(asked, str):
        say_unknown(unknown_words(clip, [asked]))
    if out is not None and gallery is not None:
        _save_sheet(show(found, hits, gallery), hits, out)
    if as_json:
        print_json({"query": query[0], "hits": [dataclasses.asdict(hit) for hit in hits]})
        return
    for hit in hits:
        click.echo(f"{hit.score:.4f}  {hit.key}")


def _gallery_of(index: Index, needed: bool) -> Gallery | None:
    """Open the source of an index; a line on stderr if it has changed since, or cannot be compared.

    A URL is opened only if the pictures are `needed`. Raises DataError if they are, and cannot be opened.
    """
    from clipkit.zeroshot.galleries import open_gallery

    source = str(index.about["source"])
    if "://" in source and not needed:
        return None
    try:
        gallery = open_gallery(source, quietly=True)
        differing = index.differences(gallery)
    except (ClipkitError, OSError) as error:
        if needed:
            raise DataError(f"cannot show what is found: {error}") from None
        click.echo(f"clipkit: cannot compare the index with its pictures: {error}", err=True)
        return None
    if differing:
        words = ["clipkit", "embed" if index.about.get("texts") else "index", source, str(index.folder)]
        again = shlex.join([*words, "--model", str(index.about["model"])])
        click.echo(f"clipkit: {index.folder} is older than {source}: {differing}; update it with {again}", err=True)
    return gallery


def _save_sheet(shown: Sequence[tuple[bytes | str, str]], hits: Sequence[Hit], out: Path) -> None:
    """Write a contact sheet in the format of the file's suffix, and name on stderr the pictures missing in it."""
    from clipkit.data.inspection import contact_sheet

    lacking = [f"{hit.key} ({image})" for hit, (image, _) in zip(hits, shown, strict=True) if isinstance(image, str)]
    if lacking:
        click.echo(f"clipkit: cannot show {_list(lacking)}", err=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(shown).save(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
