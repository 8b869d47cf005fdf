"""Write the pages that are made from code: configuration, commands, Python API, architecture.

    python docs/generate.py

A test compares the pages with what this writes, so that they are never older than the code.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from clipkit.cli import cli

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by docs/generate.py from {}; edit that instead. -->\n\n"

# PENDING(train): clipkit.registry.TASKS and clipkit.reference take the place of RECIPES and of field_docstrings
RECIPES = {
    "pretrain": "clipkit.train.pretrain:PretrainRecipe",
    "denoiser": "clipkit.train.denoiser:DenoiserRecipe",
    "noisy-clip": "clipkit.train.noisy_clip:NoisyCLIPRecipe",
    "noisy-classifier": "clipkit.train.noisy_classifier:ClassifierRecipe",
    "autoencoder": "clipkit.train.autoencoder:AutoencoderRecipe",
}
API = ("clipkit", "clipkit.zeroshot", "clipkit.guidance", "clipkit.train")
TREE = ("clipkit", "train", "zeroshot", "guidance")


def cell(text: str) -> str:
    """Text for a cell of a table: on one line, bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def field_docstrings(kind: type) -> dict[str, str]:
    """The string after each field of a dataclass, by the field's name; those of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = str(text.value.value)  # type: ignore[attr-defined]
    return found


def section_of(hint: Any) -> type | None:
    """The dataclass in a field's type, also where it may be None or one of two."""
    return next((a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)), None)  # type: ignore[return-value]


def sections(kind: type, path: str = "") -> Iterator[tuple[str, type]]:
    """(section of the recipe, its dataclass), nested ones after their parents."""
    for name, hint in typing.get_type_hints(kind).items():
        if (inner := section_of(hint)) is not None:
            yield f"{path}{name}", inner
            yield from sections(inner, f"{path}{name}.")


def shown_type(hint: Any) -> str:
    """A type as people write it: the choices of a Literal, else the name."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f'"{choice}"' for choice in typing.get_args(hint))
    return str(getattr(hint, "__name__", hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def shown_default(field: dataclasses.Field[Any]) -> str:
    """A field's default in TOML's spelling, or "required"."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "{}" if value == {} else "[]" if value == () else str(value)
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, str):
        return f'"{field.default}"'
    if isinstance(field.default, tuple):
        return str(list(field.default))
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def configuration() -> str:
    """Every key of every recipe, a table for each section."""
    used: dict[tuple[str, type], list[str]] = {}
    for command, target in RECIPES.items():
        module, _, name = target.partition(":")
        for key in sections(getattr(importlib.import_module(module), name)):
            used.setdefault(key, []).append(command)
    lines = [
        NOTE.format("the recipes' dataclasses") + "# Configuration\n",
        "A recipe is a TOML file of typed sections and keys. `section.key=value` words after it override keys and",
        "`--dry-run` prints the result. Unknown keys, wrong types and values outside their range are refused by name.",
        "`clipkit recipe --keys` prints this page in a terminal.\n",
    ]
    for (path, kind), commands in used.items():
        everywhere = len(commands) == len(RECIPES)
        lines.append(f"## [{path}]{'' if everywhere else ' of ' + ', '.join(commands)}\n")
        lines.append(f"{' '.join((kind.__doc__ or '').split())}\n")
        lines.append("| key | type | default | meaning |\n|---|---|---|---|")
        docs, hints = field_docstrings(kind), typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if section_of(hints[field.name]) is None:
                what = f"`{cell(shown_type(hints[field.name]))}` | `{cell(shown_default(field))}`"
                lines.append(f"| `{path}.{field.name}` | {what} | {cell(docs[field.name])} |")
        lines.append("")
    return "\n".join(lines)


def help_text(text: str) -> str:
    r"""Click's help as Markdown: what stands after \b is a block of code."""
    parts = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if block.startswith("\b"):
            title, *rest = block[1:].strip("\n").splitlines()
            parts.append(f"{title}\n\n```sh\n{textwrap.dedent(chr(10).join(rest))}\n```")
        else:
            parts.append(block)
    return "\n\n".join(parts)


def options(command: click.Command) -> Iterator[str]:
    """A row for each option."""
    context = click.Context(command)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            record = parameter.get_help_record(context)
            if record is None:
                raise SystemExit(f"{command.name} {parameter.opts} is hidden or has no help")
            yield f"| `{cell(record[0])}` | {cell(record[1]) or '-'} |"


def commands() -> str:
    """Every command: usage, help, options."""
    lines = [NOTE.format("the commands") + "# Commands\n"]
    lines.append(
        "`clipkit --help` lists the commands, `clipkit COMMAND --help` prints its part of this page. Exit codes:"
    )
    lines.append("0 success, 1 failure, 2 a wrong command, 3 diverged training, 130 interrupted.\n")
    for name in sorted(cli.commands):
        command = cli.commands[name]
        usage = " ".join(command.collect_usage_pieces(click.Context(command)))
        lines += [f"## {name}\n", f"```text\nclipkit {name} {usage}\n```\n", help_text(command.help or ""), ""]
        if rows := list(options(command)):
            lines += ["| option | meaning |\n|---|---|", *rows, ""]
    return "\n".join(lines)


def undocumented(found: Any) -> Iterator[str]:
    """The public methods and properties that a class defines without a docstring; `forward` is called by torch."""
    for name, member in vars(found).items() if inspect.isclass(found) else ():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        is_method = inspect.isroutine(function) or isinstance(function, property | cached_property)
        if is_method and not name.startswith("_") and name != "forward" and not function.__doc__:
            yield name


def api() -> str:
    """The public names of each package, for mkdocstrings. Exits when one of them has no docstring."""
    lines = [NOTE.format("`__all__` of the packages") + "# Python API\n"]
    lines.append(
        "These names are public: they change only with notice (CONTRIBUTING.md). Every other module may change.\n"
    )
    for package in API:
        module = importlib.import_module(package)
        lines += [f"## {package}\n", f"{' '.join((module.__doc__ or '').split())}\n"]
        for name in sorted(getattr(module, "__all__", ())):
            found = getattr(module, name)
            if not (inspect.isclass(found) or inspect.isroutine(found)):
                continue  # constants stand in the text of the module
            for public in (name, *(f"{name}.{member}" for member in undocumented(found))):
                if public != name or not inspect.getdoc(found):
                    raise SystemExit(f"{package}.{public} is public and has no docstring")
            lines.append(f"::: {found.__module__}.{found.__qualname__}\n")
    return "\n".join(lines)


def first_line(file: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def tree(folder: Path, depth: int = 0) -> Iterator[str]:
    """A line for each module of a folder, then those of the folders in it; links are other rooms."""
    indent = "  " * depth
    yield f"{indent}{folder.name}/".ljust(27) + first_line(folder / "__init__.py")
    for file in sorted(folder.glob("*.py")):
        if not file.name.startswith("__"):
            yield f"{indent}  {file.name}".ljust(27) + first_line(file)
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and (inner / "__init__.py").is_file():
            yield from tree(inner, depth + 1)


def architecture() -> str:
    """The hand-written beginning of the page, and the tree of modules below it."""
    page = ROOT / "docs" / "architecture.md"
    above, mark, _ = page.read_text(encoding="utf-8").partition("## Modules\n")
    lines = [line.rstrip() for room in TREE for line in tree(ROOT / room)]
    note = "From the first lines of the modules' docstrings (`python docs/generate.py`)."
    return "\n".join([f"{above}{mark}", note, "", "```text", *lines, "```"])


PAGES: dict[str, Callable[[], str]] = {
    "reference/configuration.md": configuration,
    "reference/commands.md": commands,
    "reference/python.md": api,
    "architecture.md": architecture,
}


def page(name: str) -> str:
    """The text of a generated page."""
    return PAGES[name]().rstrip("\n") + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / "docs" / name).write_text(page(name), encoding="utf-8")
