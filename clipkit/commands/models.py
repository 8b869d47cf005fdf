"""models, export, average, release: published models, and weights for others."""

from __future__ import annotations

from pathlib import Path

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP, LazyChoice, RegistryCommand
from clipkit.errors import UsageError
from clipkit.inputs import print_json
from clipkit.registry import EXPORT_FORMATS


@click.command()
@click.argument("pattern", default="")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, name to hub repository.")
def models(pattern: str, as_json: bool) -> None:
    """List published models.

    With PATTERN those whose names contain it.

    A command's --model and a recipe's finetune.init_from take one of these names, which is fetched from the Hugging
    Face hub once; "hf-hub:organisation/name"; a folder with open_clip_config.json, or of transformers' CLIP or
    SigLIP; a file of OpenAI's; or the folder of a run.

    \b
    Example:
      clipkit models ViT-B-32
    """
    from clipkit.convert import hub

    found = {name: published.repository for name, published in hub.known().items() if pattern.lower() in name.lower()}
    if not found:
        raise UsageError(f"no published model has {pattern!r} in its name; `clipkit models` lists them all")
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, repository in found.items():
        click.echo(f"{name:{width}}  {repository}")


@click.command(cls=RegistryCommand, registries=[EXPORT_FORMATS])
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=LazyChoice(EXPORT_FORMATS.keys),
    default="open_clip",
    show_default=True,
    help="Format; see below.",
)
@click.option("--push", help="Also upload OUT as this hub repository, organisation/name, with a model card.")
def export(model: str, out: Path, form: str, push: str | None) -> None:
    """Write a model for other libraries.

    open_clip and transformers read their folders with equal features; onnx and torch write two graphs, from uint8
    pixels and from token ids to unit vectors. open_clip takes models whose image encoder is timm's or OpenAI's,
    transformers those with its own ViT; onnx and torch take every model, also clipkit-tiny. OUT is a new folder, or one
    with an earlier export in this format.

    \b
    Example:
      clipkit export --model runs/clip exported/clip --format onnx
    """
    from clipkit.convert import hub
    from clipkit.convert.export import check_place
    from clipkit.convert.export import export as write
    from clipkit.models.pretrained import load

    check_place(out, form)
    clip = load(model, "cpu")
    for path in write(clip, out, form, push or ""):
        click.echo(f"{path}")
    if push is not None:
        click.echo(hub.push(clip.model, out, push))


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shares", default="", help="One for each model, with commas between them.  [default: equal ones]")
def average(models: tuple[str, ...], out: Path, shares: str) -> None:
    """Average the weights of several CLIPs.

    MODELS are two or more, runs or published, that started from the same weights: a fine-tuned CLIP and its original
    (WiSE-FT), or several fine-tuned ones (a model soup). The average is as fast as each, and often better. Shares are
    divided by their sum. OUT is a new folder; --model takes it as it takes a run.

    \b
    Examples:
      clipkit average runs/clip runs/tuned runs/between --shares 0.3,0.7
      clipkit average runs/tuned ViT-B-32/laion2b_s34b_b79k runs/between
    """
    from clipkit.train.averaging import average as write

    try:
        wanted = [float(word) for word in shares.split(",")] if shares else []
    except ValueError:
        raise UsageError(f"--shares is {shares!r}; it must be numbers, such as 0.3,0.7") from None
    write(models, out, wanted)
    click.echo(f"{out}")


@click.command()
@click.argument("runs", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def release(runs: Path, out: Path) -> None:
    """Write the weights of runs for publication.

    Those of RUNS into OUT: the exponential moving average, in half precision, without the optimizer's state.

    RUNS is a run, or a folder of runs that are named after their tasks: clip, denoiser, noisy_clip, ... --model takes
    OUT as it takes RUNS.

    \b
    Example:
      clipkit release runs/drawings drawings-1.0
    """
    from clipkit.convert.release import release as write

    for folder in write(runs, out):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        click.echo(f"{folder}: {size / 1e6:.1f} MB")
