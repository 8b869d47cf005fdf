"""Commands pack, verify, inspect: write packs, check them, look at their samples."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path
from typing import Any

import click

from clipkit.commands.arguments import RegistryCommand, read_class_names, read_templates, refuse_options
from clipkit.errors import UsageError, did_you_mean
from clipkit.inputs import check_file, plural, print_json
from clipkit.registry import DATASETS, SOURCES


@click.command(cls=RegistryCommand, registries=[SOURCES])
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--classnames", "classes", type=click.Path(path_type=Path), help="JSON: class folder -> list of names, or name."
)
@click.option("--templates", help='Text file, one caption template with {} a line; or "one", "7", "80".')
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Table with the columns image,caption.")
@click.option("--shard-size", type=click.IntRange(min=1), default=10_000, show_default=True, help="Samples per shard.")
@click.option("--holdout", type=click.IntRange(min=0), default=0, help="Samples held out in OUT-val.")
@click.option(
    "--resize", type=click.IntRange(min=0), default=0, help="Reduce the shorter side of larger images to this."
)
@click.option("--encode", type=click.Choice(["jpeg", "png", "webp"]), help="Re-encode the images.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Quality of re-encoded JPEG and WebP."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of captions and renderings."
)
@click.option(
    "--split",
    default="train",
    show_default=True,
    help="drawings: train, val, heldout; scenes: also relations; pictograms: train, heldout; data sets: train, test.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=12_000, show_default=True, help="Number of rendered samples."
)
@click.option("--size", type=click.IntRange(min=8), default=24, show_default=True, help="Pixels of rendered samples.")
@click.option("--photographs", help="A pack: pictograms are composited on its images instead of plain colours.")
@click.option(
    "--variants", type=click.IntRange(min=1), default=4, show_default=True, help="Samples made of each pictogram."
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Folder of downloaded data sets.",
)
@click.option("--download", is_flag=True, help="Fetch a data set into --data-dir if it is not there.")
def pack(
    source: str,
    out: Path,
    shard_size: int,
    holdout: int,
    resize: int,
    encode: str | None,
    quality: int,
    **options: Any,
) -> None:
    """Pack captioned images into shards with a manifest.

    SOURCE is a folder or tar laid out <class>/<image>, or a folder or tar of images with --csv, or the name of a data
    set (fashion-mnist, cifar100 ...), or a source listed below: NAME, or NAME:FOLDER where it reads one. Images are
    kept byte for byte unless --resize or --encode is given. The class is the first folder, as for torchvision's
    ImageFolder. Skipped files are counted by reason. After an interruption the same command resumes after the last
    complete shard.

    \b
    Examples:
      clipkit pack photos/ packs/photos --classnames names.json
      clipkit pack emoji.tar.xz packs/emoji --csv captions.csv --holdout 500
      clipkit pack drawings packs/drawings --count 20000
      clipkit pack pictograms:pictograms/ packs/pictograms --size 64
      clipkit pack fashion-mnist packs/fashion-mnist --download
    """
    from clipkit.data.files import counted
    from clipkit.data.pack import Encoding, holdout_of
    from clipkit.data.pack import pack as write
    from clipkit.inputs import check_writable

    kind, place = _kind_of(source, options["table"] is not None)
    taken = _options_of(kind, source)
    if encode == "png" or not (encode or resize):
        refuse_options(["quality"], "on PNGs" if encode else "on images that are kept (see --resize and --encode)")
    for folder in (out, holdout_of(out))[: 1 + bool(holdout)]:
        check_writable(folder)
    given = {"source": place, **_read_options(options)}
    data = SOURCES[kind](**{name: given[name] for name in taken})
    manifest = write(data, out, shard_size, holdout, Encoding(resize, encode or "", quality))
    samples = plural(manifest["samples"], "sample")
    shards = plural(len(manifest["shards"]), "shard")
    click.echo(f"{out}: {samples} in {shards}; skipped: {counted(manifest['skipped'])}")


def _kind_of(source: str, has_table: bool) -> tuple[str, str | Path]:
    """Name of the source that SOURCE means, and the place that it reads. Raises UsageError for anything else."""
    name, colon, place = source.partition(":")
    if name in SOURCES and ("source" in _parameters(name)) == bool(colon):
        if name == "csv" and not has_table:
            raise UsageError(f"{source} needs a table of captions; give --csv TABLE")
        return name, Path(place)
    if Path(source).suffix.lower() in (".csv", ".tsv") and Path(source).is_file():
        raise UsageError(f"{source} is a table; give the folder or tar of its images, and --csv {source}")
    if Path(source).exists():
        return ("csv" if has_table else "folder"), Path(source)
    if source in DATASETS:
        return "dataset", source
    of_places = [name for name in SOURCES.own if "source" in _parameters(name)]
    names = [*(f"{name}:FOLDER" if name in of_places else name for name in SOURCES), *DATASETS]
    raise UsageError(f"no folder or tar at {source}, nor a data set; {did_you_mean(source, names)}")


def _parameters(kind: str) -> list[str]:
    return list(signature(SOURCES[kind]).parameters)


def _options_of(kind: str, source: str) -> list[str]:
    """Options that this kind of source takes. Raises UsageError if another was given on the command line."""
    command = click.get_current_context().command
    common = {"source", "out", "shard_size", "holdout", "resize", "encode", "quality"}
    options = [parameter.name for parameter in command.params if parameter.name not in common]
    taken = _parameters(kind)
    if unknown := [name for name in taken if name not in ("source", *options)]:
        raise UsageError(f"the source {kind!r} takes {unknown[0]!r}, which is no option of clipkit pack")
    where = {"folder": "on a folder or tar", "csv": "with --csv"}.get(kind, f"on {source}")
    refuse_options([name for name in options if name and name not in taken], where)
    return taken


def _read_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with class names and templates read from their files."""
    from clipkit.data.shards import Shards
    from clipkit.data.sources import DEFAULT_TEMPLATES
    from clipkit.zeroshot.heads import ensembles

    classes, templates, photographs = (options[name] for name in ("classes", "templates", "photographs"))
    return {
        **options,
        "photographs": Shards(photographs) if photographs else None,
        "classes": read_class_names(classes) if classes else None,
        "templates": read_templates(templates, ensembles()) if templates else DEFAULT_TEMPLATES,
    }


@click.command()
@click.argument("shards")
@click.option("--samples", type=click.IntRange(min=0), default=16, show_default=True, help="Decoded samples per shard.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def verify(shards: str, samples: int, as_json: bool) -> None:
    """Check a pack against its manifest.

    Checked are the sizes, checksums and structure of all shards, and whether some of their images decode.
    SHARDS is a folder made by `clipkit pack`, or the URL of one. Exit code 1 for a damaged pack.

    \b
    Example:
      clipkit verify packs/photos
    """
    import dataclasses

    from clipkit.data import inspection

    report = inspection.verify(shards, samples)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        click.echo(f"{report.source}: {plural(report.samples, 'sample')} in {plural(report.shards, 'shard')}")
        for name, count in report.skipped.items():
            click.echo(f"  skipped when it was made: {count} {name}")
        for name, problem in report.damaged.items():
            click.echo(f"  {name}: {problem}")
        for reason, count in report.incomplete.items():
            click.echo(f"  {count} of {report.samples} samples: {reason}")
        for reason, count in report.bad.items():
            click.echo(f"  {count} of {report.decoded} decoded samples: {reason}")
        good = f"sound: every checksum is right, {plural(report.decoded, 'sample')} decoded"
        unsound = report.bad or report.incomplete
        click.echo(plural(len(report.damaged), "damaged shard") if report.damaged else "not sound" if unsound else good)
    if report.damaged or report.bad or report.incomplete:
        sys.exit(1)


@click.command()
@click.argument("shards")
@click.option("-n", "--n", "count", type=click.IntRange(min=1), default=16, show_default=True, help="Samples shown.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the choice.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("sheet.png"), show_default=True, help="PNG to write."
)
def inspect(shards: str, count: int, seed: int, out: Path) -> None:
    """Show random samples of a pack and their captions.

    \b
    Example:
      clipkit inspect packs/photos -n 16 --out sheet.png
    """
    from clipkit.data.inspection import sheet
    from clipkit.data.shards import Shards

    check_file(out, [".png"])
    pack = Shards(shards, verify=False)
    picture = sheet(pack, count, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, "PNG")
    click.echo(f"{out}: {plural(min(count, len(pack)), 'sample')} of {shards}")
