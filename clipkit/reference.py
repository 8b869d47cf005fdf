"""Reference of recipe keys: each with its type, default and help, read from the docstrings of dataclass fields.

`clipkit recipe` and the configuration page of the documents are made from it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from clipkit.config import Recipe, keys_of, shipped, to_toml, toml_value
from clipkit.errors import UsageError, did_you_mean
from clipkit.registry import TASKS, Registry


@dataclass(frozen=True)
class Key:
    """A key of a recipe."""

    name: str
    """section.key"""
    type: str
    """As in Python; choices as "a" | "b"."""
    default: str | None
    """In TOML; empty for nothing, None for a key that must be given."""
    help: str
    """One line."""


@dataclass(frozen=True)
class Section:
    """A section of a recipe."""

    name: str
    help: str
    """First line of its dataclass's docstring."""
    keys: tuple[Key, ...]


def recipe_sections(kind: str) -> list[Section]:
    """The sections of a task's recipes, in order. Raises UsageError for an unknown kind."""
    recipe = TASKS[kind].recipe
    hints = typing.get_type_hints(recipe)
    found = []
    for field in dataclasses.fields(recipe):
        config = _dataclass_in(hints[field.name])
        keys = tuple(_keys(config, f"{field.name}."))
        found.append(Section(field.name, (inspect.getdoc(config) or "").split("\n")[0], keys))
    return found


def recipe_keys(kind: str) -> list[Key]:
    """Every key of a task's recipes. Raises UsageError for an unknown kind."""
    return [key for section in recipe_sections(kind) for key in section.keys]


def kind_of(path: str | Path) -> str:
    """The task that a recipe is for, by the end of its name: drawings_noisy_clip.toml -> noisy_clip.

    Raises UsageError when the name ends with no task, or there is no such file.
    """
    stem = Path(path).name.removesuffix(".toml")
    fitting = [kind for kind in TASKS if stem == kind or stem.endswith(f"_{kind}")]
    if not fitting and Path(path).is_file():
        raise UsageError(f"the name of {path} ends with no task ({', '.join(TASKS)}); name the task")
    if not fitting:
        raise UsageError(f"no recipe at {path}; {did_you_mean(stem, shipped())}")
    return max(fitting, key=len)


def summary(path: Path) -> str:
    """A recipe in one clause: the start of the comment at its top, up to a stop, colon or semicolon."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"[:;]|\.(?!\w)", comment)[0].strip()


def annotated_toml(recipe: Recipe, kind: str) -> str:
    """A resolved recipe as TOML, the help of each section and key above it as a comment."""
    helps = {f"[{section.name}]": section.help for section in recipe_sections(kind)}
    for field in dataclasses.fields(recipe):
        section = getattr(recipe, field.name)
        helps |= {f"{field.name}.{name}": text for name, text in _field_docs(section.__class__).items()}
    lines = []
    section_name = ""
    for line in to_toml(recipe).splitlines():
        if line.startswith("["):
            section_name = line.strip("[]")
        name = line if line.startswith("[") else f"{section_name}.{line.partition(' = ')[0]}"
        if name in helps:
            lines += textwrap.wrap(helps[name], 100, initial_indent="# ", subsequent_indent="# ")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _keys(config: type[Any], prefix: str) -> Iterator[Key]:
    for name, hint, field, owner in keys_of(config, prefix):
        yield Key(name, _type(hint), _default(field), _field_docs(owner).get(field.name, ""))


def _dataclass_in(hint: Any) -> type[Any]:
    """The dataclass of a section that may be omitted, or of one that may not."""
    found = next(a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a))
    return typing.cast(type[Any], found)


def _field_docs(config: Any) -> dict[str, str]:
    """Field -> the string that follows it in the source of its dataclass, or of a base class, as one line."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type[Any], base)))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(json.dumps(choice) for choice in arguments)
    if origin is Annotated:
        choices = arguments[1]
        return " | ".join(map(json.dumps, choices)) if isinstance(choices, Registry) else _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _type(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"table of {_type(arguments[1])}"
    return "anything" if hint is Any else str(hint.__name__)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return toml_value(field.default_factory())
    if field.default is dataclasses.MISSING:
        return None
    return "" if field.default is None else toml_value(field.default)
