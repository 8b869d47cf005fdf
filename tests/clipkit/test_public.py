"""The public API: what `__all__` lists is importable, documented and light to import."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ("clipkit", "clipkit.train", "clipkit.zeroshot", "clipkit.guidance", "clipkit.guidance.metrics")


def imported_for_types(package):
    """Names that a package imports under `if TYPE_CHECKING`, by module."""
    tree = ast.parse(Path(import_module(package).__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {node.module: sorted(name.name for name in node.names) for node in block.body}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_listed_is_importable_and_documented(package):
    found = import_module(package)
    assert sorted(found.__all__) == found.__dir__() == sorted(dir(found))
    for name in found.__all__:
        thing = getattr(found, name)
        assert isinstance(thing, str) or (thing.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = found.nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_names_that_are_imported_lazily(package):
    found = import_module(package)
    assert {module: sorted(names) for module, names in found._HOMES.items()} == imported_for_types(package)
    lazily = {name for names in found._HOMES.values() for name in names}
    assert set(found.__all__) - lazily <= {"DEFAULT_MODEL", "__version__"}


def test_importing_the_packages_is_light():
    code = f"import sys, {', '.join(PACKAGES)}; print(*{{'torch', 'timm', 'numpy', 'PIL'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
