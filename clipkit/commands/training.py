"""The command of each trainable task; recipe, plan, demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import click

from clipkit.errors import RecipeError, UsageError
from clipkit.inputs import print_json
from clipkit.registry import TASKS, task_entry

_RECIPE_HELP = """
    RECIPE is a TOML file or the name of a shipped recipe; OVERRIDES are section.key=value words, and `clipkit recipe`
    explains the keys. The same command resumes an interrupted run."""


def training_command(kind: str) -> click.Command:
    """The command that trains a task of the registry."""
    entry = task_entry(kind)

    def command(recipe: str, overrides: Sequence[str], dry_run: bool) -> None:
        try:
            TASKS[kind].run(recipe, overrides, dry_run)
        except RecipeError as error:
            raise RecipeError(f"{error}{_other_task(recipe, kind)}") from None

    command.__doc__ = (
        f"{entry.help}\n{_RECIPE_HELP}\n\n    \b\n    Example:\n"
        f"      clipkit {entry.command} {entry.example} run.steps=500\n    "
    )
    decorated: Callable[..., None] = click.argument("overrides", nargs=-1)(command)
    decorated = click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop.")(decorated)
    return click.command(entry.command)(click.argument("recipe")(decorated))


def _other_task(recipe: str, kind: str) -> str:
    """The end of a message about a recipe whose name is that of another task's; empty for any other."""
    from clipkit.reference import kind_of

    with suppress(UsageError):
        if (other := kind_of(recipe)) != kind:
            return f" (by its name, it is a recipe of `clipkit {task_entry(other).command}`)"
    return ""


@click.command()
@click.argument("name", default="")
@click.argument("overrides", nargs=-1)
@click.option("--keys", is_flag=True, help="List the keys of all recipes instead, with type, default and help.")
@click.option("--task", help="Task that NAME is for, if its name does not end with it; or whose keys to list.")
def recipe(name: str, overrides: tuple[str, ...], keys: bool, task: str | None) -> None:
    """Print a recipe with the help of each key.

    NAME is a TOML file or the name of a shipped recipe; OVERRIDES are section.key=value words. Every key is printed,
    also those that the file leaves at their defaults: the output is a recipe too. Without NAME, the shipped recipes are
    listed, each with a summary.

    \b
    Example:
      clipkit recipe drawings_clip.toml run.steps=500
    """
    from clipkit import reference
    from clipkit.config import SHIPPED, load_recipe, shipped

    if task and not (keys or name):
        raise UsageError("--task is for a recipe or for --keys; give one of them, or omit it")
    if keys and name:
        raise UsageError(f"--keys lists the keys of all recipes; omit it, or {name}")
    if keys:
        _print_keys([task] if task else [kind for kind in TASKS if _can_be_imported(kind)])
    elif not name:
        for shipped_name in shipped():
            click.echo(f"{shipped_name:28s}{reference.summary(SHIPPED / f'{shipped_name}.toml')}")
    else:
        kind = task or reference.kind_of(name)
        click.echo(reference.annotated_toml(load_recipe(TASKS[kind].recipe, name, overrides), kind), nl=False)


def _can_be_imported(kind: str) -> bool:
    """Whether a task can be imported. If not, say why on stderr."""
    from clipkit.log import remark

    try:
        return bool(TASKS[kind])
    except UsageError as error:
        remark(f"clipkit: {error}")
        return False


def _print_keys(kinds: Sequence[str]) -> None:
    """The keys of these tasks' recipes; sections that several have, once."""
    from clipkit.reference import Section, recipe_sections

    users: dict[Section, list[str]] = {}
    for kind in kinds:
        for section in recipe_sections(kind):
            users.setdefault(section, []).append(kind)
    for section, tasks in users.items():
        click.echo(f"[{section.name}] of {', '.join(tasks)}: {section.help}")
        for key in section.keys:
            default = "required" if key.default is None else f"default {key.default or 'none'}"
            click.echo(f"  {key.name}  ({key.type}, {default})")
            click.echo(click.wrap_text(key.help, 100, "      ", "      "))


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Number of ranks.")
@click.option("--gpu", default="cpu", show_default=True, help="h100, a100, v100, or cpu for this machine's.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a node.")
@click.option(
    "--caption-tokens",
    type=click.IntRange(min=3),
    default=16,
    show_default=True,
    help="Tokens of a usual caption.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    recipe: str, overrides: tuple[str, ...], gpus: int, gpu: str, per_node: int, caption_tokens: int, as_json: bool
) -> None:
    """Estimate time and memory of a pretraining step.

    Operations and activations are counted; the time on a device is an estimate (docs/scaling.md says how good).
    With --gpu cpu, each rank is taken to have its share of this machine's threads. If the recipe's packs are here,
    loading them is timed on this machine too.

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
    asked = load_recipe(PretrainRecipe, recipe, overrides)
    loading = planning.loading_time(asked)
    found = planning.plan(asked, gpus, device, per_node, caption_tokens, loading)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for name, value in dataclasses.asdict(found).items():
        if value is None:
            shown = f"not known: cannot be read here: {', '.join((asked.data.shards, *asked.data.mix))}"
        else:
            shown = f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,.4g}"
        click.echo(f"{name:19s} {shown}")


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder of packs, runs and pictures.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of training and drawing."
)
@click.option("--quick", is_flag=True, help="A few steps of everything, to see that it runs; the pictures are noise.")
def demo(out: Path, seed: int, quick: bool) -> None:
    """Run the whole chain on embedded drawings.

    Nothing is downloaded.

    Trains a small CLIP and scores it on held-out (object, colour) pairs, trains a denoiser and a noise-aware CLIP,
    and draws four prompts unguided and guided. Writes grid.png, loss.png and metrics.json into OUT. Some 15 minutes
    on 2 CPU cores; interrupted, the same command resumes.

    \b
    Example:
      clipkit demo --out runs/demo
    """
    from clipkit.demo import run
    from clipkit.inputs import check_writable

    check_writable(out)
    run(out, seed, quick)
