"""pack, verify, inspect: from images and captions to shards, and a look into them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from clipkit.commands.given import read_class_names, read_templates, refuse_options
from clipkit.errors import UsageError, did_you_mean
from clipkit.inputs import check_file, print_json


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classnames", type=click.Path(path_type=Path), help="JSON: class folder -> list of names, or name.")
@click.option("--templates", help='Text file, one caption template with {} a line; or "one", "7", "80".')
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Table with the columns image,caption.")
@click.option("--shard-size", type=click.IntRange(min=1), default=10_000, show_default=True, help="Samples a shard.")
@click.option("--holdout", type=click.IntRange(min=0), default=0, help="Samples set aside in OUT-val.")
@click.option(
    "--resize", type=click.IntRange(min=0), default=0, help="Reduce the shorter side of larger images to this."
)
@click.option("--encode", type=click.Choice(["jpeg", "png", "webp"]), help="Encode the images anew.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of new JPEG and WebP.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Decides captions and drawings."
)
@click.option(
    "--split",
    default="train",
    show_default=True,
    help="drawings: train, val, heldout; scenes: also relations; pictograms: train, heldout; NAME: train, test.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=12_000, show_default=True, help="drawings, scenes: number."
)
@click.option("--size", type=click.IntRange(min=8), default=24, show_default=True, help="Pixels of what is rendered.")
@click.option("--variants", type=click.IntRange(min=1), default=4, show_default=True, help="Samples of a pictogram.")
@click.option("--photographs", help="Pack whose pictures pictograms are laid on, instead of plain colours.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), default=Path("data"), show_default=True, help="NAME: place."
)
@click.option("--download", is_flag=True, help="NAME: fetch it into --data-dir if it is not there.")
def pack(
    source: str,
    out: Path,
    classnames: Path | None,
    templates: str | None,
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
    variants: int,
    photographs: str | None,
    data_dir: Path,
    download: bool,
) -> None:
    """Pack captioned images into shards with an index.

    SOURCE is a folder or tar laid out <class>/<image>, or a folder or tar of images with --csv, or the word
    "drawings" for the embedded data set or "scenes" for rendered scenes of one to three objects, or pictograms:DIR
    (captions.csv and transparent images), or a NAME that zeroshot knows (fashion-mnist, cifar100 ...). Images are kept
    byte for byte unless --resize or --encode says otherwise. The class is the first folder, as for torchvision's
    ImageFolder. What is not taken is counted by reason. Interrupted, the same command resumes after the last whole
    shard.

    \b
    Examples:
      clipkit pack photos/ packs/photos --classnames names.json
      clipkit pack emoji.tar.xz packs/emoji --csv captions.csv --holdout 500
      clipkit pack drawings packs/drawings --count 20000
      clipkit pack scenes packs/scenes --count 20000 --size 48
      clipkit pack fashion-mnist packs/fashion-mnist --download
    """
    from clipkit import sources
    from clipkit.files import counted
    from clipkit.inputs import check_writable
    from clipkit.pack import Encoding, holdout_of
    from clipkit.pack import pack as write
    from clipkit.pictograms import pictograms_source
    from clipkit.shards import Shards
    from clipkit.zeroshot.datasets import as_source, known, open_set
    from clipkit.zeroshot.heads import ensembles

    is_named = source in known() and not Path(source).exists()
    kind, colon, place = source.partition(":")
    pictograms = Path(place) if colon and kind == "pictograms" else None
    if source not in _RENDERED and pictograms is None and not is_named and not Path(source).exists():
        raise UsageError(
            f"no folder or tar at {source}, nor a data set; {did_you_mean(source, [*_RENDERED, *known()])}"
        )
    if Path(source).suffix.lower() in (".csv", ".tsv") and Path(source).is_file():
        raise UsageError(f"{source} is a table; give the folder or tar of its pictures, and --csv {source}")
    _refuse_options(source, pictograms is not None, is_named, table is not None)
    if encode == "png" or not (encode or resize):
        refuse_options(["quality"], "on PNGs" if encode else "on images that are kept (see --resize and --encode)")
    for folder in (out, holdout_of(out))[: 1 + bool(holdout)]:
        check_writable(folder)
    if source == "drawings":
        data = sources.drawings_source(split, count, size, seed)
    elif source == "scenes":
        data = sources.scenes_source(split, count, size, seed)
    elif pictograms is not None:
        behind = Shards(photographs) if photographs else None
        data = pictograms_source(pictograms, split, size, variants, seed, behind)
    elif is_named:
        if split not in ("train", "test"):
            raise UsageError(f"--split is {split!r}; {source} has train and test")
        data = as_source(open_set(source, data_dir, download, training=split == "train"), seed)
    elif table is not None:
        data = sources.csv_source(table, Path(source))
    else:
        lines = read_templates(templates, ensembles()) if templates else sources.DEFAULT_TEMPLATES
        data = sources.class_source(Path(source), read_class_names(classnames) if classnames else None, lines, seed)
    index = write(data, out, shard_size, holdout, Encoding(resize, encode or "", quality))
    skipped = counted(index["skipped"])
    click.echo(f"{out}: {index['samples']} samples in {len(index['shards'])} shards; skipped: {skipped}")


_RENDERED = ("drawings", "scenes")


def _refuse_options(source: str, is_pictograms: bool, is_named: bool, has_table: bool) -> None:
    """Refuse options that do nothing for this kind of source."""
    named, written = ["data_dir", "download"], ["classnames", "templates", "table"]
    drawn = ["count", "size", "variants", "photographs"]
    if source in _RENDERED:
        refuse_options([*named, *written, "variants", "photographs"], f"on {source}")
    elif is_pictograms:
        refuse_options([*named, *written, "count"], "on pictograms, which have their own names and captions")
    elif is_named:
        refuse_options([*drawn, *written], f"on {source}, which has its own names and templates")
    elif has_table:
        refuse_options([*named, *drawn, "split", "classnames", "templates", "seed"], "with --csv")
    else:
        refuse_options([*named, *drawn, "split"], "on a folder or tar")


@click.command()
@click.argument("shards")
@click.option("--samples", type=click.IntRange(min=0), default=16, show_default=True, help="Decoded of each shard.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def verify(shards: str, samples: int, as_json: bool) -> None:
    """Check a pack against its index.

    Sizes, hashes and structure of all shards, and whether some of the images decode.

    SHARDS is a folder made by `clipkit pack`, or the URL of one. Exit code 1 when something is wrong.

    \b
    Example:
      clipkit verify packs/photos
    """
    import dataclasses

    from clipkit import inspection

    report = inspection.verify(shards, samples)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        click.echo(f"{report.source}: {report.samples} samples in {report.shards} shards")
        for name, count in report.skipped.items():
            click.echo(f"  not taken into the index: {count} {name}")
        for name, problem in report.damaged.items():
            click.echo(f"  {name}: {problem}")
        for reason, count in report.incomplete.items():
            click.echo(f"  {count} of {report.samples} samples: {reason}")
        for reason, count in report.bad.items():
            click.echo(f"  {count} of {report.decoded} decoded samples: {reason}")
        good = f"sound: every hash is right, {report.decoded} samples decoded"
        unsound = report.bad or report.incomplete
        click.echo(f"{len(report.damaged)} damaged shards" if report.damaged else "not sound" if unsound else good)
    if report.damaged or report.bad or report.incomplete:
        sys.exit(1)


@click.command()
@click.argument("shards")
@click.option("-n", "--n", "count", type=click.IntRange(min=1), default=16, show_default=True, help="Samples shown.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Decides which.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("sheet.png"), show_default=True)
def inspect(shards: str, count: int, seed: int, out: Path) -> None:
    """Show random samples of a pack and their captions.

    \b
    Example:
      clipkit inspect packs/photos -n 16 --out sheet.png
    """
    from clipkit.inspection import sheet
    from clipkit.shards import Shards

    check_file(out, [".png"])
    pack = Shards(shards, verify=False)
    picture = sheet(pack, count, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, "PNG")
    click.echo(f"{out}: {min(count, len(pack))} samples of {shards}")
