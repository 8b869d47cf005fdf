"""Arguments of commands: class names and templates in files, options without effect, and names of registries."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from clipkit.errors import UsageError
from clipkit.inputs import file_of, lines_of, parsed_json, read_text

if TYPE_CHECKING:
    from clipkit.data.classes import Names
    from clipkit.registry import Registry

MODEL_HELP = "A run's folder, weights trained elsewhere, or a published name (see clipkit models)."


class LazyChoice(click.Choice[str]):
    """An option whose values are imported when they are needed."""

    def __init__(self, names: Callable[[], Collection[str]]) -> None:
        self.names, self.case_sensitive = names, True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every name."""
        return tuple(self.names())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """A name, as it is; an error lists all of them."""
        return str(value) if value in self.names() else super().convert(value, param, ctx)


class RegistryCommand(click.Command):
    """A command whose help ends with the entries of registries."""

    def __init__(self, *arguments: Any, registries: Collection[Registry[Any]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.registries = registries

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list of names with their help for each registry."""
        for registry in self.registries:
            with formatter.section(f"{registry.noun.capitalize()}s"):
                formatter.write_dl([(name, registry.entry(name).help) for name in registry])


def refuse_options(names: Collection[str], reason: str) -> None:
    """Raise UsageError if one of these parameters of the current command was given on the command line.

    `reason` ends the sentence "--option has no effect ...".
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[0]} has no effect {reason}; omit it")


def read_class_names(path: Path) -> dict[str, list[str]]:
    """A JSON object of names, or lists of names, by key. Raises UsageError for anything else, naming the key."""
    data = parsed_json(read_text(path), str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path} must map each class folder to its names; found a {type(data).__name__}")
    return _named(path, data)


def read_class_list(path: Path) -> dict[str, list[str]] | list[list[str]]:
    """Names that replace a data set's own: a JSON object or list of names, or lists of them, or lines of text.

    Raises UsageError for anything else, naming the key or the place in the list.
    """
    text = read_text(path)
    if path.suffix.lower() != ".json" and not text.lstrip().startswith(("{", "[")):
        return [[line] for line in lines_of(text, str(path))]
    data = parsed_json(text, str(path))
    if isinstance(data, dict):
        return _named(path, data)
    if not isinstance(data, list):
        raise UsageError(f"{path} must be a list of class names, or map folders to them; found a {type(data).__name__}")
    return [_names(path, f"entry {i}", entry) for i, entry in enumerate(data, 1)]


def _named(path: Path, data: Mapping[str, Any]) -> dict[str, list[str]]:
    if not data:
        raise UsageError(f"{path} is an empty JSON object; it needs names by class")
    return {key: _names(path, repr(key), entry) for key, entry in data.items()}


def _names(path: Path, place: str, entry: Any) -> Names:
    names = [entry] if isinstance(entry, str) else entry
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        shown = json.dumps(entry, ensure_ascii=False)
        raise UsageError(
            f"{path}, {place}: found {shown if len(shown) <= 60 else f'{shown[:57]}...'}; it needs a text that is not "
            "empty, or a list of them"
        )
    return [name.strip() for name in names]


def read_templates(given: str, ensembles: Mapping[str, list[str]]) -> list[str]:
    """A set of templates by its name, or the lines of a file. Raises UsageError for neither, and for bad ones."""
    from clipkit.data.classes import checked_templates

    if given in ensembles:
        return ensembles[given]
    path = file_of(given, "--templates")
    if path is None:
        shown = given if len(given) <= 60 else f"{given[:57]}..."
        raise UsageError(f"--templates {shown!r} is neither a file nor one of {', '.join(ensembles)}")
    return checked_templates(lines_of(read_text(path), str(path)), str(path))


def complete_dataset(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of data sets, for shell completion."""
    from clipkit.registry import DATASETS

    return [name for name in DATASETS if name.startswith(incomplete)]
