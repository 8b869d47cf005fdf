"""The house: what is importable from where, what importing costs, and which names are free."""

import ast
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import clipkit

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("train", "zeroshot", "guidance")


def python(code, cwd, env=None, flags=()):
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_shadows_one_that_others_import():
    """`python train/pretrain.py` puts train/ first on sys.path."""
    taken = sys.stdlib_module_names | packages_distributions().keys()
    for room in ROOMS:
        stems = {p.stem for p in (ROOT / room).glob("*.py")} - {"__init__"}
        assert not stems & taken, f"{room}/ shadows {stems & taken}"


@pytest.mark.parametrize("module", ["clipkit", "clipkit.cli", "clipkit.config"])
def test_importing_is_light(module, tmp_path):
    show = "print(len(sys.modules), *sorted({'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules)))"
    count, *heavy = python(f"import {module}, sys; {show}", tmp_path).split()
    assert not heavy
    assert int(count) < 150


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_rooms_are_inside_the_package_from_anywhere(where, tmp_path):
    cwd = ROOT if where == "root" else tmp_path
    code = "import clipkit.train, clipkit.zeroshot, clipkit.guidance, clipkit; print(clipkit.__version__)"
    assert python(code, cwd) == clipkit.__version__


def test_console_script(tmp_path):
    script = Path(sys.executable).with_name("clipkit")
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == f"clipkit, version {clipkit.__version__}"


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]])
@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_scripts_run_by_path(launcher, where, tmp_path):
    cwd = ROOT if where == "root" else tmp_path
    script = "train/pretrain.py" if where == "root" else str(ROOT / "train/pretrain.py")
    words = [sys.executable, *launcher, script, "drawings_clip", "--dry-run", "run.steps=77"]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps = 77") == (2 if launcher else 1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`pip install .` into a folder of its own, without fetching anything."""
    target = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "clipkit"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), "."], cwd=source, check=True)
    return source, target


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_plain_install(installed, where, tmp_path):
    source, target = installed
    code = (
        "import clipkit, clipkit.train, clipkit.zeroshot.named as d; from clipkit.config import SHIPPED; "
        "print(clipkit.__file__, len(d.described()) > 2, (SHIPPED / 'drawings_clip.toml').is_file())"
    )
    file, registry, recipes = python(code, source if where == "root" else tmp_path, {"PYTHONPATH": str(target)}).split()
    assert Path(file).is_relative_to(source if where == "root" else target)
    assert (registry, recipes) == ("True", "True")


def test_an_install_adds_one_name_and_types(installed):
    _, target = installed
    names = {p.name for p in target.iterdir()} - {"bin"}
    assert {n for n in names if not n.endswith(".dist-info")} == {"clipkit"}
    assert (target / "clipkit" / "py.typed").is_file()
    assert (target / "clipkit" / "train" / "recipes").is_dir()
    assert list((target / "clipkit" / "assets" / "clipkit-tiny").rglob("*.safetensors"))
    assert (target / "clipkit" / "assets" / "app" / "index.html").is_file()


USER_SCRIPT = """\
from clipkit import load
from clipkit.guidance import load_denoiser, samplers
from clipkit.train import Task, backward
from clipkit.zeroshot import Scores, class_head, retrieval
wrong: int = (load(), load_denoiser, samplers.ddim, Task, backward, Scores, class_head, retrieval.recall)
"""


@pytest.mark.parametrize("how", ["editable", "wheel"])
def test_type_checkers_find_what_a_user_imports(installed, how, tmp_path):
    """An editable install is a plain path to ROOT. Other packages are skipped, which makes this fast."""
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    skipped = ["click", "huggingface_hub", "numpy", "PIL", "safetensors", "timm", "tokenizers", "torch", "torchvision"]
    config = ["[mypy]", "strict = true", "[mypy-clipkit.*]", "follow_imports = silent"]
    config += [f"[mypy-{','.join(f'{name}.*' for name in (*skipped, 'tqdm'))}]", "follow_imports = skip"]
    (tmp_path / "mypy.ini").write_text("\n".join(config))
    path = ROOT if how == "editable" else installed[1]
    environment = {**os.environ, "MYPYPATH": str(path), "PYTHONPATH": ""}
    words = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr  # the intended one, with every type known
    assert "Pretrained" in errors[0]
    assert "Denoiser" in errors[0]
    assert "type[Task]" in errors[0]


FILES = sorted(path for room in ("clipkit", *ROOMS) for path in (ROOT / room).rglob("*.py"))
"""The package's modules. Links to the rooms are not followed."""


def module_of(path):
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(words if words[0] == "clipkit" else ("clipkit", *words)).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_module_imports_and_says_what_it_is(path):
    if path.stem in ("__main__", "_version"):
        return
    assert importlib.import_module(module_of(path)).__doc__


def test_library_errors_name_no_flags():
    """Flags of other programs stand in backquotes."""
    flag = re.compile(r"(^|\s)--\w")
    found = [
        f"{module_of(path)}: {text.value}"
        for path in FILES
        if not {"commands", "cli", "server"} & {path.stem, path.parent.name}
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(statement, ast.Raise)
        for text in ast.walk(statement)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
        if flag.search(re.sub(r"`(?!clipkit)[^`]*`", "", text.value))
    ]
    assert not found
