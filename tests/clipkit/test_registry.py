"""Registries: names, lazily imported objects, and entries of other packages."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import clipkit
from clipkit._renamed import MODULES, NAMES
from clipkit.errors import UsageError
from clipkit.registry import TASKS, Entry, Registry


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
def package(tmp_path, monkeypatch):
    """Makes an installed package with entry points in a folder for sys.path."""

    def make(name, group, points, code=""):
        monkeypatch.delitem(sys.modules, name, raising=False)
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


def test_a_name_of_clipkit_remains_clipkits(table, package, monkeypatch, capsys):
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", {"dumps": "shiny:shine", "shine": "shiny:shine"}))
    assert table["loads"] is json.loads
    assert capsys.readouterr().err == ""
    assert table["dumps"] is json.dumps
    line = "clipkit: sampler 'dumps' of package shiny is ignored: clipkit has that name\n"
    assert capsys.readouterr().err == line
    assert list(table) == ["dumps", "loads", "shine"]
    assert capsys.readouterr().err == ""  # said once


def test_a_list_names_the_entries_that_are_ignored(package, monkeypatch, capsys):
    points = {"dumps": "shiny:a", "a b": "shiny:a", "": "shiny:a", "a:b": "shiny:a", "folder": "shiny:a"}
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", points))
    table = Registry("sampler", {"dumps": Entry("json:dumps", "")}, reserved=["folder"])
    assert list(table) == ["dumps"]
    err = capsys.readouterr().err
    assert err.count("of package shiny is ignored: ") == err.count("\n") == len(points)
    assert "'a b' of package shiny is ignored: a name is not empty, without ':' and white space\n" in err
    assert "'folder' of package shiny is ignored: folder:PLACE has another meaning\n" in err


def test_a_name_that_two_packages_use_is_refused_when_it_is_used(table, package, monkeypatch, capsys):
    package("dull", "clipkit.samplers", {"shine": "dull:shine"})
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", {"shine": "shiny:shine"}))
    assert list(table) == ["dumps", "loads", "shine"]
    assert table.entry("shine").help in ("from dull and shiny", "from shiny and dull")
    with pytest.raises(UsageError, match=r"^sampler 'shine' is registered by \w+ and by \w+; uninstall one$"):
        _ = table["shine"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("point", ["shiny:Sun.shine [fast]", "shiny:Sun.shine"])
def test_extras_and_attributes_of_attributes_are_loaded(table, package, monkeypatch, point):
    code = "class Sun:\n    def shine(): return 7\n"
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", {"shine": point}, code))
    assert table["shine"]() == 7


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ValueError('two\\nlines')", "cannot be imported: ValueError: two lines"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("shine shine", "cannot be imported: SyntaxError: invalid syntax.*"),
        ("shine = 3", "is of type int; it must be callable"),
    ],
)
def test_an_entry_that_cannot_be_used_is_one_line(table, package, monkeypatch, code, problem):
    monkeypatch.syspath_prepend(package("shiny", "clipkit.samplers", {"shine": "shiny:shine"}, code))
    with pytest.raises(UsageError, match=rf"^sampler 'shine' \(from shiny\) {problem}$"):
        _ = table["shine"]


def test_a_task_must_run(package, monkeypatch):
    monkeypatch.syspath_prepend(package("shiny", "clipkit.tasks", {"shine": "shiny:shine"}, "def shine(): pass"))
    table = Registry("task", {}, TASKS.methods)
    with pytest.raises(UsageError, match=r"^task 'shine' \(from shiny\) is of type function, which has no run; "):
        _ = table["shine"]


BROKEN = {
    "tasks": {"pack": "shiny:a", "clip": "shiny:a", "glow": "shiny:a"},
    "losses": {"info_nce": "shiny:a", "boom": "shiny:a"},
    "sources": {"drawings": "shiny:a", "boom": "shiny:a"},
    "datasets": {"cifar10": "shiny:a", "boom": "shiny:a", "folder": "shiny:a"},
    "samplers": {"ddim": "shiny:a", "boom": "shiny:a"},
    "spacings": {"karras": "shiny:a", "boom": "shiny:a"},
    "guiders": {"universal": "shiny:a", "boom": "shiny:a", "a:b": "shiny:a"},
    "towers": {"clipkit_resnet": "shiny:a", "boom": "shiny:a"},
    "export_formats": {"onnx": "shiny:a", "boom": "shiny:a"},
}


@pytest.fixture
def broken(tmp_path):
    """Runs `clipkit` with an installed package that takes names of clipkit's and cannot be imported."""
    site = tmp_path / "site"
    info = site / "shiny-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "shiny.py").write_text("raise ValueError('broken')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny\nVersion: 1.0\n")
    groups = (f"[clipkit.{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in BROKEN.items())
    (info / "entry_points.txt").write_text("".join(groups))
    root = os.path.dirname(os.path.dirname(clipkit.__file__))
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{site}"}

    def run(*words):
        words = [sys.executable, "-m", "clipkit", *words]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        (["--help"], ["task 'clip' of", "task 'pack' (from shiny) has no command"]),
        (["guided-sample", "--help"], ["sampler 'ddim'", "spacing 'karras'", "guider 'universal'", "guider 'a:b'"]),
        (["zeroshot", "--help"], ["dataset 'cifar10'", "dataset 'folder'"]),
        (["pack", "--help"], ["source 'drawings'"]),
        (["export", "--help"], ["export format 'onnx'"]),
        (["models", "ViT-B-32"], []),
        (["recipe", "drawings_clip"], ["loss 'info_nce'", "task 'clip'"]),
        (["recipe", "--keys"], ["task 'clip'", "loss 'info_nce'", "task 'glow' (from shiny) cannot be imported"]),
        (["pack", "drawings", "out", "--count", "2"], ["source 'drawings'"]),
    ],
)
def test_no_command_breaks_because_of_an_installed_package(broken, words, ignored):
    done = broken(*words)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("clipkit: ") for line in lines)
    for name in ignored:
        assert sum(name in line for line in lines) == 1, done.stderr


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["guided-sample", "a rocket", "--sampler", "boom"], "sampler 'boom'"),
        (["guided-sample", "a rocket", "--guider", "boom"], "guider 'boom'"),
        (["zeroshot", "--dataset", "boom"], "dataset 'boom'"),
        (["pack", "boom", "out"], "source 'boom'"),
        (["recipe", "drawings_clip", "loss.kind=boom"], "loss 'boom'"),
        (["export", "out", "--format", "boom"], "export format 'boom'"),
        (["glow", "drawings_clip"], "task 'glow'"),
    ],
)
def test_a_broken_entry_that_is_used_is_one_line(broken, words, what):
    done = broken(*words)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert last == f"clipkit: {what} (from shiny) cannot be imported: ValueError: broken"


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


def forget(former):
    """Undo the import of a former module: other tests see the warning, and the name of its package that it hides."""
    del sys.modules[former]
    package, _, name = former.rpartition(".")
    vars(sys.modules[package]).pop(name, None)


def test_former_names_are_the_present_objects():
    for former, present in MODULES.items():
        with pytest.warns(DeprecationWarning, match=f"^{former} is now {present}$"):
            module = __import__(former, fromlist=["_"])
        for old, new in NAMES.get(present, {}).items():
            home, _, name = new.rpartition(":")
            assert getattr(module, old) is getattr(sys.modules[home or present], name)
        forget(former)


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
            forget(module)
    assert missing == GONE
