"""Lazy attributes of packages (PEP 562): a public name's module is imported when the name is first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package; `homes` lists names by module, submodules under the package itself."""
    modules = {name: module for module, names in homes.items() for name in names}

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        return import_module(f"{package}.{name}") if module == package else getattr(import_module(module), name)

    def names() -> list[str]:
        return sorted({*modules, *vars(sys.modules[package]).get("__all__", ())})

    return attribute, names
