"""The `clipkit` command. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from clipkit._version import __version__
from clipkit.errors import ClipkitError, UsageError

_RECIPE_HELP = """
    RECIPE is a TOML file or the name of a shipped recipe; OVERRIDES are section.key=value words. The same command
    resumes an interrupted run."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="clipkit")
def cli() -> None:
    """Train CLIP on image-text shards, use it zero-shot, and draw with it.

    \b
    Start with:
      clipkit demo                                    the whole chain on drawings, some minutes
      clipkit pack photos/ packs/photos               your own images
      clipkit pretrain drawings_clip.toml
      clipkit zeroshot --model runs/clip --dataset cifar100
      clipkit guided-sample "a rocket" --model runs/drawings
    """


@cli.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classnames", type=click.Path(path_type=Path), help="JSON: class folder -> list of names, or name.")
@click.option("--templates", type=click.Path(path_type=Path), help="Text file, one caption template with {} a line.")
@click.option("--csv", "table", type=click.Path(path_type=Path), help="CSV with the columns image,caption.")
@click.option("--shard-size", type=click.IntRange(min=1), default=10_000, show_default=True, help="Samples a shard.")
@click.option("--holdout", type=click.IntRange(min=0), default=0, help="Samples set aside in OUT-val.")
@click.option(
    "--resize", type=click.IntRange(min=0), default=0, help="Reduce the shorter side of larger images to this."
)
@click.option("--encode", type=click.Choice(["jpeg", "png", "webp"]), help="Encode the images anew.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of new JPEG and WebP.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides captions and drawings.")
@click.option("--split", default="train", show_default=True, help="drawings: train, val or heldout.")
@click.option("--count", type=int, default=12_000, show_default=True, help="drawings: how many.")
@click.option("--size", type=click.IntRange(min=8), default=24, show_default=True, help="drawings: pixels.")
def pack(
    source: str,
    out: Path,
    classnames: Path | None,
    templates: Path | None,
    table: Path | None,
    shard_size: int,
    holdout: int,
    resize: int,
    encode: str | None,
    quality: int,
    seed: int,
    split: str,
    count: int,
    size: int,
) -> None:
    """Pack captioned images into webdataset shards with an index.

    SOURCE is a folder or tar laid out <class>/<image>, or a folder or tar of images with --csv, or the word
    "drawings" for the embedded data set. Images are kept byte for byte unless --resize or --encode says otherwise.
    Interrupted, the same command goes on after the last whole shard.

    \b
    Examples:
      clipkit pack photos/ packs/photos --classnames names.json
      clipkit pack emoji.tar.xz packs/emoji --csv captions.csv --holdout 500
      clipkit pack drawings packs/drawings --count 20000
    """
    from clipkit import sources
    from clipkit.pack import Encoding
    from clipkit.pack import pack as write

    if source == "drawings":
        data = sources.drawings_source(split, count, size, seed)
    elif not Path(source).exists():
        raise UsageError(f'no folder or tar at {source} (the embedded data set is called "drawings")')
    elif table is not None:
        data = sources.csv_source(table, Path(source))
    else:
        lines = _lines(templates) if templates else sources.DEFAULT_TEMPLATES
        data = sources.class_source(Path(source), _class_names(classnames) if classnames else None, lines, seed)
    index = write(data, out, shard_size, holdout, Encoding(resize, encode or "", quality))
    skipped = ", ".join(f"{n} {reason}" for reason, n in index["skipped"].items()) or "none"
    click.echo(f"{out}: {index['samples']} samples in {len(index['shards'])} shards; skipped: {skipped}")


@cli.command()
@click.argument("shards")
@click.option("--samples", type=click.IntRange(min=0), default=16, show_default=True, help="Decoded of each shard.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def verify(shards: str, samples: int, as_json: bool) -> None:
    """Check a pack: sizes, hashes and structure of all shards, and whether some of the images decode.

    SHARDS is a folder made by `clipkit pack`, or the URL of one. Exit code 1 when something is wrong.

    \b
    Example:
      clipkit verify packs/photos
    """
    import dataclasses

    from clipkit import inspection

    report = inspection.verify(shards, samples)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        click.echo(f"{report.source}: {report.samples} samples in {report.shards} shards")
        for name, count in report.skipped.items():
            click.echo(f"  skipped when packed: {count} {name}")
        for name, problem in report.damaged.items():
            click.echo(f"  {name}: {problem}")
        for reason, count in report.bad.items():
            click.echo(f"  {count} of {report.decoded} decoded samples: {reason}")
        good = f"sound: every hash is right, {report.decoded} samples decoded"
        click.echo(
            f"{len(report.damaged)} damaged shards" if report.damaged else good if not report.bad else "not sound"
        )
    if report.damaged or report.bad:
        sys.exit(1)


@cli.command()
@click.argument("shards")
@click.option("-n", "--n", "count", type=click.IntRange(min=1), default=16, show_default=True, help="Samples shown.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("sheet.png"), show_default=True)
def inspect(shards: str, count: int, seed: int, out: Path) -> None:
    """Show random samples of a pack with their captions, as a PNG.

    \b
    Example:
      clipkit inspect packs/photos -n 16 --out sheet.png
    """
    from clipkit.inspection import sheet
    from clipkit.shards import Shards

    picture = sheet(Shards(shards, verify=False), count, seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out, "PNG")
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from None
    click.echo(f"{out}: {count} samples of {shards}")


def _class_names(path: Path) -> dict[str, list[str]]:
    data = _json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path} must map each class folder to its names; found a {type(data).__name__}")
    return {str(k): [v] if isinstance(v, str) else list(v) for k, v in data.items()}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON: {error}") from None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable text file: {error}") from None
    if not lines:
        raise UsageError(f"{path} is empty; it needs one entry a line")
    return lines


def _training_command(name: str, module: str, summary: str, recipe: str) -> None:
    """Register the command that trains with `clipkit.train.<module>`; the three differ in nothing else."""

    def command(recipe: str, overrides: Sequence[str], dry_run: bool) -> None:
        from importlib import import_module

        import_module(f"clipkit.train.{module}").run(recipe, overrides, dry_run)

    command.__doc__ = (
        f"{summary}\n{_RECIPE_HELP}\n\n    \b\n    Example:\n      clipkit {name} {recipe} run.steps=500\n    "
    )
    decorated: Callable[..., None] = click.argument("overrides", nargs=-1)(command)
    decorated = click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop.")(decorated)
    cli.command(name)(click.argument("recipe")(decorated))


_training_command("pretrain", "pretrain", "Pretrain CLIP on a pack.", "drawings_clip.toml")
_training_command("denoiser", "denoiser", "Train a diffusion denoiser on a pack's images.", "drawings_denoiser.toml")
_training_command("noisy-clip", "noisy_clip", "Teach a pretrained CLIP to see noise.", "drawings_noisy_clip.toml")


@cli.command()
@click.argument("pattern", default="")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, name to hub repository.")
def models(pattern: str, as_json: bool) -> None:
    """List published models by name; those that contain PATTERN.

    Wherever a command takes --model, it takes one of these names, which is fetched from the Hugging Face hub once;
    "hf-hub:organisation/name"; a folder with open_clip_config.json, or of transformers' CLIP or SigLIP; a file of
    OpenAI's; or the folder of a run.

    \b
    Example:
      clipkit models ViT-B-32
    """
    from clipkit import hub

    found = {name: published.repository for name, published in hub.known().items() if pattern.lower() in name.lower()}
    if not found:
        raise UsageError(f"no published model has {pattern!r} in its name; `clipkit models` lists them all")
    if as_json:
        click.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, repository in found.items():
        click.echo(f"{name:{width}}  {repository}")


@cli.command()
@click.option("--model", required=True, help="A run's folder, other people's weights, or a published name.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["open_clip", "transformers", "onnx", "torch"]),
    default="open_clip",
    show_default=True,
)
@click.option("--push", help="Also upload OUT as this hub repository, organisation/name, with a model card.")
def export(model: str, out: Path, form: str, push: str | None) -> None:
    """Write a model for other libraries.

    open_clip and transformers read their folders with equal features; onnx and torch write two graphs, from uint8
    pixels and from token ids to unit vectors.

    \b
    Example:
      clipkit export --model runs/clip exported/clip --format onnx
    """
    from clipkit import export as room
    from clipkit.pretrained import load

    clip = load(model, "cpu")
    for path in room.export(clip, out, form):
        click.echo(f"{path}")
    if push is not None:
        click.echo(room.push(clip, out, push))


_MODEL_HELP = "A run's folder, other people's weights, or a published name (see clipkit models)."


@cli.command()
@click.option("--model", "models", required=True, multiple=True, help=_MODEL_HELP)
@click.option(
    "--dataset", "datasets", required=True, multiple=True, help="A name, or folder:, tar:, csv:, shards:, wds:."
)
@click.option(
    "--classnames", type=click.Path(path_type=Path), help="JSON list (a name or names per class), or text file."
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

    --model and --dataset may be repeated. Scores are fractions. Under torchrun the ranks share the images.

    \b
    Examples:
      clipkit zeroshot --model runs/clip --dataset cifar100 --download
      clipkit zeroshot --model runs/clip --dataset folder:photos --report report
      clipkit zeroshot --model ViT-B-32/laion2b_s34b_b79k --dataset cifar10 --json
    """
    from clipkit import distributed
    from clipkit.zeroshot import evaluation, heads
    from clipkit.zeroshot.datasets import open_set
    from clipkit.zeroshot.report import write_report

    sets = [open_set(name, data_dir, download) for name in datasets]
    prompts = evaluation.Prompts(
        classes=_class_list(classnames, sets[0].classes) if classnames else None,
        templates=_templates(templates, heads.ensembles()) if templates else None,
        descriptions=_class_names(descriptions) if descriptions else None,
    )
    with distributed.process_group(distributed.choose_device(device)):
        results = evaluation.evaluate_all(
            models, sets, prompts, device, batch_size=batch_size, workers=workers, cache=heads.CACHE
        )
        if distributed.rank():
            return
    if report is not None:
        page = write_report(results, report)
        click.echo(f"{page}", err=True)
    if as_json:
        found = [result.as_dict() for result in results]
        click.echo(json.dumps(found[0] if len(found) == 1 else found))
    else:
        click.echo(evaluation.table(results))


def _templates(given: str, ensembles: dict[str, list[str]]) -> list[str]:
    if given not in ensembles and not Path(given).is_file():
        raise UsageError(f"--templates {given!r} is neither a file nor one of {', '.join(ensembles)}")
    return ensembles.get(given) or _lines(Path(given))


def _class_list(path: Path, found: Sequence[Sequence[str]]) -> list[list[str]]:
    """Names that replace the data set's own: in its order, or keyed by its directory names."""
    data = _json(path) if path.suffix == ".json" else _lines(path)
    if isinstance(data, dict):
        missing = [c[0] for c in found if c[0] not in data and c[0].replace(" ", "_") not in data]
        if missing:
            raise UsageError(f"{path} has no names for class {missing[0]!r} ({len(missing)} missing)")
        data = [data.get(c[0], data.get(c[0].replace(" ", "_"))) for c in found]
    if not isinstance(data, list) or len(data) != len(found):
        size = len(data) if isinstance(data, list) else type(data).__name__
        raise UsageError(f"{path} lists {size} classes; the data set has {len(found)}")
    return [[entry] if isinstance(entry, str) else [str(n) for n in entry] for entry in data]


@cli.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, required=True, help="A description; may be repeated.")
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--out", type=click.Path(path_type=Path), help="Also draw the matrix into this file (PNG, SVG, PDF).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def similarity(
    images: tuple[str, ...], texts: tuple[str, ...], model: str, out: Path | None, device: str, as_json: bool
) -> None:
    """Compare pictures with descriptions: the cosine of each with each.

    \b
    Example:
      clipkit similarity cat.jpg car.jpg --text "a cat" --text "a red car" --model runs/clip --out matrix.png
    """
    from clipkit.pretrained import load
    from clipkit.zeroshot import similarity as room

    pictures = room.read_images(images)
    cosines = room.similarities(load(model, device), pictures, texts)
    if out is not None:
        _save_figure(room.similarity_figure(pictures, texts, cosines), out)
    if as_json:
        click.echo(json.dumps({"images": images, "texts": texts, "cosines": cosines.tolist()}))
        return
    width = max(map(len, texts))
    click.echo(" " * width + "".join(f"  {Path(i).name[-10:]:>10}" for i in images))
    for text, row in zip(texts, cosines.tolist(), strict=True):
        click.echo(f"{text:{width}}" + "".join(f"  {value:10.3f}" for value in row))


@cli.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", required=True, help="Names with commas between them, or a text file, one a line.")
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--templates", default="one", show_default=True, help='"one", "7", "80", or a text file.')
@click.option("--out", type=click.Path(path_type=Path), help="Also draw pictures and bars into this file.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def classify(
    images: tuple[str, ...], labels: str, model: str, templates: str, out: Path | None, device: str, as_json: bool
) -> None:
    """Say which of some labels fits each picture, with probabilities.

    \b
    Example:
      clipkit classify photo.jpg --labels "cat,dog,rocket" --model ViT-B-32/openai --out photo-labels.png
    """
    from clipkit.pretrained import load
    from clipkit.zeroshot import similarity as room
    from clipkit.zeroshot.heads import ensembles

    names = _lines(Path(labels)) if Path(labels).is_file() else [name.strip() for name in labels.split(",")]
    lines, pictures = _templates(templates, ensembles()), room.read_images(images)
    guesses = room.classify(load(model, device), pictures, names, lines)
    if out is not None:
        _save_figure(room.classify_figure(pictures, guesses), out)
    if as_json:
        found = {i: {g.label: g.probability for g in guess} for i, guess in zip(images, guesses, strict=True)}
        click.echo(json.dumps(found))
        return
    for image, guess in zip(images, guesses, strict=True):
        click.echo(f"{image}: " + ", ".join(f"{g.label} {g.probability:.1%}" for g in guess))


def _save_figure(figure: Any, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {out}: {error}") from None
    click.echo(f"{out}", err=True)


@cli.command()
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--shards", required=True, help="A pack with captions (clipkit pack).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def retrieval(model: str, shards: str, device: str, as_json: bool) -> None:
    """Recall@1, 5 and 10 of a pack's captions by its images, and the other way round.

    \b
    Example:
      clipkit retrieval --model runs/clip --shards packs/emoji-val
    """
    from clipkit.pretrained import load
    from clipkit.shards import Shards
    from clipkit.zeroshot import retrieval as room

    clip = load(model, device)
    found = {"shards": shards, "model": model, **room.evaluate(clip.model, clip.tokenizer, Shards(shards))}
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{shards}: {found['n']} images, {found['texts']} captions")
    for way in ("image_to_text", "text_to_image"):
        scores = "   ".join(f"recall@{k} {found[f'{way}_recall@{k}']:.2%}" for k in (1, 5, 10))
        click.echo(f"{way.replace('_', ' ')}   {scores}")


@cli.command()
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def index(images: str, out: Path, model: str, batch_size: int, workers: int, device: str) -> None:
    """Embed a folder of pictures (or a pack), so that they can be searched.

    Interrupted, the same command goes on; under torchrun the ranks share the work.

    \b
    Example:
      clipkit index photos/ indexes/photos --model ViT-B-32/laion2b_s34b_b79k
    """
    _embed(images, out, model, False, batch_size, workers, device)


@cli.command()
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def embed(shards: str, out: Path, model: str, batch_size: int, workers: int, device: str) -> None:
    """Write the embeddings of a pack's images and first captions.

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


@cli.command()
@click.argument("folder", metavar="INDEX")
@click.argument("query")
@click.option("--model", help="Instead of the model that the index was made with: the same, at another place.")
@click.option("-k", type=click.IntRange(min=1), default=12, show_default=True, help="How many are found.")
@click.option("--out", type=click.Path(path_type=Path), help="Also show what was found as a contact sheet (PNG).")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def search(folder: str, query: str, model: str | None, k: int, out: Path | None, device: str, as_json: bool) -> None:
    """Find the pictures of an INDEX that fit QUERY, a description or the file of a picture.

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


@cli.command()
@click.option("--model", required=True, help=_MODEL_HELP)
@click.option("--train", required=True, help="A data set as zeroshot takes it: folder:DIR, shards:DIR ...")
@click.option("--test", required=True, help="The same, to count on.")
@click.option("--shots", type=click.IntRange(min=0), default=0, show_default=True, help="Images a class; 0 is all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the shots.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def probe(model: str, train: str, test: str, shots: int, seed: int, workers: int, device: str, as_json: bool) -> None:
    """Fit a linear classifier on frozen image features: a linear probe, or a few-shot one.

    \b
    Example:
      clipkit probe --model runs/clip --train folder:photos/train --test folder:photos/test --shots 16
    """
    import dataclasses

    from clipkit.pretrained import load
    from clipkit.zeroshot import probe as room
    from clipkit.zeroshot.datasets import open_set

    sets = [open_set(name, Path("data")) for name in (train, test)]
    if list(sets[0].classes) != list(sets[1].classes):
        counts = f"{len(sets[0].classes)} and {len(sets[1].classes)}"
        raise UsageError(f"{train} and {test} must have the same classes; they have {counts}")
    clip = load(model, device)
    known, unknown = (room.features(clip.model, images, workers=workers) for images in sets)
    found = room.probe(known, unknown, len(sets[0].classes), shots, seed)
    if as_json:
        click.echo(json.dumps({"model": model, **dataclasses.asdict(found)}))
        return
    click.echo(f"{found.train} training images, {found.test} test images, {found.classes} classes, C = {found.C:g}")
    click.echo(f"accuracy {found.accuracy:.2%}   on the validation part {found.validation_accuracy:.2%}")


@cli.command("guided-sample")
@click.argument("prompt")
@click.option("--model", required=True, help="Folder that holds the runs clip, denoiser and noisy_clip.")
@click.option("--n", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Sampler steps.")
@click.option("--scale", type=float, default=None, help="Guidance scale; 0 is unguided.  [default: 10]")
@click.option("--sampler", type=click.Choice(["dpmpp-2m", "ddim", "ddpm"]), default="dpmpp-2m", show_default=True)
@click.option("--negative", multiple=True, help="What the pictures should not show; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("grid.png"), show_default=True)
@click.option("--gif", type=click.Path(path_type=Path), help="Also write the denoising as an animation.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def guided_sample(
    prompt: str,
    model: str,
    n: int,
    steps: int,
    scale: float | None,
    sampler: str,
    negative: tuple[str, ...],
    seed: int,
    out: Path,
    gif: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw pictures of PROMPT: a denoiser steered by a noise-aware CLIP.

    Writes a PNG grid whose metadata holds prompt, seed, scale and version, and prints each picture's CLIP score. The
    same seed gives the same bytes on a CPU.

    \b
    Example:
      clipkit guided-sample "a rocket" --model runs/drawings --n 16 --gif rocket.gif
    """
    from clipkit.guidance.draw import Studio, save_gif, save_grid

    studio = Studio.open(model, device)
    drawn = studio.draw(prompt, n=n, steps=steps, scale=scale, sampler=sampler, negative=negative, seed=seed)
    save_grid(drawn, out)
    if gif is not None:
        save_gif(drawn, gif)
    if as_json:
        click.echo(json.dumps({**drawn.about, "out": str(out), "clip_scores": drawn.scores}))
        return
    click.echo(f"{out}: {n} x {prompt!r}, guidance scale {drawn.about['scale']:g}, seed {seed}")
    click.echo("CLIP scores: " + " ".join(f"{s:.3f}" for s in drawn.scores))


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quick", is_flag=True, help="A few steps of everything: shows that it runs, not that it works.")
def demo(out: Path, seed: int, quick: bool) -> None:
    """Run the whole chain on the embedded drawings, with no download.

    Trains a small CLIP and scores it on (object, colour) pairs it never saw, trains a denoiser and a noise-aware CLIP,
    and draws four prompts unguided and guided. Writes grid.png, loss.png and metrics.json into OUT. At most 15 minutes
    on 2 CPU cores; run again, it goes on where it was stopped.

    \b
    Example:
      clipkit demo --out runs/demo
    """
    from clipkit.demo import run

    run(out, seed, quick)


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks in all.")
@click.option("--gpu", default="cpu", show_default=True, help="h100, a100, v100, or cpu: this one.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs that share a node.")
@click.option("--caption-tokens", type=click.IntRange(min=3), default=16, show_default=True, help="Usual length.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def plan(
    recipe: str, overrides: tuple[str, ...], gpus: int, gpu: str, per_node: int, caption_tokens: int, as_json: bool
) -> None:
    """Estimate time and memory of a pretraining step before running it.

    Operations and activations are counted; what a device makes of them is an estimate (docs/scaling.md says how good).
    With --gpu cpu, each rank is taken to have its share of this machine's threads.

    \b
    Example:
      clipkit plan tiny_imagenet_clip.toml run.batch_size=32768 --gpus 256 --gpu h100
    """
    import dataclasses

    from clipkit.config import load_recipe
    from clipkit.errors import did_you_mean
    from clipkit.train import plan as planning
    from clipkit.train.pretrain import PretrainRecipe

    if gpu != "cpu" and gpu not in planning.DEVICES:
        raise UsageError(f"unknown GPU {gpu!r}; {did_you_mean(gpu, ['cpu', *planning.DEVICES])}")
    device = planning.this_cpu(gpus) if gpu == "cpu" else planning.DEVICES[gpu]
    found = planning.plan(load_recipe(PretrainRecipe, recipe, overrides), gpus, device, per_node, caption_tokens)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    for name, value in dataclasses.asdict(found).items():
        shown = f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,.4g}"
        click.echo(f"{name:18s} {shown}")


def _complain(message: str, every_rank: bool) -> None:
    """One line on stderr. What was asked for is wrong on all ranks alike; what happens to one may not to the others."""
    rank = os.environ.get("RANK", "0")
    if every_rank or rank == "0":
        click.echo(f"clipkit: {message}" + (f" [rank {rank}]" if rank != "0" else ""), err=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: runs the command and turns what went wrong into one line and an exit code."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="clipkit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.ClickException as error:
        _complain(f"{' '.join(error.format_message().split())} (see --help)", every_rank=False)
        sys.exit(error.exit_code)
    except ClipkitError as error:
        _complain(str(error), every_rank=not isinstance(error, UsageError))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("clipkit: interrupted; the same command goes on from the last checkpoint", err=True)
        sys.exit(130)
    sys.exit(0)
