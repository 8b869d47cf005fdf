"""Write the pages that are made from code: configuration, commands, Python API, architecture, renamed names.

    python docs/generate.py

A test compares the pages with what this writes, so that they are never older than the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from clipkit._renamed import MODULES, NAMES
from clipkit.cli import cli
from clipkit.config import RENAMED
from clipkit.reference import Section, recipe_sections
from clipkit.registry import TASKS, task_entry

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by docs/generate.py from {}; edit that instead. -->\n\n"

API = ("clipkit", "clipkit.zeroshot", "clipkit.guidance", "clipkit.train")
TREE = ("clipkit", "train", "zeroshot", "guidance")


def cell(text: str) -> str:
    """Text for a cell of a table: on one line, bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def configuration() -> str:
    """Every key of every recipe, a table for each section."""
    used: dict[Section, list[str]] = {}
    for kind in TASKS.own:
        for section in recipe_sections(kind):
            used.setdefault(section, []).append(task_entry(kind).command)
    lines = [
        NOTE.format("the recipes' dataclasses") + "# Configuration\n",
        "A recipe is a TOML file of typed sections and keys. `section.key=value` words after it override keys and",
        "`--dry-run` prints the result. Unknown keys, wrong types and values outside their range are refused by name; "
        "keys of version 0.1 still work ([Changelog](../changelog.md)).",
        "`clipkit recipe --keys` prints these tables in a terminal, `clipkit recipe NAME` a recipe with help.\n",
    ]
    for section, commands in used.items():
        of = "" if len(commands) == len(TASKS.own) else f" of {', '.join(commands)}"
        lines += [f"## [{section.name}]{of}\n", f"{section.help}\n"]
        lines.append("| key | type | default | meaning |\n|---|---|---|---|")
        for key in section.keys:
            default = "required" if key.default is None else f"`{cell(key.default)}`" if key.default else ""
            lines.append(f"| `{key.name}` | {cell(key.type)} | {default} | {cell(key.help)} |")
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
            target = f"{found.__module__}.{found.__qualname__}"
            lines.append(f"`{name}`: see above\n" if f"::: {target}\n" in lines else f"::: {target}\n")
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


def changelog() -> str:
    """The changelog; the tables of its version 0.2 are those of the former names that still work, until 0.3."""
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    above, mark, rest = page.partition("### Renamed recipe keys\n")
    names = [(module, old, new.replace(":", ".")) for module in sorted(NAMES) for old, new in NAMES[module].items()]
    tables = (
        (f"{mark}\nA former key works, with one message.\n\n| former | present |", sorted(RENAMED.items())),
        ("### Renamed names\n\n| module | former | present |", names),
        ("### Renamed modules\n\n| former | present |", sorted(MODULES.items())),
    )
    lines = [above.rstrip("\n"), ""]
    for head, rows in tables:
        columns = head.rpartition("\n")[2].count("|") - 1
        lines += [head, "|" + "---|" * columns, *("| " + " | ".join(f"`{c}`" for c in row) + " |" for row in rows), ""]
    return "\n".join(lines) + rest[rest.index("\n## ") :]


PAGES: dict[str, Callable[[], str]] = {
    "reference/configuration.md": configuration,
    "reference/commands.md": commands,
    "reference/python.md": api,
    "architecture.md": architecture,
    "../CHANGELOG.md": changelog,
}


def page(name: str) -> str:
    """The text of a generated page."""
    return PAGES[name]().rstrip("\n") + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / "docs" / name).write_text(page(name), encoding="utf-8")
