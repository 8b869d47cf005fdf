"""Registries: names, lazily imported objects, and entries of other packages."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from clipkit._renamed import MODULES, NAMES
from clipkit.errors import UsageError
from clipkit.registry import Entry, Registry


@pytest.fixture
def table():
    return Registry("sampler", {"dumps": Entry("json:dumps", "to text"), "loads": Entry("json:loads", "from text")})


def test_a_name_is_imported_when_it_is_used(table):
    assert list(table) == ["dumps", "loads"]
    assert len(table) == 2
    assert table["dumps"] is json.dumps
    assert table.entry("loads").help == "from text"
    assert table.group == "clipkit.samplers"


def test_an_unknown_name_is_refused(table):
    with pytest.raises(UsageError, match=r"^unknown sampler 'load'; did you mean 'loads'\?$"):
        _ = table["load"]
    assert "load" not in table


@pytest.fixture
def package(tmp_path):
    """Makes an installed package with entry points in a folder for sys.path."""

    def make(name, group, points, code=""):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
        return tmp_path

    return make


def test_other_packages_add_names(table, package, monkeypatch):
    folder = package("shiny", "clipkit.samplers", {"shine": "shiny:shine"}, "def shine(): return 7\n")
    monkeypatch.syspath_prepend(folder)
    assert list(table) == ["dumps", "loads", "shine"]
    assert table["shine"]() == 7
    assert table.entry("shine").help == "from shiny"


def test_a_name_that_two_use_is_refused(table, package, monkeypatch):
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", {"dumps": "shiny:shine"}))
    with pytest.raises(UsageError, match=r"^sampler 'dumps' is registered by clipkit and by shiny; uninstall one$"):
        list(table)


def test_a_package_that_cannot_be_imported_is_one_line(table, package, monkeypatch):
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", {"shine": "shiny:gone"}))
    with pytest.raises(UsageError, match=r"^sampler 'shine' \(from shiny\) cannot be imported: .*gone"):
        _ = table["shine"]


@pytest.mark.parametrize("former", ["clipkit.guidance.draw", "clipkit.images", "clipkit.records"])
def test_former_modules_are_imported_with_a_warning(former, tmp_path):
    code = f"import {former} as m; from clipkit._renamed import MODULES; import importlib; print(MODULES['{former}'])"
    environment = {**os.environ, "PYTHONWARNINGS": "always"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"DeprecationWarning: {former} is now {done.stdout.strip()}" in done.stderr


def test_former_names_are_the_present_objects():
    for former, present in MODULES.items():
        with pytest.warns(DeprecationWarning, match=f"^{former} is now {present}$"):
            module = __import__(former, fromlist=["_"])
        for old, new in NAMES.get(present, {}).items():
            home, _, name = new.rpartition(":")
            assert getattr(module, old) is getattr(sys.modules[home or present], name)
        del sys.modules[former]


GONE = {
    "clipkit.checkpoint": "Part",
    "clipkit.guidance.draw": "DEFAULT_CFG_SCALE DEFAULT_SCALE",
    "clipkit.guidance.steering": "check_counts",
    "clipkit.train.batchnorm": "undisturbed",
    "clipkit.train.launch": "MakeTask launch",
    "clipkit.train.parallel": "like share shares whole",
    "clipkit.train.step": "EARLY",
    "clipkit.weights": "Rule translate",
    "clipkit.zeroshot.evaluation": "figures",
}
"""Names of 0.1 that no page mentioned and that have no successor of the same signature, or are internal."""


@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
def test_every_public_name_of_version_0_1_is_importable():
    lines = (Path(__file__).parents[1] / "fixtures" / "public-names-0.1.txt").read_text().splitlines()
    missing = {}
    for module, names in (line.split(": ") for line in lines):
        found = import_module(module)
        lost = [name for name in names.split() if not hasattr(found, name)]
        missing |= {module: " ".join(lost)} if lost else {}
        if found.__name__ in MODULES:
            del sys.modules[module]  # so that importing it warns in other tests
    assert missing == GONE
